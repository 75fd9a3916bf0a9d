"""Exercises of notebook 07: what a step moves and computes, and when computing takes longer than moving."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit import notebook
from labkit.analysis.roofline import Shape, Work
from labkit.analysis.shapes import config_of
from labkit.config import EngineConfig
from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA
from labkit.models.load import LoadedModel
from labkit.sampling_params import SamplingParams
from labkit.trace.records import StepRecord

Cost = Callable[[list[int], list[int]], tuple[float, float]]

T4_BANDWIDTH = 320e9
T4_PEAK = 65e12
"""Bytes and fp16 operations per second of an NVIDIA T4, by the vendor's figures."""

_TOLERANCE = 0.01  # norms, embeddings and scales, which an answer may count or leave out, are less
_JOBS = ((30, 12), (80, 7), (12, 20), (150, 9), (45, 16), (20, 5))  # prompt and answer tokens


def shape_of(name: str = "SmolLM2-135M", *, value_bytes: int = 4) -> Shape:
    """The sizes of a well-known model; no weights are loaded.

    Raises:
        ValueError: for an unknown one.
    """
    config = config_of(name)
    return Shape.of_config(
        config, ((None, config.num_hidden_layers),), weight_bytes=value_bytes, value_bytes=value_bytes
    )


# -- a fast engine that is wrong --------------------------------------------------------------------


class OnlyItself:
    """Decoding rows, each of which looks at its own token alone: the softmax of one score is 1."""

    def __init__(self, first: int, rows: Sequence[Span], cache: PagedKVCache) -> None:
        self.first, self.last = first, first + len(rows)
        size, device = cache.block_size, cache.device
        self.blocks = torch.tensor([row.table[row.start // size] for row in rows], device=device)
        self.places = torch.tensor([row.start % size for row in rows], device=device)

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        own = pages[self.blocks, 1, :, self.places]  # its value: (rows, kv_heads, head_dim)
        return own.repeat_interleave(q.shape[1] // own.shape[1], dim=1)


BLIND = dataclasses.replace(
    SDPA, name="only itself", decode=lambda first, rows, cache, windows: [OnlyItself(first, rows, cache)]
)
"""Attention that is right for prompts, and sees nothing of the cache in decode."""


def answer_together(
    model: LoadedModel, prompts: Sequence[list[int]], max_tokens: int, backend: Backend = SDPA
) -> Engine:
    """Answer prompts with so many tokens each, with this attention; the first is computed before the others.

    So the others find in the prefix cache what they share with it.
    """
    config = EngineConfig(model=model, num_blocks=256, attention_backend="sdpa", cuda_graphs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # which attention it chose
        engine = Engine(config)
    engine.runner.backend = backend
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        if len(engine.outputs) == 1:
            engine.step()
    while engine.has_unfinished:
        engine.step()
    return engine


# -- 07.1 -----------------------------------------------------------------------------------------


def step_cost(
    num_tokens: list[int], kv_tokens: list[int], shape: Shape, bytes_per_weight: int
) -> tuple[float, float]:
    """What one step moves and computes, if each of its rows samples a token.

    Args:
        num_tokens: tokens that each row computes.
        kv_tokens: tokens that each row has in the cache before.
        shape: of the model.
        bytes_per_weight: 4 in fp32, 2 in half precision, 1 in 8 bits.

    Returns:
        Bytes, and operations (a multiplication and an addition are two).
    """
    return _moved(num_tokens, kv_tokens, shape, bytes_per_weight), _computed(num_tokens, kv_tokens, shape)


def _moved(
    num_tokens: Sequence[int],
    kv_tokens: Sequence[int],
    shape: Shape,
    weight: float,
    *,
    times: int = 1,
    output: bool = True,
    heads: int | None = None,
    sides: int = 2,
    value: float | None = None,
    read: bool = True,
    new: bool = True,
    written: bool = True,
) -> float:
    """Bytes; the switches make the mistakes that `_SUSPECTS` know."""
    matrices = shape.layers * shape.layer_parameters + output * shape.vocab * shape.hidden
    token = sides * (heads or shape.kv_heads) * shape.head_dim * (value or shape.value_bytes) * shape.layers
    tokens = read * (sum(kv_tokens) + new * sum(num_tokens)) + written * sum(num_tokens)
    return times * matrices * weight + token * tokens


def _computed(
    num_tokens: Sequence[int],
    kv_tokens: Sequence[int],
    shape: Shape,
    *,
    each: int = 2,
    sampled: int | None = None,
    heads: int | None = None,
    pairs: int | None = None,
) -> float:
    """Operations; the switches make mistakes likewise."""
    rows = list(zip(num_tokens, kv_tokens, strict=True))
    if pairs is None:
        pairs = sum(new * old + new * (new + 1) // 2 for new, old in rows)
    products = shape.layers * shape.layer_parameters * sum(num_tokens)
    products += shape.vocab * shape.hidden * (len(rows) if sampled is None else sampled)
    attention = 2 * shape.layers * (shape.heads if heads is None else heads) * shape.head_dim * pairs
    return each * (products + attention)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A case: a step, the model, and what a weight takes."""

    num_tokens: list[int]
    kv_tokens: list[int]
    model: str
    weight: int
    value: int

    @property
    def shape(self) -> Shape:
        return shape_of(self.model, value_bytes=self.value)

    @property
    def package(self) -> Work:
        """The package's own count."""
        return _package(self.num_tokens, self.kv_tokens, self.shape, self.weight)

    @property
    def call(self) -> str:
        rows = ", ".join(f"[{n[0]}] * {len(n)}" if len(n) > 3 else str(n) for n in self.lists)
        return f"step_cost({rows}, shape of {self.model}, {self.weight})"

    @property
    def lists(self) -> tuple[list[int], list[int]]:
        return self.num_tokens, self.kv_tokens


_STEPS: tuple[_Step, ...] = (
    _Step([1], [0], "SmolLM2-135M", 4, 4),
    _Step([1] * 32, [0] * 32, "SmolLM2-135M", 4, 4),
    _Step([500], [1500], "SmolLM2-135M", 4, 4),  # tells more mistakes apart than the two that follow
    _Step([1], [4000], "SmolLM2-135M", 4, 4),
    _Step([2000], [0], "SmolLM2-135M", 4, 4),
    _Step([1] * 16, [1000] * 16, "SmolLM2-135M", 2, 2),
    _Step([1] * 16, [1000] * 16, "SmolLM2-135M", 1, 4),
    _Step([1, 300, 1], [700, 100, 2000], "Llama-3.2-1B", 2, 2),
)


def _package(num_tokens: Sequence[int], kv_tokens: Sequence[int], shape: Shape, weight: int) -> Work:
    sampled = tuple([(0,)] * len(num_tokens))
    record = StepRecord(0, starts=tuple(kv_tokens), num_tokens=tuple(num_tokens), sampled=sampled)
    return dataclasses.replace(shape, weight_bytes=weight).work(record)


def _suspects(step: _Step) -> Iterator[tuple[str, str, float]]:
    """Plausible mistakes: in bytes or operations, what to say of them, and what they make of this step."""
    new, old, shape = step.num_tokens, step.kv_tokens, step.shape
    moved = functools.partial(_moved, new, old, shape, step.weight)
    weights = moved(read=False, written=False)
    once = "the weights are read once in a step, however many"
    cached = "keys and values are read too: those of all tokens that a row looks at"
    written = "the keys and values of the new tokens are written, and then read like all others"
    for rule, number in (
        (f"{once} rows it has", moved(times=len(new))),
        (f"{once} tokens it computes", moved(times=sum(new))),
        ("the output layer's vocab x hidden weights are read as well", moved(output=False)),
        ("a weight takes bytes_per_weight bytes", _moved(new, old, shape, shape.value_bytes)),
        ("a weight takes bytes_per_weight bytes", _moved(new, old, shape, 4)),
        (cached, weights),
        (written, moved(written=False)),
        (written, moved(new=False)),
        (cached, moved(read=False)),
        ("each token has a key and a value: two vectors for each of kv_heads", moved(sides=1)),
        ("keys and values have kv_heads heads: several query heads share one", moved(heads=shape.heads)),
        ("keys and values take value_bytes, whatever a weight takes", moved(value=step.weight)),
        ("keys and values are kept in every layer", weights + (moved() - weights) / shape.layers),
        ("return bytes, not megabytes", moved() / 1e6),
    ):
        yield "bytes", rule, number
    computed = functools.partial(_computed, new, old, shape)
    pairs = [(n * o, n * (n + 1) // 2) for n, o in zip(new, old, strict=True)]  # with the cache, and inside
    cache, inside = (sum(column) for column in zip(*pairs, strict=True))
    square = cache + sum(n * n for n in new)
    for rule, number in (
        ("a multiplication and an addition are two operations", computed(each=1)),
        ("only the last token of a row goes through the output layer", computed(sampled=sum(new))),
        ("the output layer computes one token of each row", computed(sampled=0)),
        ("the output layer computes one token of each row", computed(sampled=1)),
        ("attention computes as well, in every layer", computed(heads=0)),
        ("a token looks at itself and those before it, not at later ones", computed(pairs=square)),
        ("a new token looks at all tokens in the cache", computed(pairs=inside)),
        ("a new token looks at the new ones before it, and at itself", computed(pairs=cache)),
        ("every query head computes, also where several share a key", computed(heads=shape.kv_heads)),
        ("attention makes two products: scores, and the sum of values", (computed() + computed(heads=0)) / 2),
        ("return operations, not billions of them", computed() / 1e9),
    ):
        yield "operations", rule, number


def _examine_cost(function: Callable[..., Any]) -> None:
    for step in _STEPS:
        new, old = step.lists
        answer = function(list(new), list(old), step.shape, step.weight)
        expect(
            isinstance(answer, list | tuple)
            and len(answer) == 2
            and all(isinstance(x, int | float) and math.isfinite(x) for x in answer),
            "return two numbers: bytes, and operations",
            f"{step.call} returned {answer!r}",
        )
        right = dict(zip(("bytes", "operations"), step_cost(new, old, step.shape, step.weight), strict=True))
        package = {"bytes": step.package.bytes, "operations": step.package.operations}
        for (kind, mine), theirs in zip(right.items(), answer, strict=True):
            if not _near(theirs, mine, package[kind]):
                rule = _diagnosis(step, kind, theirs) or f"the {kind} of this step are off"
                raise Wrong(rule, _explained(step, kind, theirs, mine))


def _near(value: float, *targets: float) -> bool:
    return min(targets) * (1 - _TOLERANCE) <= value <= max(targets) * (1 + _TOLERANCE)


def _diagnosis(step: _Step, kind: str, value: float) -> str:
    """The mistake that would give just this number, if there is one."""
    for suspected, rule, number in _suspects(step):
        if suspected == kind and math.isclose(number, value, rel_tol=_TOLERANCE / 4):
            return rule
    return ""


def _explained(step: _Step, kind: str, value: float, right: float) -> str:
    new, old, shape = step.num_tokens, step.kv_tokens, step.shape
    if kind == "bytes":
        weights = _moved(new, old, shape, step.weight, read=False, written=False)
        unit, size, of = (
            "MB",
            1e6,
            f"weights {weights / 1e6:,.1f}, keys and values {(right - weights) / 1e6:,.1f}",
        )
    else:
        attention = right - _computed(new, old, shape, heads=0)
        unit, size = "GFLOP", 1e9
        of = f"products with weights {(right - attention) / 1e9:,.2f}, attention {attention / 1e9:,.2f}"
    got = f"{step.call}: {value / size:,.2f} {unit}"
    return f"{got}\nit should be about {right / size:,.2f} {unit} ({of})"


@functools.cache
def _trace() -> tuple[StepRecord, ...]:
    """Steps of the engine, each of whose rows samples a token: no prompt is cut."""
    config = EngineConfig(
        "tiny-random",
        device="cpu",
        num_blocks=64,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    engine = Engine(config)
    for number, (prompt, answer) in enumerate(_JOBS):
        token_ids = [300 + (31 * number + 7 * place) % 600 for place in range(prompt)]
        engine.add_request(token_ids, SamplingParams(max_tokens=answer, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    return tuple(engine.trace)


def _run_cost(function: Callable[..., Any]) -> Run:
    shape, records = shape_of(), _trace()
    yours = [function(list(r.num_tokens), list(r.starts), shape, 4) for r in records]
    package = [shape.work(record) for record in records]
    off = [
        max(abs(mine[i] / right - 1) for mine, right in zip(yours, rights, strict=True))
        for i, rights in enumerate(([w.bytes for w in package], [w.operations for w in package]))
    ]
    sentence = (
        f"Over the {len(records)} steps of a real trace, on the sizes of SmolLM2, your bytes are within "
        f"{off[0]:.2%} of the package's own count, and your operations within {off[1]:.2%}."
    )
    x = range(len(records))
    pictures = [
        (
            f"{what} of each step:",
            notebook.lines(
                x,
                {"yours": [mine[i] / size for mine in yours], "the package's": theirs},
                f"{what} of each step of a trace",
                x_name="step",
                y_name=unit,
                digits=2,
            ),
        )
        for i, (what, unit, size, theirs) in enumerate(
            (
                ("Bytes", "MB", 1e6, [w.bytes / 1e6 for w in package]),
                ("Operations", "GFLOP", 1e9, [w.operations / 1e9 for w in package]),
            )
        )
    ]
    return Run(sentence, pictures)


# -- 07.2 -----------------------------------------------------------------------------------------


def turning_point(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    """The smallest number of decoding rows at which a step takes as long to compute as to move, or longer.

    Args:
        context: tokens that each row has in the cache; it computes one more.
        cost: called with the tokens that each row computes and those it has in the cache, gives the bytes
            and operations of the step. Both grow in a straight line with the number of equal rows.
        bandwidth, peak: bytes and operations per second.

    Returns:
        The number of rows, at least 1; None if there is no such number.
    """
    (moved, computed), (moved_2, computed_2) = cost([1], [context]), cost([1, 1], [context, context])
    row_bytes, row_operations = moved_2 - moved, computed_2 - computed
    gains = row_operations / peak - row_bytes / bandwidth  # of computing on moving, with each row
    behind = moved / bandwidth - computed / peak  # with one row
    if behind <= 0:
        return 1
    if gains <= 0:
        return None
    rows = 1 + math.ceil(behind / gains)
    while rows > 1 and _binds(cost, rows - 1, context, bandwidth, peak):  # what rounding has added
        rows -= 1
    return rows


def _seconds(cost: Cost, rows: int, context: int, bandwidth: float, peak: float) -> tuple[float, float]:
    moved, computed = cost([1] * rows, [context] * rows)
    return moved / bandwidth, computed / peak


def _binds(cost: Cost, rows: int, context: int, bandwidth: float, peak: float) -> bool:
    to_move, to_compute = _seconds(cost, rows, context, bandwidth, peak)
    return to_compute >= to_move


def _plain(fixed: float, per_token: float, row_operations: float) -> Cost:
    """A step of round numbers: `fixed` bytes, and `per_token` bytes for each token in the cache."""

    def cost(num_tokens: list[int], kv_tokens: list[int]) -> tuple[float, float]:
        return fixed + per_token * sum(kv_tokens), row_operations * sum(num_tokens)

    return cost


def _of_model(name: str, size: int) -> Cost:
    return functools.partial(step_cost, shape=shape_of(name, value_bytes=size), bytes_per_weight=size)


# A name for the cost, the cost, context, bandwidth and peak.
_POINTS: tuple[tuple[str, Cost, int, float, float], ...] = (
    ("95 bytes of weights; 10 operations a row", _plain(95, 0, 10), 0, 10.0, 10.0),
    ("5 bytes of weights; 10 operations a row", _plain(5, 0, 10), 0, 10.0, 10.0),
    ("90 bytes of weights; 10 operations a row", _plain(90, 0, 10), 0, 20.0, 30.0),
    ("95 bytes of weights, 1 a token; 10 operations a row", _plain(95, 1, 10), 5, 10.0, 10.0),
    ("95 bytes of weights, 1 a token; 10 operations a row", _plain(95, 1, 10), 40, 10.0, 10.0),
    ("95 bytes of weights, 1 a token; 10 operations a row", _plain(95, 1, 10), 10, 10.0, 10.0),
    ("9,995 bytes of weights, 1 a token; 10 operations a row", _plain(9995, 1, 10), 7, 10.0, 10.0),
    ("SmolLM2 in fp16 on a T4", _of_model("SmolLM2-135M", 2), 0, T4_BANDWIDTH, T4_PEAK),
    ("SmolLM2 in fp32 on a CPU", _of_model("SmolLM2-135M", 4), 128, 20e9, 150e9),
    ("SmolLM2 in fp16 on a T4", _of_model("SmolLM2-135M", 2), 1000, T4_BANDWIDTH, T4_PEAK),
    ("Llama-3.2-1B in fp16 on a T4", _of_model("Llama-3.2-1B", 2), 200, T4_BANDWIDTH, T4_PEAK),
)


def _examine_point(function: Callable[..., Any]) -> None:
    for name, cost, context, bandwidth, peak in _POINTS:
        answer = function(context, cost, bandwidth, peak)
        call = f"turning_point({context}, cost, {bandwidth:g}, {peak:g}), where cost is: {name}"
        right = turning_point(context, cost, bandwidth, peak)
        expect(
            answer is None or (type(answer) is int and answer >= 1),
            "return a whole number of rows, at least 1, or None",
            f"{call}\nreturned {answer!r}",
        )
        if answer == right:
            continue
        if right is None:
            rule = "where each row moves longer than it computes, no batch is large enough: return None"
            shown = 1
        elif answer is None:
            rule, shown = "there is such a batch, and it must be found however large it is", right
        elif answer < right:
            rule, shown = "at so few rows the step still moves longer than it computes", answer
        else:
            rule, shown = "a smaller batch computes as long as it moves already", right
        to_move, to_compute = _seconds(cost, shown, context, bandwidth, peak)
        raise Wrong(
            rule,
            f"{call}\nreturned {answer!r}, and not {right!r}: with {shown} row{'s' * (shown > 1)} it takes "
            f"{to_move:.3g} s to move and {to_compute:.3g} s to compute",
        )


def _run_point(function: Callable[..., Any]) -> Run:
    cost = _of_model("SmolLM2-135M", 2)
    contexts = (0, 8, 16, 24, 32, 40, 48, 56, 64, 128)
    yours, package = (
        [one(context, cost, T4_BANDWIDTH, T4_PEAK) for context in contexts]
        for one in (function, turning_point)
    )
    expect(
        yours == package,
        "on the figures of a T4 it must find the same batches",
        f"tokens in the cache: {list(contexts)}\nreturned {yours}\nand not  {package}",
    )
    found = [context for context, rows in zip(contexts, yours, strict=True) if rows is not None]
    sentence = (
        "SmolLM2 in fp16, by the vendor's figures of a T4 (computed, not measured): decode takes as long to "
        f"compute as to move from {yours[0]} rows on if their caches are empty, and from "
        f"{yours[len(found) - 1]:,} rows on if each holds {found[-1]} tokens. With {contexts[len(found)]} "
        "tokens, no batch is large enough."
    )
    picture = notebook.lines(
        contexts,
        {"yours": yours, "the package's": package},
        "Rows from which on decode takes as long to compute as to move (T4, fp16)",
        x_name="tokens in the cache of each row",
        y_name="rows",
        digits=0,
        log="y",
    )
    return Run(sentence, [("Where there is no number, no batch is large enough:", picture)])


EXERCISES: tuple[Exercise, ...] = (
    Exercise("07.1", "bytes and operations of a step", step_cost, _examine_cost, _run_cost),
    Exercise("07.2", "when computing takes over", turning_point, _examine_point, _run_point),
)
