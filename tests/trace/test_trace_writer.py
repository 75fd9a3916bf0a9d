"""What the engine forgets is in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import load_model
from labkit.page.session import Lab
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord, TraceMeta
from labkit.trace.trace import Trace
from labkit.trace.writer import TraceWriters


def test_what_is_told_is_written_until_it_is_closed(tmp_path: Path) -> None:
    listeners: list[Callable[[StepRecord], None]] = []

    def subscribe(listener: Callable[[StepRecord], None]) -> Callable[[], None]:
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    writers = TraceWriters(tmp_path / "run.jsonl")
    for blocks in (4, 8):
        meta = TraceMeta(blocks, 2, 1, 8)
        path = writers.follow(meta, subscribe)
        (write,) = listeners  # of the engine before there is no listener any more
        for step in range(3):
            write(StepRecord(step))
        assert len(listeners) == 1
    writers.close()
    write(StepRecord(3))
    assert not listeners and path.name == "run-2.jsonl"
    assert Trace.load(path) == Trace(meta, map(StepRecord, range(3)))
    assert Trace.load(tmp_path / "run.jsonl").meta.num_blocks == 4


def run(lab: Lab, max_tokens: int) -> None:
    live = lab.session.live
    for _ in live.stream(live.submit("hello", SamplingParams(max_tokens=max_tokens, ignore_eos=True))):
        pass


def test_every_step_of_every_engine_is_written(tmp_path: Path) -> None:
    config = EngineConfig(model=load_model("tiny-random", say=None), num_blocks=64, max_trace_steps=5)
    with AsyncEngine(Engine(config)) as live:
        lab = Lab(live, trace_file=tmp_path / "run.jsonl")
        run(lab, 40)
        assert len(live.engine.trace) < 40
        lab.change({"num_blocks": 32}, running="cancel")
        run(lab, 3)
        lab.close()
    first, second = Trace.load(tmp_path / "run.jsonl"), Trace.load(tmp_path / "run-2.jsonl")
    assert [record.step for record in first] == list(range(40)) and first.meta.num_blocks == 64
    assert [record.step for record in second] == [0, 1, 2] and second.meta.num_blocks == 32


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    config = EngineConfig(model=load_model("tiny-random", say=None), num_blocks=64)
    with AsyncEngine(Engine(config)) as live, pytest.raises(OSError):
        Lab(live, trace_file=tmp_path / "no such folder" / "run.jsonl")
