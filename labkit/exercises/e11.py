"""The exercise of notebook 11: choose the token budget that keeps the objectives.

The runs that the notebook measures are here as well: the real scheduler and block pool, with a made-up clock.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from labkit.analysis.capacity import Clock, Demand, FittedClock, Replica, Settings, draw_demands
from labkit.analysis.client_measures import Measure, Slo, summary
from labkit.core.request import Request
from labkit.exercises import Exercise, Run, expect
from labkit.exercises.common import rails, whole
from labkit.sampling_params import SamplingParams, check_number
from labkit.trace.trace import Trace

TICK = 1 / 1024
"""Seconds. All times of a run are whole multiples of it, so that no sum of them is ever rounded."""
CLOCK = FittedClock(step=16 * TICK, tokens=TICK)
"""A step takes 16 ticks, and one more for each token that it computes."""
SEATS = 16
_PAGES, _PAGE = 4096, 16  # enough for the longest request in every seat: nobody is preempted


# -- load, on a clock -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What became of a load.

    Attributes:
        measures: what each client saw, in the order of their requests.
        in_system: number of requests that waited or ran at each tick.
        trace: the trace of all steps.
    """

    measures: list[Measure]
    in_system: list[int]
    trace: Trace


def serve(
    demands: Iterable[Demand],
    *,
    clients: int | None = None,
    budget: int = 64,
    seats: int = SEATS,
    clock: Clock = CLOCK,
) -> Served:
    """Send requests to the real scheduler and block pool, on a clock that ticks.

    Args:
        demands: the requests, at least one.
        clients: number of clients that send the next request as soon as they have their answer and ignore
            its time (closed loop); None sends each request at its time (open loop).
        budget: most tokens that a step computes.
        seats: most requests that run at once.
        clock: seconds that a step takes, in whole ticks.

    Raises:
        ValueError: there are no demands or no clients, or the pool could never hold a demand.
    """
    if clients is not None:
        check_number("clients", clients, 1, 100_000, whole=True)
    todo = deque(sorted(demands, key=lambda demand: demand.at))
    settings = Settings(_PAGES, _PAGE, seats, budget, enable_prefix_caching=False)
    replica = Replica(settings, clock, trace=True)
    measures: list[Measure] = []
    in_system: list[int] = []
    now = 0.0
    while todo or replica.num_unfinished:
        while todo and (todo[0].at <= now if clients is None else replica.num_unfinished < clients):
            demand = todo.popleft()
            params = SamplingParams(max_tokens=demand.answer)
            replica.add(Request(str(len(measures)), [0] * demand.prompt, params), now)
            measures.append(Measure(now, demand.answer, sent=now, tokens=demand.answer, counted=True))
        in_system.append(replica.num_unfinished)
        now += TICK
        replica.advance(now)
    trace = replica.trace
    if trace is None or not measures:
        raise ValueError("demands is empty: it must hold at least one")
    for record in trace:
        for name, sampled in zip(record.requests, record.sampled, strict=True):
            measures[int(name)].times += [record.time] * len(sampled)
    for measure in measures:
        measure.end = measure.times[-1]
    return Served(measures, in_system, trace)


# -- 11.1 -----------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What was measured at one token budget.

    Attributes:
        budget: most tokens that a step computes.
        ttft: 95th percentile of the seconds to the first token.
        itl: 95th percentile of the seconds between two tokens.
        tokens: tokens per second.
    """

    budget: int
    ttft: float
    itl: float
    tokens: float


Choose = Callable[[list[Measured], Slo], int | None]

BUDGETS = (24, 32, 48, 64, 96, 128, 192, 256, 512)
OBJECTIVES = {
    "a chat": Slo(ttft=3.0, itl=0.125),
    "a job over night": Slo(ttft=60.0, itl=1.0),
    "smooth above all": Slo(ttft=10.0, itl=0.05),
    "everything at once": Slo(ttft=0.5, itl=0.05),
}


def choose_budget(measured: Sequence[Measured], slo: Slo) -> int | None:
    """Of the token budgets that keep both objectives, the one with most tokens per second.

    Args:
        measured: a row for each budget, in any order.
        slo: the objectives, seconds for TTFT and for ITL.

    Returns:
        The budget, the smaller of two with equally many tokens per second; None if none keeps both.
    """
    keep = [one for one in measured if one.ttft <= slo.ttft and one.itl <= slo.itl]
    return max(keep, key=lambda one: (one.tokens, -one.budget)).budget if keep else None


@functools.cache
def measured_at(budget: int) -> Measured:
    """What 200 long prompts measure in an open loop, a little faster than small budgets can serve."""
    demands = draw_demands(200, rate=3.5, prompt_tokens=(32, 512), answer_tokens=(8, 64), seed=11)
    seen = summary(serve(demands, budget=budget).measures)
    if seen.ttft is None or seen.itl is None:
        raise ValueError(f"budget {budget}: no answer has two tokens")
    return Measured(budget, seen.ttft.p95, seen.itl.p95, seen.tokens)


def _examine(function: Callable[..., Any]) -> None:
    for measured, slo in _cases():
        given = list(measured)
        answer = function(given, slo)
        expect(given == measured, "leave the list as it is: work on a copy", f"measured: {measured}")
        _judge(measured, slo, answer if whole(answer) is None else int(answer))


def _cases() -> Iterator[tuple[list[Measured], Slo]]:
    """Measurements and objectives, the smallest first."""
    slo = Slo(ttft=1.0, itl=0.1)
    good, slow = Measured(64, 0.5, 0.05, 100.0), Measured(32, 2.0, 0.05, 120.0)
    jerky = Measured(256, 0.5, 0.2, 120.0)
    for rows in (
        [good],
        [good, jerky],
        [good, slow],
        [slow],
        [jerky],
        [slow, jerky],
        [good, good._replace(budget=96, tokens=110.0)],
        [good, good._replace(budget=96, tokens=90.0)],
        [good, good._replace(budget=96)],
        [good._replace(ttft=1.0)],
        [good._replace(itl=0.1)],
        [good, slow, jerky],
        [],
    ):
        yield rows, slo
        yield rows[::-1], slo
    yield (
        [Measured(64, 0.9, 0.05, 90.0), Measured(96, 0.95, 0.09, 100.0)],
        slo,
    )  # the fastest is not the one to choose
    yield [Measured(32, 1.01, 0.01, 200.0), Measured(64, 0.99, 0.099, 100.0)], slo
    near = good._replace(ttft=1.0004, tokens=110.0), good._replace(itl=0.1004, tokens=110.0)
    for row in near:
        yield [good, row._replace(budget=100)], slo
    yield [good, good._replace(budget=48, tokens=99.6)], slo
    yield [good, good._replace(budget=100, tokens=100.3)], slo
    rng = random.Random(11)
    for _ in range(100):
        budgets = rng.sample(range(1, 2000), rng.randrange(1, 12))
        slo = Slo(ttft=rng.uniform(0.5, 2.5), itl=rng.uniform(0.05, 0.2))
        rows = [(rng.uniform(0.3, 2), rng.uniform(0.03, 0.2), rng.uniform(99, 101)) for _ in budgets]
        yield [Measured(budget, *row) for budget, row in zip(budgets, rows, strict=True)], slo
    slo = Slo(ttft=1.0, itl=0.1)
    for _ in range(300):
        budgets = rng.sample(BUDGETS, rng.randrange(1, len(BUDGETS)))
        ttft, itl, tokens = (0.5, 1.0, 2.0), (0.05, 0.1, 0.2), (90.0, 100.0, 110.0)
        yield [Measured(b, rng.choice(ttft), rng.choice(itl), rng.choice(tokens)) for b in budgets], slo


def _judge(measured: list[Measured], slo: Slo, answer: Any) -> None:
    right = choose_budget(measured, slo)
    if type(answer) is type(right) and answer == right:
        return
    rows = "".join(f"\n  {row}" for row in measured) or "\n  nothing"
    example = f"{slo}, measured:{rows}\nchoose_budget returned {answer!r}, not {right!r}"
    by_budget = {row.budget: row for row in measured}
    expect(
        answer is None or (type(answer) is int and answer in by_budget),
        "return the number of one of the measured budgets, not its row, or None",
        example,
    )
    expect(
        right is not None,
        "if no budget keeps both objectives, return None: even the best of them breaks a promise",
        example,
    )
    chosen, best = by_budget.get(answer), by_budget[right or 0]
    if chosen:
        expect(chosen.itl <= slo.itl, "ITL must keep its objective, whatever TTFT and tokens/s are", example)
        expect(
            chosen.ttft <= slo.ttft, "TTFT must keep its objective, whatever ITL and tokens/s are", example
        )
    expect(
        best.ttft < slo.ttft and best.itl < slo.itl,
        "a time that equals its objective keeps it: compare with <=, not with <",
        example,
    )
    expect(chosen is not None, "return None only if no budget keeps both objectives: here one does", example)
    expect(
        chosen is None or chosen.tokens < best.tokens,
        "of two budgets with equally many tokens/s, take the smaller one: its steps are shorter",
        example,
    )
    expect(False, "of the budgets that keep both objectives, take the one with most tokens/s", example)


# -- the scheduler at that budget -----------------------------------------------------------------

_SCENE = [Demand(0.0, 4, 30)] * 3 + [Demand(0.2, 400, 4)]
"""Three answers run when a long prompt arrives."""


def _run(function: Callable[..., Any]) -> Run:
    measured = [measured_at(budget) for budget in BUDGETS]
    name, slo = next(iter(OBJECTIVES.items()))
    chosen = function(list(measured), slo)
    most = max(measured, key=lambda one: one.tokens)
    one = next(one for one in measured if one.budget == chosen)
    sentence = (
        f"For {name} (TTFT {slo.ttft:g} s, ITL {1e3 * slo.itl:g} ms) your rule chose a budget of "
        f"{chosen} (reference {choose_budget(measured, slo)}): {_say(one)}. Most tokens/s, whatever the "
        f"objectives are, come at {most.budget}: {_say(most)}."
    )
    traces = {
        f"{caption}: three answers, and a prompt of 400 tokens": serve(_SCENE, budget=budget).trace
        for caption, budget in (("At your budget", one.budget), ("At the one with most", most.budget))
    }
    return Run(sentence, rails(traces, "seconds"))


def _say(one: Measured) -> str:
    return f"{one.tokens:.1f} tokens/s, TTFT p95 {one.ttft:.2f} s, ITL p95 {1e3 * one.itl:.0f} ms"


EXERCISES: tuple[Exercise, ...] = (
    Exercise("11.1", "choose the token budget", choose_budget, _examine, _run),
)
