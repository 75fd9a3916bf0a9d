"""Exercise 07.1: count the bytes that a step moves and the operations that it computes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from labkit import notebook
from labkit.analysis.roofline import Shape, Work
from labkit.analysis.shapes import config_of
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import inject, real, tiny_engine
from labkit.trace.records import StepRecord

_TOLERANCE = 0.01  # an answer may count norms, embeddings and scales or leave them out: they are less
_JOBS = ((30, 12), (80, 7), (12, 20), (150, 9), (45, 16), (20, 5))  # prompt and answer tokens


def shape_of(name: str = "SmolLM2-135M", *, value_bytes: int = 4) -> Shape:
    """The sizes of a well-known model, without its weights.

    Raises:
        ValueError: the name is unknown.
    """
    config = config_of(name)
    return Shape.of_config(
        config, ((None, config.num_hidden_layers),), weight_bytes=value_bytes, value_bytes=value_bytes
    )


def step_cost(
    num_tokens: list[int], kv_tokens: list[int], shape: Shape, bytes_per_weight: int
) -> tuple[float, float]:
    """The bytes that a step moves and the operations that it computes, if each row samples a token.

    Args:
        num_tokens: number of tokens that each row computes.
        kv_tokens: number of tokens that each row had in the cache before.
        shape: sizes of the model.
        bytes_per_weight: 4 in fp32, 2 in half precision, 1 in 8 bits.

    Returns:
        Bytes and operations; a multiplication and an addition are two operations.
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
    """Bytes of a step. The switches make the mistakes that `_suspects` knows."""
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
    """Operations of a step. The switches make the mistakes that `_suspects` knows."""
    rows = list(zip(num_tokens, kv_tokens, strict=True))
    if pairs is None:
        pairs = sum(new * old + new * (new + 1) // 2 for new, old in rows)
    products = shape.layers * shape.layer_parameters * sum(num_tokens)
    products += shape.vocab * shape.hidden * (len(rows) if sampled is None else sampled)
    attention = 2 * shape.layers * (shape.heads if heads is None else heads) * shape.head_dim * pairs
    return each * (products + attention)


# A model in which attention weighs as much as its weights do, and whose heads are wider than its hidden size.
_MADE_UP = "a made-up model"


@dataclasses.dataclass(frozen=True)
class _Step:
    """A case: a step, a model, and the bytes of a weight and of a number in the cache."""

    num_tokens: list[int]
    kv_tokens: list[int]
    model: str
    weight: int
    value: int

    @property
    def shape(self) -> Shape:
        if self.model == _MADE_UP:
            return dataclasses.replace(
                shape_of("SmolLM2-135M", value_bytes=self.value),
                hidden=24,
                vocab=5,
                heads=6,
                kv_heads=2,
                head_dim=20,
                matrices=((24, 4),),
                vectors=0,
                windows=((None, 3),),
            )
        return shape_of(self.model, value_bytes=self.value)

    @property
    def package(self) -> Work:
        """The count of labkit's own roofline."""
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
    _Step([500], [1500], "SmolLM2-135M", 4, 4),  # shows more mistakes than the two that follow
    _Step([1], [4000], "SmolLM2-135M", 4, 4),
    _Step([2000], [0], "SmolLM2-135M", 4, 4),
    _Step([1] * 16, [1000] * 16, "SmolLM2-135M", 2, 2),
    _Step([1] * 16, [1000] * 16, "SmolLM2-135M", 1, 4),
    _Step([1, 300, 1], [700, 100, 2000], "Llama-3.2-1B", 2, 2),
    _Step([1], [0], _MADE_UP, 4, 4),
    _Step([3, 1, 2], [5, 0, 7], _MADE_UP, 1, 2),
    _Step([2, 9], [0, 1], _MADE_UP, 2, 4),
)


def _package(num_tokens: Sequence[int], kv_tokens: Sequence[int], shape: Shape, weight: int) -> Work:
    sampled = tuple([(0,)] * len(num_tokens))
    record = StepRecord(0, starts=tuple(kv_tokens), num_tokens=tuple(num_tokens), sampled=sampled)
    return dataclasses.replace(shape, weight_bytes=weight).work(record)


def _suspects(step: _Step) -> Iterator[tuple[str, str, float]]:
    """Plausible mistakes: of bytes or operations, the rule that each breaks, and the number it gives here."""
    new, old, shape = step.num_tokens, step.kv_tokens, step.shape
    moved = functools.partial(_moved, new, old, shape, step.weight)
    weights = moved(read=False, written=False)
    once = "the weights are read once in a step, no matter how many"
    cached = "keys and values are read as well: those of all tokens that a row looks at"
    written = "the keys and values of the new tokens are written, and then read like all others"
    for rule, number in (
        (f"{once} rows it has", moved(times=len(new))),
        (f"{once} tokens it computes", moved(times=sum(new))),
        ("the output layer's vocab x hidden weights are read as well", moved(output=False)),
        ("a weight takes `bytes_per_weight` bytes", _moved(new, old, shape, shape.value_bytes)),
        ("a weight takes `bytes_per_weight` bytes", _moved(new, old, shape, 4)),
        (cached, weights),
        (written, moved(written=False)),
        (written, moved(new=False)),
        (cached, moved(read=False)),
        (
            "each token has a key and a value in each layer: two vectors for each of `kv_heads`",
            moved(sides=1),
        ),
        ("keys and values have `kv_heads` heads: several query heads share one", moved(heads=shape.heads)),
        (
            "a number of a key or a value takes `value_bytes`, whatever a weight takes",
            moved(value=step.weight),
        ),
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
        ("every query head computes, even where several share a key", computed(heads=shape.kv_heads)),
        (
            "attention makes two products: the scores, and the sum of the values",
            (computed() + computed(heads=0)) / 2,
        ),
        ("return operations, not billions of operations", computed() / 1e9),
    ):
        yield "operations", rule, number


def _examine(function: Callable[..., Any]) -> None:
    for step in _STEPS:
        new, old = step.lists
        given = list(new), list(old)
        answer = function(*given, step.shape, step.weight)
        expect(given == (new, old), "leave the two lists as they are: work on copies", step.call)
        numbers = _two(answer)
        if numbers is None:
            raise Wrong("return two numbers: bytes, and operations", f"{step.call} returned {answer!r}")
        right = dict(zip(("bytes", "operations"), step_cost(new, old, step.shape, step.weight), strict=True))
        package = {"bytes": step.package.bytes, "operations": step.package.operations}
        for (kind, mine), theirs in zip(right.items(), numbers, strict=True):
            both = mine, package[kind]
            # In the made-up model, what may be left out weighs as much as a mistake.
            near = any(_near(theirs, one) for one in both) if step.model == _MADE_UP else _near(theirs, *both)
            if not near:
                rule = _diagnosis(step, kind, theirs) or f"the {kind} of this step are wrong"
                raise Wrong(rule, _explained(step, kind, theirs, mine))


def _two(answer: Any) -> list[float] | None:
    """A learner's answer as two finite numbers, if it is that."""
    if isinstance(answer, str | dict | set):
        return None
    try:
        numbers = [real(number) for number in answer]
    except TypeError:
        return None
    return numbers if len(numbers) == 2 and all(x is not None and math.isfinite(x) for x in numbers) else None


def _near(value: float, *targets: float) -> bool:
    return min(targets) * (1 - _TOLERANCE) <= value <= max(targets) * (1 + _TOLERANCE)


def _diagnosis(step: _Step, kind: str, value: float) -> str:
    """The rule that is broken by a mistake that gives this number; empty if there is none."""
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
    got = f"{step.call}\nyours: {value / size:,.2f} {unit}"
    return f"{got}\nright: about {right / size:,.2f} {unit} ({of})"


@functools.cache
def _trace() -> tuple[StepRecord, ...]:
    """Steps of the engine. Each of their rows samples a token: no prompt is cut into chunks."""
    engine = tiny_engine(
        num_blocks=64, max_num_seqs=4, max_num_batched_tokens=512, enable_prefix_caching=False
    )
    for prompt_tokens, answer_tokens in _JOBS:
        inject(engine, prompt_tokens, answer_tokens)
    return tuple(engine.run())


def _run(function: Callable[..., Any]) -> Run:
    shape, records = shape_of(), _trace()
    yours = [_two(function(list(r.num_tokens), list(r.starts), shape, 4)) or (0.0, 0.0) for r in records]
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


COST = Exercise("07.1", "bytes and operations of a step", step_cost, _examine, _run)
