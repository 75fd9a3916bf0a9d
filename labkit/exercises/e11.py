"""The exercise of notebook 11: the door of a server, which refuses whoever would wait too long.

The runs that the notebook measures are here as well: the real scheduler and block pool, with a made-up clock.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from labkit import notebook
from labkit.analysis.capacity import Clock, Demand, FittedClock, Replica, Settings, draw_demands
from labkit.analysis.client_measures import Measure, Slo, summary
from labkit.core.request import Request
from labkit.exercises import Exercise, Run, expect
from labkit.exercises.common import whole
from labkit.sampling_params import SamplingParams, check_number
from labkit.trace.trace import Trace

TICK = 1 / 1024
"""Seconds. All times of a run are whole multiples of it, so that no sum of them is ever rounded."""
CLOCK = FittedClock(step=16 * TICK, tokens=TICK)
"""A step takes 16 ticks, and one more for each token that it computes."""
SEATS = 16
_PAGES, _PAGE = 4096, 16  # enough for the longest request in every seat: nobody is preempted


Door = Callable[[int, int, list[float], float, float], int]
"""Called with what `retry_after` is called with, for each request that comes."""

# -- load, on a clock -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What became of a load.

    Attributes:
        measures: what each client that was let in saw, in the order of their requests.
        in_system: number of requests that waited or ran at each tick.
        trace: the trace of all steps.
        refused: number of requests that the door did not let in.
    """

    measures: list[Measure]
    in_system: list[int]
    trace: Trace
    refused: int = 0


def serve(
    demands: Iterable[Demand],
    *,
    clients: int | None = None,
    budget: int = 64,
    seats: int = SEATS,
    clock: Clock = CLOCK,
    door: Door | None = None,
    promise: float = 0.25,
) -> Served:
    """Send requests to the real scheduler and block pool, on a clock that ticks.

    Args:
        demands: the requests, at least one.
        clients: number of clients that send the next request as soon as they have their answer and ignore
            its time (closed loop); None sends each request at its time (open loop).
        budget: most tokens that a step computes.
        seats: most requests that run at once.
        clock: seconds that a step takes, in whole ticks.
        door: decides who is let in; whoever is not goes away. None lets everybody in.
        promise: seconds in the queue that the door promises.

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
    now, refused = 0.0, 0
    while todo or replica.num_unfinished:
        while todo and (todo[0].at <= now if clients is None else replica.num_unfinished < clients):
            demand = todo.popleft()
            free = seats - replica.num_running
            if door and door(replica.num_waiting, free, list(replica.finish.values()), now, promise):
                refused += 1
                continue
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
    return Served(measures, in_system, trace, refused)


# -- 11.1 -----------------------------------------------------------------------------------------

WINDOW = 4
"""Seconds over which a door counts the requests that ended."""


class Case(NamedTuple):
    """What a door is asked: the arguments of `retry_after`."""

    waiting: int
    free_seats: int
    finished: tuple[float, ...]
    now: float
    promise: float


def retry_after(waiting: int, free_seats: int, finished: list[float], now: float, promise: float) -> int:
    """Seconds after which a request that comes now should ask again; 0 lets it in.

    By Little's law, a queue of `ahead` requests that empties at some rate takes `ahead / rate` seconds.

    Args:
        waiting: number of requests in the queue.
        free_seats: number of seats that nobody has; the first in the queue get them in the next step.
        finished: the times at which requests have ended, the earliest first, in seconds.
        now: the time, in seconds.
        promise: seconds in the queue that are promised to those who are let in.
    """
    ahead = waiting - free_seats
    if ahead <= 0:
        return 0
    rate = sum(time > now - WINDOW for time in finished) / WINDOW
    if rate == 0:
        return 1
    wait = ahead / rate
    return 0 if wait <= promise else math.ceil(wait - promise)


def _examine(function: Callable[..., Any]) -> None:
    for case, rule in _cases():
        given = list(case.finished)
        answer = function(case.waiting, case.free_seats, given, case.now, case.promise)
        right = retry_after(case.waiting, case.free_seats, list(case.finished), case.now, case.promise)
        told = f"{_told(case)}\nyours: {answer!r}\nright: {right}"
        expect(given == list(case.finished), "leave the list of times as it is: work on a copy", told)
        number = whole(answer)
        expect(number is not None and number >= 0, "return a whole number of seconds, 0 or more", told)
        expect(number == right, rule, told)


def _told(case: Case) -> str:
    ends = ", ".join(f"{time:g}" for time in case.finished[-12:])
    more = "..., " if len(case.finished) > 12 else ""
    return (
        f"waiting {case.waiting}, free seats {case.free_seats}, now {case.now:g}, "
        f"promise {case.promise:g} s\n"
        f"finished at {f'{more}{ends}' or 'no time yet'}"
    )


def _cases() -> Iterator[tuple[Case, str]]:
    """What a door is asked, the simplest first, each with the rule that it shows."""
    eight = tuple(10.5 + i / 2 for i in range(8))  # two a second, in the 4 seconds before 14.25
    rule = "where nobody is ahead in the queue, let everybody in"
    yield Case(0, 0, (), 0.0, 0.5), rule
    yield Case(0, 3, eight, 14.25, 0.0), rule
    rule = "those in the queue who find a free seat leave it in the next step: they are not ahead of anybody"
    yield Case(2, 2, eight, 14.25, 0.25), rule
    yield Case(2, 16, (), 1.0, 0.25), rule
    yield Case(5, 4, eight, 14.25, 0.75), rule
    rule = "a queue of `ahead` requests that leaves at `rate` a second takes ahead / rate seconds"
    yield Case(1, 0, eight, 14.25, 0.75), rule
    yield Case(3, 0, eight, 14.25, 0.5), rule
    yield Case(6, 0, eight, 14.25, 1.0), rule
    yield Case(6, 2, eight, 14.25, 1.0), rule
    rule = "a wait that equals the promise keeps it"
    yield Case(1, 0, eight, 14.25, 0.5), rule
    yield Case(4, 0, eight, 14.25, 2.0), rule
    rule = "tell a whole number of seconds, rounded up: who comes earlier would be refused again"
    yield Case(2, 0, eight, 14.25, 0.75), rule
    yield Case(8, 0, eight, 14.25, 1.875), rule
    yield Case(8, 0, eight, 14.25, 2.0), rule  # two seconds: a whole number already
    rule = f"the rate counts those who ended within the last {WINDOW} seconds, later than now - {WINDOW}"
    yield Case(4, 0, (0.5, 1.0, 1.5, 2.0, *eight), 14.25, 0.5), rule
    yield Case(4, 0, tuple(i / 4 for i in range(1, 33)), 8.0, 0.5), rule  # the oldest is exactly at its edge
    yield Case(4, 0, (0.25, 0.75), 1.0, 0.5), rule  # the first seconds of a server
    rule = "where none ended within the window there is no rate: with somebody ahead, tell 1 second"
    yield Case(1, 0, (), 3.0, 0.5), rule
    yield Case(9, 2, (1.0, 2.0), 60.0, 30.0), rule
    yield Case(4, 0, tuple(i / 4 for i in range(1, 17)), 8.0, 0.5), rule  # the last at its edge
    rule = "it must be right for every queue, rate and promise"
    rng = random.Random(11)
    for _ in range(600):
        now = rng.randrange(1, 4000) * TICK * 32
        ends = sorted(rng.randrange(int(now / TICK) + 1) * TICK for _ in range(rng.choice((0, 3, 12, 64))))
        lately = sorted(now - rng.randrange(1, 5 * 1024) * TICK for _ in range(rng.choice((0, 2, 8, 40))))
        finished = tuple(sorted(time for time in (*ends, *lately) if 0 <= time <= now))
        sizes = rng.randrange(rng.choice((3, 8, 40))), rng.choice((0, 0, 0, 1, 2, 16))
        case = Case(*sizes, finished, now, rng.choice((0.0, 0.125, 0.25, 0.5, 1.0, 2.0)))
        if not _is_close(case):
            yield case, rule


def _is_close(case: Case) -> bool:
    """Whether rounding may decide: the rate is no power of two, and the wait nearly a whole number off."""
    count = sum(time > case.now - WINDOW for time in case.finished)
    if count & (count - 1) == 0:
        return False
    late = (case.waiting - case.free_seats) * WINDOW / count - case.promise
    return abs(late - round(late)) < 1e-6


# -- at the door of the engine --------------------------------------------------------------------

SLO = Slo(ttft=0.5, itl=0.1)


def rush(rate: float, door: Door | None = None, promise: float = 0.25) -> Served:
    """Send 240 requests at this rate, in an open loop, to an engine with this door."""
    demands = draw_demands(240, rate=rate, prompt_tokens=(16, 128), answer_tokens=(8, 64), seed=11)
    return serve(demands, door=door, promise=promise)


def _run(function: Callable[..., Any]) -> Run:
    def door(*situation: Any) -> int:
        return int(function(*situation))

    doors = {"no door": None, "your door": door, "reference": retry_after}
    runs = {name: rush(14, door) for name, door in doors.items()}
    good = {name: summary(run.measures, slo=SLO).good or 0.0 for name, run in runs.items()}
    late = {name: summary(run.measures).ttft for name, run in runs.items()}
    sentence = (
        f"At 14 requests a second, {good['your door']:.1f} a second were served within the SLO (reference "
        f"{good['reference']:.1f}), and without a door {good['no door']:.1f}. It refused "
        f"{runs['your door'].refused} of 240."
    )
    waits = {name: some.p95 for name, some in late.items() if some}
    return Run(
        sentence,
        [
            (
                "Served within the SLO:",
                notebook.bars(good, "Goodput at 14 requests a second", unit="per second", digits=2),
            ),
            (
                "What those wait who are let in:",
                notebook.bars(waits, "TTFT, 95 of 100 within", unit="s", digits=2),
            ),
        ],
    )


EXERCISES: tuple[Exercise, ...] = (
    Exercise("11.1", "refuse who would wait too long", retry_after, _examine, _run),
)
