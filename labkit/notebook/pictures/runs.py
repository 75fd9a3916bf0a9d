"""The small runs that pictures show: the real engine, with the tiny model that is the same everywhere."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams


class Lengths(NamedTuple):
    """A request: tokens of its prompt and of its answer, and the step before which it comes."""

    prompt: int
    answer: int
    step: int = 0


@functools.cache
def tiny() -> LoadedModel:
    """Load the model of all these runs once."""
    return load_model("tiny-random", device="cpu", say=None)


def run(requests: Iterable[Lengths], **config: Any) -> Engine:
    """Run requests, called "0", "1" and so on, to their end; `config` has fields of `EngineConfig`."""
    engine = Engine(EngineConfig(model=tiny(), enable_prefix_caching=False, **config))
    todo = sorted(requests, key=lambda request: request.step)
    while todo or engine.has_unfinished:
        while todo and todo[0].step <= len(engine.trace):
            lengths = todo.pop(0)
            prompt = [300 + (37 * len(engine.outputs) + 11 * i) % 500 for i in range(lengths.prompt)]
            engine.add_request(prompt, SamplingParams(max_tokens=lengths.answer, ignore_eos=True))
        engine.step()
    return engine
