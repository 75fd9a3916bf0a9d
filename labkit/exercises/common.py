"""What the exercises share: a tiny model and its engines, requests of given lengths, and comparisons."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from labkit import notebook
from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan, StepResult
from labkit.core.scheduler import Scheduler
from labkit.engine import Engine
from labkit.exercises import Wrong
from labkit.models.load import LoadedModel, load_model
from labkit.notebook import Picture
from labkit.notebook.pictures.batches import TWELVE
from labkit.sampling_params import SamplingParams
from labkit.trace.trace import Trace
from labkit.views.picture import token_timeline

# -- an engine -------------------------------------------------------------------------------------


@functools.cache
def tiny_model(quantization: str | None = None) -> LoadedModel:
    """tiny-random: it knows nothing, and gives the same tokens on every machine."""
    return load_model("tiny-random", quantization=quantization, device="cpu", say=None)


def tiny_engine(
    *,
    scheduler_class: Callable[..., Scheduler] | None = None,
    pool: Callable[..., BlockPool] | None = None,
    **config: Any,
) -> Engine:
    """An engine that runs tiny-random.

    Args:
        scheduler_class: a scheduler of one's own, as `scheduler` of `Engine`.
        pool: a block pool of one's own, as for `Engine`.
        config: fields of `EngineConfig`.
    """
    return Engine(EngineConfig(model=tiny_model(), **config), scheduler=scheduler_class, pool=pool)


PROMPTS = ("the sea is", "a prime number is one that", "once upon a time there was a very old house by the")
TEXT = [(7 * i + i * i) % 900 + 300 for i in range(192)]
"""Token ids of a text that tiny-random can read."""

# -- requests --------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A request to come: the lengths of its prompt and its answer, and the step before which it arrives.

    A job without a name gets its place in the list as the name of its request.
    """

    prompt_tokens: int
    answer_tokens: int
    step: int = 0
    name: str = ""


JOBS: tuple[Job, ...] = tuple(Job(*lengths, name=str(i)) for i, lengths in enumerate(TWELVE))
"""The twelve requests of notebooks 02 and 04."""


def prompt_of(number: int, length: int) -> list[int]:
    """Token ids for the prompt of a request. No two of the first 500 prompts begin alike."""
    return [300 + (37 * number + 11 * place) % 500 for place in range(length)]


def exactly(answer_tokens: int) -> SamplingParams:
    """Parameters for a greedy answer of exactly this many tokens."""
    return SamplingParams(max_tokens=answer_tokens, ignore_eos=True)


def inject(
    engine: Engine,
    prompt_tokens: int,
    answer_tokens: int,
    request_id: str | None = None,
    *,
    priority: int = 0,
) -> str:
    """Add a request of these lengths; returns its name. No two prompts begin alike."""
    prompt = prompt_of(len(engine.outputs), prompt_tokens)
    return engine.add_request(prompt, exactly(answer_tokens), request_id=request_id, priority=priority)


def arrivals(engine: Engine, jobs: Sequence[Job]) -> Iterator[int]:
    """Add each job before its step, and yield the number of the step; the caller makes the step.

    It ends when all jobs have arrived and all requests are done.
    """
    step, last = 0, max((job.step for job in jobs), default=-1)
    while step <= last or engine.has_unfinished:
        for number, job in enumerate(jobs):
            if job.step == step:
                inject(engine, job.prompt_tokens, job.answer_tokens, job.name or str(number))
        yield step
        step += 1


def without_model(plan: StepPlan) -> StepResult:
    """What a step brings if every token is 0: a scheduler alone never sees its tokens, and needs no model."""
    rows = zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
    return StepResult([(0,) if start + count == len(r.token_ids) else () for r, start, count in rows])


def serve(engine: Engine, jobs: Sequence[Job]) -> Engine:
    """Add each job before its step, and step until all are done."""
    for _ in arrivals(engine, jobs):
        engine.step()
    return engine


# -- what a learner returned -----------------------------------------------------------------------


def whole(value: Any) -> int | None:
    """A whole number of any kind (numpy's, or a tensor of one number) as an int; None for anything else."""
    try:
        return int(operator.index(value))
    except (TypeError, ValueError):
        return None


def real(value: Any) -> float | None:
    """A number of any kind (numpy's, a fraction, a tensor of one) as a float; None for anything else."""
    if isinstance(value, str | bytes | bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def truth(value: Any) -> bool | None:
    """True or False of any kind (numpy's, or a tensor of one) as a bool; None for anything else."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        return bool(value) if kind.removeprefix("torch.") == "bool" else None
    except (ValueError, RuntimeError):  # several of them
        return None


# -- comparing and drawing -------------------------------------------------------------------------


def answers(engine: Engine) -> dict[str, list[int]]:
    """The tokens of each answer, by the request's name."""
    return {name: output.token_ids for name, output in engine.outputs.items()}


def expect_same_answers(yours: Engine, reference: Engine, rule: str) -> None:
    """Raise `Wrong` with this rule and the first request whose answer differs, if there is one."""
    right = answers(reference)
    for name, output in yours.outputs.items():
        if output.token_ids != right[name]:
            failed = f"\nit failed: {output.error}" if output.error else ""
            told = f"request {name}\nyours: {few(output.token_ids)}\nright: {few(right[name])}{failed}"
            raise Wrong(rule, told)


def few(tokens: Sequence[int], most: int = 8) -> str:
    """The first of some tokens, as text."""
    return (", ".join(map(str, tokens[:most])) or "no tokens") + (", ..." if len(tokens) > most else "")


def timelines(traces: Mapping[str, Trace]) -> list[tuple[str, Picture]]:
    """The timeline of each trace, under its caption."""
    return [(caption, notebook.timeline(trace)) for caption, trace in traces.items()]


def rails(traces: Mapping[str, Trace], unit: str = "tokens") -> list[tuple[str, Picture]]:
    """The token timeline of each trace, under its caption; `unit` is that of the horizontal axis."""
    return [(caption, token_timeline(trace, unit)) for caption, trace in traces.items()]
