"""Exercise 11.1: doors that refuse the wrong people, and right ones; and the clock behind it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.analysis.capacity import Demand, Settings, draw_demands, replay
from labkit.analysis.client_measures import summary
from labkit.exercises import e11
from labkit.exercises.e11 import CLOCK, SLO, TICK, retry_after, rush, serve
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- right ----------------------------------------------------------------------------------------


def test_the_solution_in_the_notebook_is_accepted_and_stands_at_the_door() -> None:
    verdict = assert_accepted("11.1", function_from(solution("11", "11.1"), "retry_after"))
    assert "7.4 a second were served within the SLO (reference 7.4), and without a door 1.1" in verdict.text
    assert verdict.score in verdict.text and len(verdict.pictures) == 2


def test_the_stub_is_open() -> None:
    def retry_after(waiting: int, free_seats: int, finished: list[float], now: float, promise: float) -> int:
        raise NotImplementedError

    assert_open("11.1", retry_after)


@given(
    sizes=st.tuples(st.integers(0, 60), st.integers(0, 20)),
    ends=st.lists(st.integers(0, 9 * 1024).map(lambda ticks: ticks * TICK)),
    promise=st.integers(0, 40).map(lambda eighths: eighths / 8),
)
def test_who_comes_again_after_so_long_finds_the_promise_kept(
    sizes: tuple[int, int], ends: list[float], promise: float
) -> None:
    """The queue empties at the rate that was told, and nobody joins it meanwhile."""
    (waiting, free), now = sizes, 9.0
    seconds = retry_after(waiting, free, sorted(ends), now, promise)
    rate = sum(end > now - 4 for end in ends) / 4
    left = max(0.0, waiting - free - rate * seconds)
    if rate:
        assert left / rate <= promise + 1e-9
        assert not seconds or (waiting - free - rate * (seconds - 1)) / rate > promise - 1e-9
    else:
        assert seconds == (waiting > free)


# -- wrong: each for its own reason ---------------------------------------------------------------


def everybody(*situation: Any) -> int:
    return 0


def seats_forgotten(waiting: int, free: int, finished: list[float], now: float, promise: float) -> int:
    return retry_after(waiting, 0, finished, now, promise)


def all_ends(waiting: int, free: int, finished: list[float], now: float, promise: float) -> int:
    return retry_after(waiting, free, [now] * len(finished), now, promise)


def late(waiting: int, free: int, finished: list[float], now: float, promise: float) -> float:
    """By how much the wait is longer than the promise."""
    rate = sum(time > now - 4 for time in finished) / 4
    return max(0, waiting - free) / rate - promise if rate else 1


def strictly(*situation: Any) -> int:
    return 1 if situation[0] > situation[1] and late(*situation) == 0 else retry_after(*situation)


def rounded_down(*situation: Any) -> int:
    return max(1, math.floor(late(*situation))) if retry_after(*situation) else 0


def open_without_a_rate(waiting: int, free: int, finished: list[float], now: float, promise: float) -> int:
    return retry_after(waiting, free, finished, now, promise) if any(t > now - 4 for t in finished) else 0


def a_truth(*situation: Any) -> str:
    return "no"


def pops(waiting: int, free: int, finished: list[float], now: float, promise: float) -> int:
    seconds = retry_after(waiting, free, finished, now, promise)
    del finished[:1]
    return seconds


@pytest.mark.parametrize(
    ("wrong", "fragment"),
    [
        (everybody, "a queue of `ahead` requests that leaves at `rate` a second"),
        (seats_forgotten, "those in the queue who find a free seat"),
        (all_ends, "the rate counts those who ended within the last 4 seconds"),
        (strictly, "a wait that equals the promise keeps it"),
        (rounded_down, "rounded up"),
        (open_without_a_rate, "there is no rate"),
        (a_truth, "return a whole number of seconds"),
        (pops, "leave the list of times as it is"),
    ],
)
def test_wrong_ones_are_refused_for_their_own_reason(wrong: Any, fragment: str) -> None:
    verdict = assert_refused("11.1", wrong, fragment)
    assert "waiting " in verdict.text and "promise " in verdict.text


# -- at the door ----------------------------------------------------------------------------------


def test_a_door_keeps_the_promise_to_those_it_lets_in() -> None:
    without, through = rush(14), rush(14, retry_after)
    good = [summary(run.measures, slo=SLO).good or 0 for run in (without, through)]
    assert without.refused == 0 and len(through.measures) + through.refused == 240
    assert good[1] > 5 * good[0]
    longest = max(measure.ttft for measure in through.measures)
    assert longest < max(measure.ttft for measure in without.measures) / 5


def test_a_door_that_is_never_needed_refuses_nobody() -> None:
    assert rush(2, retry_after).refused == 0
    assert rush(2, retry_after).measures == rush(2).measures


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
