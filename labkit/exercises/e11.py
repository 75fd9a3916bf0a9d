"""Exercise of notebook 11: choose the token budget that keeps what was promised.

And the runs that the notebook measures: the real scheduler and block pool, on a clock that is made up.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from labkit import notebook
from labkit.analysis.capacity import Clock, Demand, FittedClock, Replica, Settings, draw_demands
from labkit.analysis.client_measures import Measure, Slo, summary
from labkit.core.request import Request
from labkit.exercises import Exercise, Run, expect
from labkit.sampling_params import SamplingParams, check_number
from labkit.trace.trace import Trace

TICK = 1 / 1024
"""Seconds. All moments of a run are whole multiples of it, so that no sum of them is ever rounded."""
CLOCK = FittedClock(step=16 * TICK, tokens=TICK)
"""What a step costs: 16 ticks, and one more for each token that it computes."""
SEATS = 16
_PAGES, _PAGE = 4096, 16  # enough for every seat at its longest: nothing hangs on preemption


# -- load, on a clock -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What became of a load.

    Attributes:
        measures: what each client saw, in the order in which they asked.
        in_system: requests that were waiting or running, at each tick.
        trace: every step.
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
        clients: None sends each at its time (open loop). Otherwise so many clients send the next one as soon
            as they have their answer, whatever the times say (closed loop).
        budget, seats: tokens of a step, and requests that run at once.
        clock: seconds of a step, in whole ticks.

    Raises:
        ValueError: for no demands or no clients, or a demand that the pool could never hold.
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
    """What a load came to at one token budget.

    Attributes:
        budget: tokens of a step.
        ttft, itl: 95 of 100 first tokens, and gaps between tokens, took at most so many seconds.
        tokens: per second.
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
    """The token budget with most tokens per second, of those that keep both objectives.

    Args:
        measured: one for each budget, in any order.
        slo: seconds that TTFT and ITL may take.

    Returns:
        The budget, the smaller of two with as many tokens per second; None if none keeps both.
    """
    keep = [one for one in measured if one.ttft <= slo.ttft and one.itl <= slo.itl]
    return max(keep, key=lambda one: (one.tokens, -one.budget)).budget if keep else None


@functools.cache
def measured_at(budget: int) -> Measured:
    """200 requests with long prompts, as an open loop a little above what small budgets can serve."""
    demands = draw_demands(200, rate=3.5, prompt_tokens=(32, 512), answer_tokens=(8, 64), seed=11)
    seen = summary(serve(demands, budget=budget).measures)
    if seen.ttft is None or seen.itl is None:
        raise ValueError(f"budget {budget}: no answer has two tokens")
    return Measured(budget, seen.ttft.p95, seen.itl.p95, seen.tokens)


def _examine(function: Callable[..., Any]) -> None:
    for measured, slo in _cases():
        _judge(measured, slo, function(list(measured), slo))


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
    yield [Measured(64, 0.9, 0.05, 90.0), Measured(96, 0.95, 0.09, 100.0)], slo  # promises are not a race
    yield [Measured(32, 1.01, 0.01, 200.0), Measured(64, 0.99, 0.099, 100.0)], slo
    rng = random.Random(11)
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
        "return one of the budgets that were measured, the number and not its row, or None",
        example,
    )
    expect(
        right is not None,
        "where no budget keeps both objectives, the answer is None: the least bad breaks a promise too",
        example,
    )
    chosen, best = by_budget.get(answer), by_budget[right or 0]
    if chosen:
        expect(chosen.itl <= slo.itl, "ITL must keep its objective, whatever TTFT and tokens/s are", example)
        expect(chosen.ttft <= slo.ttft, "TTFT must keep its objective, however smooth the answer is", example)
    expect(
        best.ttft < slo.ttft and best.itl < slo.itl,
        "what takes exactly as long as the objective keeps it: at most so much, and not less",
        example,
    )
    expect(chosen is not None, "None is for when no budget keeps both objectives; here one does", example)
    expect(
        chosen is None or chosen.tokens < best.tokens,
        "of two budgets with as many tokens/s, take the smaller one: its steps are shorter",
        example,
    )
    expect(False, "of the budgets that keep both objectives, take the one with most tokens/s", example)


# -- the scheduler at that budget -----------------------------------------------------------------

_SCENE = [Demand(0.0, 4, 30)] * 3 + [Demand(0.2, 400, 4)]
"""Three answers run, and a long prompt comes."""


def _run(function: Callable[..., Any]) -> Run:
    measured = [measured_at(budget) for budget in BUDGETS]
    name, slo = next(iter(OBJECTIVES.items()))
    chosen = function(list(measured), slo)
    most = max(measured, key=lambda one: one.tokens)
    one = next(one for one in measured if one.budget == chosen)
    sentence = (
        f"For {name} (TTFT {slo.ttft:g} s, ITL {1e3 * slo.itl:g} ms) your rule chose a budget of "
        f"{chosen} (reference {choose_budget(measured, slo)}): {_say(one)}. Most tokens/s, whatever was "
        f"promised, are at {most.budget}: {_say(most)}."
    )
    pictures = []
    for caption, budget in (("At your budget:", one.budget), ("At the one with most:", most.budget)):
        trace = serve(_SCENE, budget=budget).trace
        picture = notebook.token_timeline(trace, "seconds")
        pictures.append((f"{caption} three answers, and a prompt of 400 tokens", picture))
    return Run(sentence, pictures)


def _say(one: Measured) -> str:
    return f"{one.tokens:.1f} tokens/s, TTFT p95 {one.ttft:.2f} s, ITL p95 {1e3 * one.itl:.0f} ms"


EXERCISES: tuple[Exercise, ...] = (
    Exercise("11.1", "choose the token budget", choose_budget, _examine, _run),
)
