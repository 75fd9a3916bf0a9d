"""Exercises of notebook 08: what is refused and why, what is accepted, and what the engine does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from labkit.core.attention import Span, attend, build_metadata, reference_attention
from labkit.core.kv_cache import KVShape
from labkit.exercises import judge
from labkit.exercises.e08_engine import backend_of, bytes_moved, run_engine
from labkit.exercises.e08_merge import State, merge, state_of
from labkit.exercises.e08_paged import LargestTensor, paged_attention
from tests.exercising import (
    assert_accepted,
    assert_open,
    assert_refused,
    function_from,
    notebook,
    solution,
)


def weighed(one: State, other: State) -> tuple[Tensor, Tensor, Tensor]:
    """The right maximum and factors, for answers that go wrong elsewhere."""
    m = torch.maximum(one[0], other[0])
    finite = m.clamp(min=-1e30)
    return m, torch.exp(one[0] - finite), torch.exp(other[0] - finite)


# -- 08.1, wrong -----------------------------------------------------------------------------------


def without_factors(one: State, other: State) -> Any:
    return torch.maximum(one[0], other[0]), one[1] + other[1], one[2] + other[2]


def only_the_first_is_brought_down(one: State, other: State) -> Any:
    m, w, _ = weighed(one, other)
    return m, one[1] * w + other[1], one[2] * w + other[2]


def a_is_forgotten(one: State, other: State) -> Any:
    m, w1, w2 = weighed(one, other)
    return m, one[1] * w1 + other[1] * w2, one[2] + other[2]


def first_maximum_stays(one: State, other: State) -> Any:
    w = torch.exp(other[0] - one[0])
    return one[0], one[1] + other[1] * w, one[2] + other[2] * w


def no_maximum_at_all(one: State, other: State) -> Any:
    m = torch.maximum(one[0], other[0])
    w1, w2 = torch.exp(one[0]), torch.exp(other[0])
    down = torch.exp(-m)
    return m, (one[1] * w1 + other[1] * w2) * down, (one[2] * w1 + other[2] * w2) * down


def infinity_less_infinity(one: State, other: State) -> Any:
    m = torch.maximum(one[0], other[0])
    w1, w2 = torch.exp(one[0] - m), torch.exp(other[0] - m)
    return m, one[1] * w1 + other[1] * w2, one[2] * w1 + other[2] * w2


def one_maximum_for_all_heads(one: State, other: State) -> Any:
    m = torch.maximum(one[0], other[0]).max().expand_as(one[0])
    w1, w2 = torch.exp(one[0] - m), torch.exp(other[0] - m)
    return m, one[1] * w1 + other[1] * w2, one[2] * w1 + other[2] * w2


def empty_only_if_all_heads_are(one: State, other: State) -> Any:
    if torch.isinf(one[0]).all():
        return tuple(part.clone() for part in other)
    if torch.isinf(other[0]).all():
        return tuple(part.clone() for part in one)
    return infinity_less_infinity(one, other)


def mean_of_the_answers(one: State, other: State) -> Any:
    m, w1, w2 = weighed(one, other)
    l = one[1] * w1 + other[1] * w2  # noqa: E741
    return m, l, (one[2] * w1 + other[2] * w2) / l


def in_place(one: State, other: State) -> Any:
    m, w1, w2 = weighed(one, other)
    return m, one[1].mul_(w1).add_(other[1] * w2), one[2].mul_(w1).add_(other[2] * w2)


def answer_alone(one: State, other: State) -> Any:
    return merge(one, other)[2]


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (without_factors, "l must be brought to the new maximum"),
        (only_the_first_is_brought_down, "l must be brought to the new maximum"),
        (a_is_forgotten, "a must be brought to the new maximum"),
        (first_maximum_stays, "for each head, m of two sets together is the larger"),
        (no_maximum_at_all, "nothing may overflow"),
        (infinity_less_infinity, "-inf less -inf is no number"),
        (one_maximum_for_all_heads, "each head has a maximum of its own"),
        (empty_only_if_all_heads_are, "may have seen nothing while another has"),
        (mean_of_the_answers, "l and a add up as they are; a must be brought"),
        (in_place, "make new tensors"),
        (answer_alone, "return three tensors"),
    ],
)
def test_wrong_ways_to_merge_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("08.1", function, rule)


# -- 08.1, right -----------------------------------------------------------------------------------


def by_where(one: State, other: State) -> Any:
    m = torch.where(one[0] > other[0], one[0], other[0])
    finite = torch.where(torch.isinf(m), torch.zeros_like(m), m)
    w1, w2 = (finite - one[0]).neg().exp(), (finite - other[0]).neg().exp()
    return [m, one[1] * w1 + other[1] * w2, one[2] * w1 + other[2] * w2]


def by_logarithms(one: State, other: State) -> Any:
    """What a split of Flash-Decoding hands over: a / l, and log(l) + m."""
    m = torch.maximum(one[0], other[0])
    finite = torch.nan_to_num(m, neginf=0.0)
    l = one[1] * (one[0] - finite).exp() + other[1] * (other[0] - finite).exp()  # noqa: E741
    parts = []
    for state in (one, other):
        mean = state[2] / state[1].clamp(min=1e-300 if m.dtype == torch.float64 else 1e-30)
        parts.append(mean * torch.exp(state[1].log() + state[0] - finite))
    return m, l, parts[0] + parts[1]


@pytest.mark.parametrize("function", [merge, by_where, by_logarithms])
def test_right_ways_to_merge_run_in_the_engine(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("08.1", function)
    assert "64 tokens" in verdict.text and "the same tokens as with its own attention" in verdict.text
    (_, timeline), (_, inside) = verdict.pictures
    assert "a        █" in repr(timeline)
    assert "pages seen" in repr(inside)


# -- 08.2, wrong -----------------------------------------------------------------------------------


def attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (q @ keys.T).softmax(-1) @ values


def streamed(
    q: Tensor, read: Any, table: Any, length: int, size: int, pages: int, cut: bool = True
) -> Tensor:
    state = state_of(q[:, :0], q.new_zeros(0, q.shape[1]))
    for i in range(pages):
        keys, values = read(table[i])
        used = min(size, length - i * size) if cut else size
        state = merge(state, state_of(q @ keys[:used].T, values[:used]))
    return state[2] / state[1]


def gathers(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    keys = values = q[:0]
    for i in range(-(-length // size)):
        page = read(table[i])
        keys, values = torch.cat((keys, page[0])), torch.cat((values, page[1]))
    return attended(q, keys[:length], values[:length])


def keeps_what_was_lent(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    pages = [read(block) for block in table[: -(-length // size)]]
    keys, values = (torch.cat(parts)[:length] for parts in zip(*pages, strict=True))
    return attended(q, keys, values)


def reads_behind_the_end(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    return streamed(q, read, table, length, size, -(-length // size), cut=False)


def masks_scores_only(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    state = state_of(q[:, :0], q.new_zeros(0, q.shape[1]))
    for i in range(-(-length // size)):
        keys, values = read(table[i])
        scores = q @ keys.T
        scores[:, max(0, length - i * size) :] = -torch.inf
        state = merge(state, state_of(scores, values))
    return state[2] / state[1]


def reads_the_whole_table(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    return streamed(q, read, table, length, size, len(table))


def one_page_too_few(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    return streamed(q, read, table, length, size, max(1, length // size))


def one_page_too_many(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    return streamed(q, read, table, length, size, length // size + 1)


def reads_twice(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    pages = range(-(-length // size))
    tops = [(q @ read(table[i])[0][: length - i * size].T).amax(1, keepdim=True) for i in pages]
    m = torch.stack(tops).amax(0)
    l, a = 0, 0  # noqa: E741
    for i in pages:
        keys, values = read(table[i])
        weights = torch.exp(q @ keys[: length - i * size].T - m)
        l = l + weights.sum(1, keepdim=True)  # noqa: E741
        a = a + weights @ values[: length - i * size]
    return a / l


def keeps_all_scores(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    state = state_of(q[:, :0], q.new_zeros(0, q.shape[1]))
    scores = torch.zeros(len(q), 0)
    for i in range(-(-length // size)):
        keys, values = (x[: length - i * size] for x in read(table[i]))
        scores = torch.cat((scores, q @ keys.T), 1)
        state = merge(state, state_of(scores[:, i * size :], values))
    return state[2] / state[1]


def no_maximum(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    l, a = 0, 0  # noqa: E741
    for i in range(-(-length // size)):
        keys, values = (x[: length - i * size] for x in read(table[i]))
        weights = torch.exp(q @ keys.T)
        l, a = l + weights.sum(1, keepdim=True), a + weights @ values  # noqa: E741
    return a / l


def mean_of_pages(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    total, pages = torch.zeros_like(q), -(-length // size)
    for i in range(pages):
        keys, values = (x[: length - i * size] for x in read(table[i]))
        total = total + attended(q, keys, values)
    return total / pages


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (gathers, "no tensor may grow with the length"),
        (keeps_all_scores, "no tensor may grow with the length"),
        (keeps_what_was_lent, "the next `read` overwrites what was lent"),
        (reads_behind_the_end, "behind the last token of the request a page may hold anything"),
        (masks_scores_only, "behind the last token of the request a page may hold anything"),
        (reads_the_whole_table, "read only the pages that hold tokens of this request"),
        (one_page_too_many, "read only the pages that hold tokens of this request"),
        (one_page_too_few, "the result must be softmax"),
        (reads_twice, "read each page once"),
        (no_maximum, "nothing may overflow"),
        (mean_of_pages, "the result must be softmax"),
        (lambda q, read, table, length, size: None, "return the weighted mean of the values"),
    ],
)
def test_wrong_ways_over_pages_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("08.2", function, rule)


# -- 08.2, right -----------------------------------------------------------------------------------


def backwards_token_by_token(q: Tensor, read: Any, table: Any, length: int, size: int) -> Tensor:
    m = torch.full((len(q), 1), -1e30)
    l, a = torch.zeros(len(q), 1), torch.zeros_like(q)  # noqa: E741
    for i in reversed(range(-(-length // size))):
        keys, values = read(table[i])
        for key, value in list(zip(keys, values, strict=True))[: length - i * size]:
            score = (q @ key)[:, None]
            new = torch.maximum(m, score)
            old, p = torch.exp(m - new), torch.exp(score - new)
            m, l, a = new, l * old + p, a * old + p * value  # noqa: E741
    return a / l


@pytest.mark.parametrize("function", [paged_attention, backwards_token_by_token])
def test_right_ways_over_pages_run_in_the_engine(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("08.2", function)
    assert "the same as its own" in verdict.text and "times the bytes" in verdict.text
    assert "in place, yours" in repr(verdict.pictures[0][1])


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [("08.1", "merge"), ("08.2", "paged_attention")])
def test_the_folded_solution_is_right(number: str, name: str) -> None:
    assert_accepted(number, function_from(solution("08", number), name))


def test_an_untouched_stub_is_open() -> None:
    def merge(one: Any, other: Any) -> Any:
        raise NotImplementedError

    def paged_attention(q: Any, read: Any, table: Any, length: int, size: int) -> Any:
        raise NotImplementedError

    assert_open("08.1", merge)
    assert_open("08.2", paged_attention)


def test_what_a_message_shows_is_the_smallest_case() -> None:
    text = judge("08.1", without_factors).text
    assert "merge((m = 0, l = 1, a = [-2, 1.5])" in text
    assert "right: (m = 1, l = 1.368, " in text


# -- what the notebook stands on -------------------------------------------------------------------


def test_states_know_what_they_have_not_seen() -> None:
    for scores in (torch.zeros(2, 0), torch.full((2, 3), -torch.inf)):
        m, l, a = state_of(scores, torch.ones(scores.shape[1], 4))  # noqa: E741
        assert torch.isinf(m).all() and not l.any() and not a.any() and a.shape == (2, 4)


def test_rows_of_a_learner_equal_the_reference() -> None:
    torch.manual_seed(0)
    rows = [Span(20, 1, [4, 0, 7]), Span(7, 1, [5]), Span(2, 6, [3])]
    cache = KVShape(1, 2, 16, torch.float32, torch.device("cpu")).new_cache(8, 8)
    cache.blocks.normal_()
    q = torch.randn(8, 6, 16)
    layout = build_metadata(rows, cache, backend=backend_of(paged_attention))
    out = attend(q, cache, 0, layout, scale=0.3)
    plain = reference_attention(q, cache, 0, rows, scale=0.3)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_rows_of_a_learner_know_no_window() -> None:
    cache = KVShape(1, 1, 4, torch.float32, torch.device("cpu")).new_cache(2, 8)
    layout = build_metadata([Span(3, 1, [0])], cache, windows=[5], backend=backend_of(paged_attention))
    with pytest.raises(ValueError, match="no sliding window"):
        attend(torch.ones(1, 1, 4), cache, 0, layout, scale=1.0, window=5)


def test_bytes_are_counted_as_they_move() -> None:
    cache = KVShape(3, 2, 16, torch.float32, torch.device("cpu")).new_cache(40, 8)
    page = 2 * 2 * 8 * 16 * 4
    assert bytes_moved([Span(79, 1, range(10))], cache) == (3 * 10 * page, 10 * page)
    rows = [Span(79, 1, range(10)), Span(7, 1, [11])]  # the short row is as wide as the long one
    assert bytes_moved(rows, cache) == (3 * 20 * page, 11 * page)


def test_the_largest_tensor_is_seen() -> None:
    with LargestTensor() as largest:
        a, b = torch.ones(4, 3), torch.ones(3, 10)
        (a @ b).sum().item()
    assert largest.numbers == 40
    torch.ones(100)
    assert largest.numbers == 40


def test_the_engine_writes_the_same_tokens_each_time() -> None:
    assert run_engine()[1] == run_engine(backend_of(paged_attention))[1]


@pytest.mark.parametrize(
    ("differences", "sound"),
    [
        ({"1": 6e-7, "4": 6e-7}, True),
        ({}, False),
        ({"1": 6e-7}, False),
        ({"1": 6e-7, "4": 0.1}, False),
        ({"1": torch.nan, "4": 0.0}, False),
    ],
)
def test_the_notebook_vouches_for_the_kernel_only_if_it_ran(
    differences: dict[str, float], sound: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (cell,) = (cell for cell in notebook("08").cells if "the kernel ran with" in cell.source)
    exec(cell.source, {"differences": differences})
    assert capsys.readouterr().out.strip().endswith(str(sound))
