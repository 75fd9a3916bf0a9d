"""Exercises 07.1 and 07.2: plausible ways to count wrongly, each told its own mistake, and right ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from labkit.analysis.roofline import Shape
from labkit.core.attention import Span, reference_attention
from labkit.core.kv_cache import KVShape
from labkit.exercises.common import answers, prompt_of, tiny_model
from labkit.exercises.e07_blind import BLIND, answer_together
from labkit.exercises.e07_cost import shape_of, step_cost
from labkit.exercises.e07_turning_point import T4_BANDWIDTH, T4_PEAK, Cost, turning_point
from labkit.kernels.gathered_sdpa import SDPA
from labkit.trace.records import StepRecord
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

Rows = list[int]
Answer = tuple[float, float]

# -- 07.1 -----------------------------------------------------------------------------------------


def by_rows(new: Rows, old: Rows, shape: Shape, weight: int) -> Answer:
    """Row by row, with loops."""
    moved = (shape.layers * shape.layer_parameters + shape.vocab * shape.hidden) * weight
    computed = 0
    for n, k in zip(new, old, strict=True):
        computed += 2 * shape.vocab * shape.hidden
        for i in range(n):
            computed += 2 * shape.layers * shape.layer_parameters
            computed += shape.layers * shape.heads * 4 * shape.head_dim * (k + i + 1)
        moved += (n + k + n) * shape.layers * shape.kv_heads * shape.head_dim * 2 * shape.value_bytes
    return moved, computed


def package(new: Rows, old: Rows, shape: Shape, weight: int) -> Answer:
    """With norms, embeddings and scales."""
    record = StepRecord(0, starts=tuple(old), num_tokens=tuple(new), sampled=((1,),) * len(new))
    work = dataclasses.replace(shape, weight_bytes=weight).work(record)
    return work.bytes, work.operations


@pytest.mark.parametrize("right", [step_cost, by_rows, package])
def test_right_counts_are_accepted(right: Callable[..., Answer]) -> None:
    verdict = assert_accepted("07.1", right)
    assert "steps of a real trace" in verdict.text
    assert len(verdict.pictures) == 2
    assert "the package's" in verdict.pictures[0][1].twin


def test_the_solution_of_the_count() -> None:
    assert_accepted("07.1", function_from(solution("07", "07.1"), "step_cost"))


def test_the_package_counts_as_the_reference_does() -> None:
    for new, old in (([1], [0]), ([1, 1, 40], [100, 17, 0])):
        ours, theirs = step_cost(new, old, shape_of(), 4), package(new, old, shape_of(), 4)
        assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
        assert ours[1] == theirs[1]


def count(**mistake: Any) -> Callable[..., Answer]:
    """The right count with one mistake in it."""

    def wrong(new: Rows, old: Rows, shape: Shape, weight: int) -> Answer:
        it = dict(
            times=1, output=1, weight=weight, heads=shape.kv_heads, sides=2, value=shape.value_bytes,
            layers=shape.layers, tokens=lambda n, k: n + n + k, each=2, head=len(new),
            pairs=lambda n, k: n * k + n * (n + 1) // 2, queries=shape.heads, products=2,
        )  # fmt: skip
        it |= {key: value(new, old, shape, weight) for key, value in mistake.items()}
        rows = list(zip(new, old, strict=True))
        matrices = shape.layers * shape.layer_parameters + it["output"] * shape.vocab * shape.hidden
        token = it["layers"] * it["sides"] * it["heads"] * shape.head_dim * it["value"]
        moved = it["times"] * matrices * it["weight"] + token * sum(it["tokens"](n, k) for n, k in rows)
        products = shape.layers * shape.layer_parameters * sum(new) + it["head"] * shape.vocab * shape.hidden
        attention = sum(it["pairs"](n, k) for n, k in rows) * shape.layers * it["queries"] * shape.head_dim
        return moved, it["each"] * (products + it["products"] * attention)

    return wrong


def test_the_count_without_a_mistake_is_right() -> None:
    assert_accepted("07.1", count())


@pytest.mark.parametrize(
    "mistake, fragment",
    [
        (
            dict(times=lambda n, k, s, w: len(n)),
            "the weights are read once in a step, no matter how many rows",
        ),
        (dict(times=lambda n, k, s, w: sum(n)), "the weights are read once in a step, no matter how many"),
        (dict(output=lambda n, k, s, w: 0), "the output layer's vocab x hidden weights"),
        (dict(weight=lambda n, k, s, w: 4), "a weight takes `bytes_per_weight` bytes"),
        (dict(tokens=lambda n, k, s, w: lambda n, k: 0), "keys and values are read as well"),
        (dict(tokens=lambda n, k, s, w: lambda n, k: n), "keys and values are read as well"),
        (dict(tokens=lambda n, k, s, w: lambda n, k: n + k), "are written, and then read like all others"),
        (dict(sides=lambda n, k, s, w: 1), "a key and a value in each layer: two vectors"),
        (dict(heads=lambda n, k, s, w: s.heads), "several query heads share one"),
        (dict(value=lambda n, k, s, w: w), "takes `value_bytes`, whatever a weight takes"),
        (dict(layers=lambda n, k, s, w: 1), "keys and values are kept in every layer"),
        (dict(each=lambda n, k, s, w: 1), "a multiplication and an addition are two operations"),
        (dict(head=lambda n, k, s, w: sum(n)), "only the last token of a row goes through the output layer"),
        (dict(head=lambda n, k, s, w: 0), "the output layer computes one token of each row"),
        (dict(head=lambda n, k, s, w: 1), "the output layer computes one token of each row"),
        (dict(queries=lambda n, k, s, w: 0), "attention computes as well"),
        (dict(queries=lambda n, k, s, w: s.kv_heads), "every query head computes"),
        (dict(pairs=lambda n, k, s, w: lambda n, k: n * (n + k)), "not at later ones"),
        (dict(pairs=lambda n, k, s, w: lambda n, k: n * (n + 1) // 2), "looks at all tokens in the cache"),
        (dict(pairs=lambda n, k, s, w: lambda n, k: n * k), "the new ones before it, and at itself"),
        (dict(products=lambda n, k, s, w: 1), "attention makes two products"),
    ],
)
def test_wrong_counts_are_told_their_own_mistake(mistake: dict[str, Any], fragment: str) -> None:
    verdict = assert_refused("07.1", count(**mistake), fragment)
    assert "step_cost([" in verdict.text and "right: about" in verdict.text


def test_other_wrong_counts_are_told_what_is_off() -> None:
    assert_refused("07.1", lambda new, old, shape, weight: (1e8, 1e8), "the bytes of this step are wrong")
    assert_refused("07.1", lambda new, old, shape, weight: 5.0, "return two numbers")
    assert_refused("07.1", lambda *step: (step_cost(*step)[0] / 1e6, step_cost(*step)[1]), "not megabytes")
    assert_refused("07.1", lambda *step: (step_cost(*step)[0], step_cost(*step)[1] / 1e9), "not billions")
    assert_refused(
        "07.1",
        lambda new, old, shape, weight: step_cost(new, old, shape, weight)[::-1],
        "of this step are wrong",
    )


def test_the_stubs_are_open() -> None:
    def stub(*_: object) -> Any:
        raise NotImplementedError

    assert_open("07.1", stub)
    assert_open("07.2", stub)


# -- 07.2 -----------------------------------------------------------------------------------------


def by_doubling(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    rows = 1
    while rows < 10_000:
        moved, computed = cost([1] * rows, [context] * rows)
        if computed / peak >= moved / bandwidth:
            break
        rows *= 2
    else:
        return None
    while rows > 1:
        moved, computed = cost([1] * (rows - 1), [context] * (rows - 1))
        if computed / peak < moved / bandwidth:
            break
        rows -= 1
    return rows


def in_whole_steps(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    """By the slopes, without seconds."""
    (b1, f1), (b2, f2) = cost([1], [context]), cost([1, 1], [context] * 2)
    slope = (f2 - f1) * bandwidth - (b2 - b1) * peak
    missing = b1 * peak - f1 * bandwidth
    if missing <= 0:
        return 1
    return 1 + int(-(-missing // slope)) if slope > 0 else None


def test_right_points_are_accepted() -> None:
    for right in (turning_point, in_whole_steps):
        verdict = assert_accepted("07.2", right)
        assert "from 211 rows on if their caches are empty" in verdict.text
        assert "With 64 tokens, no batch is large enough" in verdict.text
        assert "computed, not measured" in verdict.text


def test_the_solution_of_the_point() -> None:
    assert_accepted("07.2", function_from(solution("07", "07.2"), "turning_point"))


def ridge(context: int, cost: Cost, bandwidth: float, peak: float) -> int:
    """Weights alone: as if no row had a cache."""
    return turning_point(0, cost, bandwidth, peak) or 1


def one_less(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    """The largest batch that is still bound by memory."""
    rows = turning_point(context, cost, bandwidth, peak)
    return rows if rows is None else max(1, rows - 1)


def one_more(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    rows = turning_point(context, cost, bandwidth, peak)
    return rows if rows is None else rows + 1


def never_below_two(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    (b1, f1), (b2, f2) = cost([1], [context]), cost([1, 1], [context] * 2)
    slope = (f2 - f1) / peak - (b2 - b1) / bandwidth
    return 1 + max(1, int(-(-(b1 / bandwidth - f1 / peak) // slope))) if slope > 0 else None


def swapped(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    return turning_point(context, cost, peak, bandwidth)


def gives_up(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    for rows in range(1, 1000):
        moved, computed = cost([1] * rows, [context] * rows)
        if computed / peak >= moved / bandwidth:
            return rows
    return None


def capped(context: int, cost: Cost, bandwidth: float, peak: float) -> int:
    return gives_up(context, cost, bandwidth, peak) or 1000


def with_a_fraction(context: int, cost: Cost, bandwidth: float, peak: float) -> float:
    moved, computed = cost([1], [context])
    return (moved / bandwidth) / (computed / peak)


@pytest.mark.parametrize(
    "wrong, fragment",
    [
        (ridge, "with so few rows, the step still takes longer to move than to compute"),
        (one_less, "with so few rows, the step still takes longer to move than to compute"),
        (one_more, "a smaller one already takes as long to compute as to move"),
        (never_below_two, "a smaller one already takes as long to compute as to move"),
        (swapped, "with so few rows, the step still takes longer to move than to compute"),
        (gives_up, "there is such a batch: find it, however large it is"),
        (capped, "no batch is large enough: return None"),
        (with_a_fraction, "return a whole number of rows, at least 1, or None"),
    ],
)
def test_wrong_points_are_refused_for_their_own_reason(wrong: Callable[..., Any], fragment: str) -> None:
    assert "turning_point(" in assert_refused("07.2", wrong, fragment).text


@pytest.mark.parametrize("context", [0, 1, 17, 50, 56, 57, 60, 500])
@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3.2-1B"])
def test_the_reference_is_the_smallest_by_trying(name: str, context: int) -> None:
    def cost(new: Rows, old: Rows) -> Answer:
        return step_cost(new, old, shape_of(name, value_bytes=2), 2)

    rows = turning_point(context, cost, T4_BANDWIDTH, T4_PEAK)
    if rows is None or rows > 10_000:
        assert by_doubling(context, cost, T4_BANDWIDTH, T4_PEAK) is None
    else:
        assert rows == by_doubling(context, cost, T4_BANDWIDTH, T4_PEAK)


# -- the engine that is fast and wrong ------------------------------------------------------------


def test_the_blind_engine_is_right_for_prompts_and_wrong_in_decode() -> None:
    prompts = [prompt_of(number, 20) for number in range(3)]
    sound, blind = (
        list(answers(answer_together(tiny_model(), prompts, 8, backend)).values())
        for backend in (SDPA, BLIND)
    )
    assert [answer[0] for answer in sound] == [answer[0] for answer in blind]
    assert all(a[1:] != b[1:] for a, b in zip(sound, blind, strict=True))


def test_it_is_attention_over_one_token() -> None:
    cache = KVShape(1, 2, 8, torch.float32, torch.device("cpu")).new_cache(6, 4)
    torch.manual_seed(0)
    cache.blocks.normal_()
    rows = [Span(6, 1, [3, 1]), Span(2, 1, [5])]
    q = torch.randn(2, 6, 8)
    (group,) = BLIND.decode(0, rows, cache, [None])
    alone = [cache.v[0, 1, 2], cache.v[0, 5, 2]]  # pages and places of the two tokens themselves
    expected = torch.stack([v.repeat_interleave(3, dim=0) for v in alone])
    assert torch.equal(group.attend(q, cache.layers[0], scale=1.0, window=None), expected)
    windowed = reference_attention(q, cache, 0, rows, scale=1.0, window=1)
    assert torch.allclose(windowed, expected, atol=1e-6)
