"""Notebook 14: one model over two processes, and prompts apart from answers. Its exercises, and its runs.

All runs are on the CPU: a free Colab has one GPU, and a laptop none. Processes end with their run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit import notebook
from labkit.analysis.workload import prose
from labkit.config import EngineConfig
from labkit.disaggregated import DisaggregatedEngine
from labkit.engine import Engine
from labkit.exercises.common import exactly
from labkit.exercises.e14_place import PLACE
from labkit.exercises.e14_ring import RING
from labkit.exercises.e14_split import SPLIT
from labkit.models.load import LoadedModel, load_model
from labkit.outputs import RequestOutput
from labkit.parallel.model import SummedLinear
from labkit.trace.trace import Trace

EXERCISES = (SPLIT, PLACE, RING)

# -- one model over two processes -----------------------------------------------------------------


@contextlib.contextmanager
def together(config: EngineConfig) -> Iterator[Engine]:
    """An engine whose model several processes share, which end when the `with` does."""
    with _threads_kept():
        engine = Engine(config, say=None)
        try:
            yield engine
        finally:
            engine.model.module.workers.close()


@contextlib.contextmanager
def apart(config: EngineConfig) -> Iterator[DisaggregatedEngine]:
    """An engine whose prompts another process computes, which ends when the `with` does."""
    with _threads_kept():
        engine = DisaggregatedEngine(config, say=None)
        try:
            yield engine
        finally:
            engine.close()


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Forgetful(SummedLinear):
    """A product whose sum over all processes this one forgets to take: it goes on with its own part.

    It takes part in the exchange all the same, so that the others do not wait for it for ever.
    """

    def forward(self, x: Tensor) -> Tensor:
        own = self.linear(x)
        self.group.all_reduce(own.clone())
        return own


@contextlib.contextmanager
def forgetting(model: LoadedModel, layers: Sequence[int]) -> Iterator[None]:
    """Let this process forget the sum after attention in some layers of a shared model."""
    kept = {}
    try:
        for i in layers:
            home = model.module.layers[i].self_attn
            kept[i] = home.o_proj
            home.o_proj = Forgetful(kept[i].linear, kept[i].group)
        yield
    finally:
        for i, product in kept.items():
            model.module.layers[i].self_attn.o_proj = product


def answer(engine: Engine, prompts: Sequence[str], tokens: int) -> list[RequestOutput]:
    """Go on with all prompts greedily, by exactly so many tokens."""
    names = [engine.add_request(prompt, exactly(tokens)) for prompt in prompts]
    while engine.has_unfinished:
        engine.step()
    return [engine.outputs[name] for name in names]


def agree(one: RequestOutput, other: RequestOutput) -> int:
    """How many tokens two answers have in common before the first that differs."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@functools.cache
def on_cpu() -> LoadedModel:
    """The notebook's model on the CPU, where everything of this notebook runs."""
    model = notebook.default_model()
    return model if model.device.type == "cpu" else load_model(model.name, device="cpu", say=None)


# -- prompts that come into running answers ---------------------------------------------------------

READERS, NEWCOMERS = 4, (600, 900)
"""Answers that run, and the lengths of the prompts that come meanwhile."""
_EVERY, _FIRST, _TOKENS = 25, 8, 60


@dataclass
class Visit:
    """What became of the running answers and of the prompts that came.

    Attributes:
        gaps: The seconds between two tokens of the running answers.
        waits: The seconds to the first token of each prompt that came.
        beside: For each step in which a running answer got a token, how many tokens it computed.
        cached: How many tokens of each prompt that came were in the cache already.
        tokens: All answers.
        seconds: What the whole took.
        trace: The trace.
    """

    gaps: list[float]
    waits: list[float]
    beside: list[int]
    cached: list[int]
    tokens: list[list[int]]
    seconds: float
    trace: Trace


def settings(model: LoadedModel | str, budget: int = 512) -> EngineConfig:
    """The settings of each engine that is compared."""
    return EngineConfig(model, device="cpu", num_blocks=400, max_num_seqs=8, max_num_batched_tokens=budget)


def visit(engine: Engine) -> Visit:
    """Let some answers run, and long prompts come, one every 25 steps."""
    text = engine.model.tokenizer.encode(prose(), add_special_tokens=False)
    readers = [engine.add_request(text[20 * i : 20 * i + 12], exactly(_TOKENS)) for i in range(READERS)]
    names, begin, step = [], 100, 0
    while engine.has_unfinished or len(names) < len(NEWCOMERS):
        if step >= _FIRST and (step - _FIRST) % _EVERY == 0 and len(names) < len(NEWCOMERS):
            length = NEWCOMERS[len(names)]
            names.append(engine.add_request(text[begin : begin + length], exactly(4)))
            begin += length
        engine.step()
        step += 1
    trace = engine.trace
    beside = [
        record.total_tokens
        for record in trace
        if any(row.request_id in readers and row.kind == "decode" for row in record.rows)
    ]
    outputs = engine.outputs
    gaps = [gap for name in readers for gap in outputs[name].metrics.itl]
    waits = [outputs[name].metrics.ttft or 0.0 for name in names]
    tokens = [outputs[name].token_ids for name in [*readers, *names]]
    cached = [outputs[name].metrics.num_cached_tokens for name in names]
    return Visit(gaps, waits, beside, cached, tokens, trace.records[-1].time, trace)
