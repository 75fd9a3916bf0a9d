"""Exercise 11.1: plausible ways to choose a budget wrongly, and right ones; and the clock behind it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from labkit.analysis.capacity import Demand, Settings, draw_demands, replay
from labkit.analysis.client_measures import Slo
from labkit.exercises import e11
from labkit.exercises.e11 import BUDGETS, CLOCK, TICK, Measured, choose_budget, measured_at, serve
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

Rows = list[Measured]


def keeping(rows: Sequence[Measured], slo: Slo) -> Rows:
    return [row for row in rows if row.ttft <= slo.ttft and row.itl <= slo.itl]


# -- right ----------------------------------------------------------------------------------------


def loop(measured: Rows, slo: Slo) -> int | None:
    best = None
    for row in measured:
        if row.ttft > slo.ttft or row.itl > slo.itl:
            continue
        if best is None or row.tokens > best.tokens or (row.tokens == best.tokens and row < best):
            best = row
    return best.budget if best else None


def by_sorting(measured: Rows, slo: Slo) -> int | None:
    order = sorted(measured, key=lambda row: (-row.tokens, row.budget))
    return next((budget for budget, ttft, itl, _ in order if ttft <= slo.ttft and itl <= slo.itl), None)


@pytest.mark.parametrize("right", [loop, by_sorting])
def test_right_ones_are_accepted(right: Any) -> None:
    verdict = assert_accepted("11.1", right)
    assert "your rule chose a budget of 96 (reference 96)" in verdict.text
    assert [caption.partition(":")[0] for caption, _ in verdict.pictures] == [
        "At your budget",
        "At the one with most",
    ]


def test_the_solution_in_the_notebook_is_accepted() -> None:
    assert_accepted("11.1", function_from(solution("11", "11.1"), "choose_budget"))


def test_the_stub_is_open() -> None:
    def choose_budget(measured: Rows, slo: Slo) -> int | None:
        raise NotImplementedError

    assert_open("11.1", choose_budget)


# -- wrong ----------------------------------------------------------------------------------------


def most_tokens(measured: Rows, slo: Slo) -> int | None:
    """Ignore how much was promised, as long as some setting keeps it."""
    return choose_budget(measured, Slo(9e9, 9e9)) if keeping(measured, slo) else None


def forgets_itl(measured: Rows, slo: Slo) -> int | None:
    return choose_budget(measured, Slo(slo.ttft, 9e9))


def forgets_ttft(measured: Rows, slo: Slo) -> int | None:
    return choose_budget(measured, Slo(9e9, slo.itl))


def one_of_the_two(measured: Rows, slo: Slo) -> int | None:
    keep = [row for row in measured if row.ttft <= slo.ttft or row.itl <= slo.itl]
    return max(keep, key=lambda row: (row.tokens, -row.budget)).budget if keep else None


def strict(measured: Rows, slo: Slo) -> int | None:
    keep = [row for row in measured if row.ttft < slo.ttft and row.itl < slo.itl]
    return max(keep, key=lambda row: (row.tokens, -row.budget)).budget if keep else None


def largest(measured: Rows, slo: Slo) -> int | None:
    return max((row.budget for row in keeping(measured, slo)), default=None)


def smallest(measured: Rows, slo: Slo) -> int | None:
    return min((row.budget for row in keeping(measured, slo)), default=None)


def first_that_keeps(measured: Rows, slo: Slo) -> int | None:
    return next((row.budget for row in keeping(measured, slo)), None)


def larger_of_two(measured: Rows, slo: Slo) -> int | None:
    keep = keeping(measured, slo)
    return max(keep, key=lambda row: (row.tokens, row.budget)).budget if keep else None


def least_bad(measured: Rows, slo: Slo) -> int | None:
    late = lambda row: max(row.ttft / slo.ttft, row.itl / slo.itl)  # noqa: E731
    right = choose_budget(measured, slo)
    return right or (min(measured, key=late).budget if measured else None)


def zero_for_none(measured: Rows, slo: Slo) -> int:
    return choose_budget(measured, slo) or 0


def whole_row(measured: Rows, slo: Slo) -> Measured | None:
    keep = keeping(measured, slo)
    return max(keep, key=lambda row: (row.tokens, -row.budget)) if keep else None


def trades(measured: Rows, slo: Slo) -> int | None:
    """A little late is all right where there is time to spare elsewhere."""
    keep = [row for row in measured if row.ttft / slo.ttft + row.itl / slo.itl <= 2]
    return max(keep, key=lambda row: (row.tokens, -row.budget)).budget if keep else None


def none_if_any_breaks(measured: Rows, slo: Slo) -> int | None:
    return choose_budget(measured, slo) if len(keeping(measured, slo)) == len(measured) else None


@pytest.mark.parametrize(
    "wrong, fragment",
    [
        (most_tokens, "ITL must keep its objective"),
        (forgets_itl, "ITL must keep its objective"),
        (forgets_ttft, "TTFT must keep its objective"),
        (one_of_the_two, "ITL must keep its objective"),
        (strict, "a time that equals its objective keeps it"),
        (largest, "take the one with most tokens/s"),
        (smallest, "take the one with most tokens/s"),
        (first_that_keeps, "take the one with most tokens/s"),
        (larger_of_two, "take the smaller one"),
        (least_bad, "if no budget keeps both objectives, return None"),
        (zero_for_none, "return the number of one of the measured budgets, not its row, or None"),
        (whole_row, "return the number of one of the measured budgets, not its row, or None"),
        (trades, "TTFT must keep its objective"),
        (none_if_any_breaks, "return None only if no budget keeps both"),
    ],
)
def test_wrong_ones_are_refused_for_their_own_reason(wrong: Any, fragment: str) -> None:
    verdict = assert_refused("11.1", wrong, fragment)
    assert "choose_budget returned" in verdict.text and "Slo(ttft=" in verdict.text


# -- the clock ------------------------------------------------------------------------------------

SETTINGS = Settings(4096, 16, e11.SEATS, 64, enable_prefix_caching=False)


def load(count: int, rate: float) -> list[Demand]:
    """Demands that come at whole ticks."""
    drawn = draw_demands(count, rate=rate, prompt_tokens=(4, 90), answer_tokens=(2, 20), seed=3)
    return [Demand(round(one.at / TICK) * TICK, one.prompt, one.answer) for one in drawn]


def test_an_open_loop_gives_what_the_replay_gives() -> None:
    demands = load(60, 12)
    measures, theirs = serve(demands).measures, replay(demands, CLOCK, SETTINGS)
    assert [m.at for m in measures] == [demand.at for demand in demands]
    assert [m.ttft for m in measures] == theirs.ttft.tolist()
    assert [m.end for m in measures] == theirs.finish.tolist()
    assert [len(m.times) for m in measures] == [demand.answer for demand in demands]


@pytest.mark.parametrize("clients", [None, 1, 5])
def test_littles_law_holds_to_the_last_bit(clients: int | None) -> None:
    served = serve(load(40, 30), clients=clients)
    assert sum(served.in_system) * TICK == sum(measure.e2e for measure in served.measures)
    assert max(served.in_system) > 16 if clients is None else max(served.in_system) == clients


def test_one_client_asks_again_when_it_has_its_answer() -> None:
    measures = serve(load(8, 100), clients=1).measures
    assert all(after.at == before.end for before, after in pairwise(measures))
    assert all(m.ttft <= 2 * CLOCK.step + 90 * TICK for m in measures)  # never behind another


def test_a_load_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="clients"):
        serve(load(2, 1), clients=0)
    with pytest.raises(ValueError, match="demands is empty"):
        serve([])


def test_the_budget_trades_one_wait_for_the_other() -> None:
    small, middle, large = (measured_at(budget) for budget in (BUDGETS[0], 96, BUDGETS[-1]))
    assert small.itl < middle.itl < large.itl
    assert small.ttft > middle.ttft > large.ttft
    assert small.tokens < middle.tokens < large.tokens
