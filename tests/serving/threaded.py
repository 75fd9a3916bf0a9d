"""Engines on their threads, for tests, and what tests ask of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord

PATIENCE = 60  # seconds until a test gives up; nothing is decided by it


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


class GatedEngine(Engine):
    """An engine whose steps wait until they are let through, and fail when told to."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.gate = threading.Semaphore(0)
        self.in_step = threading.Event()
        self.fault: Exception | None = None
        self.looks = 0

    @property
    def has_unfinished(self) -> bool:
        self.looks += 1
        return super().has_unfinished

    def step(self) -> StepRecord:
        self.in_step.set()
        assert self.gate.acquire(timeout=PATIENCE)
        if self.fault:
            raise self.fault
        return super().step()


@pytest.fixture
def live(model: LoadedModel) -> Iterator[AsyncEngine]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        yield live


@pytest.fixture
def gated(model: LoadedModel) -> Iterator[AsyncEngine]:
    engine = GatedEngine(EngineConfig(model=model, num_blocks=64))
    with AsyncEngine(engine) as live:
        yield live
        engine.gate.release(10_000)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def drained(live: AsyncEngine) -> None:
    """Wait until the engine has obeyed every command handed in so far."""
    done = threading.Event()
    with live._changed:
        live._inbox.append(done.set)
        live._changed.notify_all()
    assert done.wait(PATIENCE)


def last(stream: Iterator[RequestOutput]) -> RequestOutput:
    *_, final = stream
    return final


def solo(model: LoadedModel, prompt: str, params: SamplingParams) -> list[int]:
    engine = Engine(EngineConfig(model=model, num_blocks=64))
    request_id = engine.add_request(prompt, params)
    while engine.has_unfinished:
        engine.step()
    return engine.outputs[request_id].token_ids
