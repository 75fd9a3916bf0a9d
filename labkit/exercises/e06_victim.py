"""Exercise 06.1: choose the request that gives up its pages."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.core.waiting_queue import order
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import exactly, expect_same_answers, inject, timelines, tiny_engine
from labkit.trace.trace import Trace

BLOCK_SIZE, SEATS = 4, 6
_MAX_STEPS = 5000  # of a run that takes some hundred
NUM_BLOCKS = 22
# Prompt tokens, answer tokens and priority (lower is more urgent) of the requests that compete for pages.
JOBS = (
    (7, 32, 0),
    (11, 16, 1),
    (5, 48, 0),
    (14, 8, 0),
    (6, 32, 0),
    (9, 16, 1),
    (4, 48, 0),
    (17, 8, 1),
    (8, 32, 0),
    (12, 32, 0),
    (10, 16, 1),
    (6, 8, 0),
)


def choose_victim(running: Sequence[Request]) -> Request:
    """The newest of the least urgent requests."""
    return max(running, key=lambda request: (request.priority, request.arrival))


def recomputed(trace: Trace) -> int:
    """How many tokens were computed again, because their pages had been taken away."""
    reached: dict[str, int] = {}
    again = 0
    for record in trace:
        for row in record.rows:
            before, end = reached.get(row.request_id, 0), row.start + row.num_tokens
            again += max(0, min(before, end) - row.start)
            reached[row.request_id] = max(before, end)
    return again


def preemptions(trace: Trace) -> int:
    """How often a request lost its pages."""
    return sum(len(record.preempted) for record in trace)


def _candidates(*facts: tuple[str, int, int, int]) -> list[Request]:
    """Running requests from (name, priority, arrival, tokens computed)."""
    requests = []
    for name, priority, arrival, computed in facts:
        request = Request(name, [7] * (computed + 1), exactly(99), priority=priority)
        request.arrival, request.num_computed_tokens, request.status = arrival, computed, "running"
        request.capacity = -(-computed // BLOCK_SIZE) * BLOCK_SIZE
        requests.append(request)
    return requests


# Running requests as (name, priority, arrival, tokens computed), the smallest list first. They stand in the
# order in which they got their seats: one that was preempted and came back stands at the end.
_LISTS: tuple[tuple[tuple[str, int, int, int], ...], ...] = (
    (("a", 0, 0, 8), ("b", 0, 1, 8)),
    (("a", 0, 0, 20), ("b", 0, 1, 4)),
    (("a", 0, 0, 4), ("b", 0, 1, 20)),
    (("b", 0, 1, 8), ("a", 0, 0, 8)),
    (("a", 1, 0, 8), ("b", 0, 1, 8)),
    (("a", 0, 0, 8), ("b", 1, 1, 8)),
    (("a", 5, 0, 4), ("b", 0, 1, 40), ("c", 0, 2, 8)),
    (("a", 0, 0, 4), ("b", 0, 1, 8), ("c", 0, 2, 16)),
    (("c", 0, 2, 16), ("a", 0, 0, 12), ("b", 0, 1, 20)),
    (("a", -1, 0, 4), ("b", -1, 1, 8), ("c", -2, 2, 16)),
    (("d", 2, 3, 8), ("b", 1, 1, 8), ("c", 2, 2, 30), ("a", 1, 0, 12)),
    (("a", 3, 0, 8), ("b", 2, 1, 8), ("c", 1, 2, 8), ("d", 0, 3, 8)),
    (("e", 0, 4, 4), ("d", 0, 3, 9), ("c", 0, 2, 40), ("b", 0, 1, 2), ("a", 0, 0, 64)),
)


def _by_chance() -> Iterator[tuple[tuple[str, int, int, int], ...]]:
    """Lists of requests whose names, arrivals, seats and tokens are in no order."""
    rng = random.Random(61)
    for _ in range(200):
        count = rng.randrange(2, 7)
        names, arrivals = rng.sample("abcdefghij", count), rng.sample(range(120), count)
        levels = rng.sample(range(-3, 14), rng.randrange(1, 4))
        columns = zip(names, arrivals, strict=True)
        yield tuple((name, rng.choice(levels), arrival, rng.randrange(1, 60)) for name, arrival in columns)


def _examine(function: Callable[..., Any]) -> None:
    for facts in [*_LISTS, *_by_chance()]:
        running = _candidates(*facts)
        given = list(running)
        victim = function(given)
        told = "\n".join(
            f"{name}: priority {priority}, arrival {arrival}, {computed} tokens computed"
            for name, priority, arrival, computed in facts
        )
        before = _candidates(*facts)
        same = all(
            getattr(one, field) == getattr(other, field)
            for one, other in zip(running, before, strict=True)
            for field in Request.__slots__
            if field != "params"
        )
        expect(same, "only choose: leave the requests as they are", told)
        kept = len(given) == len(running) and all(a is b for a, b in zip(given, running, strict=True))
        expect(kept, "only choose: leave the list as it is", told)
        _check_victim(victim, running, told)


def _check_victim(victim: Any, running: Sequence[Request], told: str) -> None:
    """Raise `Wrong` if a choice breaks a rule."""
    if not any(victim is request for request in running):
        raise Wrong("return one of the requests in the list itself", f"{told}\nit returned {victim!r}")
    told += f"\nyour victim is {victim.request_id}"
    last = max(request.priority for request in running)
    expect(
        victim.priority == last,
        "a more urgent request must not pay while a less urgent one runs: a lower priority is more urgent",
        told,
    )
    first = min(running, key=order)
    expect(
        victim is not first,
        "the first in line must never be the victim: one request must be sure to reach its end",
        f"{told}, the most urgent one that came first",
    )


def victim_scheduler(function: Callable[[list[Request]], Request]) -> type[Scheduler]:
    """A scheduler that asks a function for its victims, for `Engine(config, scheduler=...)`."""

    class Asking(Scheduler):
        def victim(self) -> Request:
            chosen = function(list(self.running))
            names = ", ".join(request.request_id for request in self.running)
            _check_victim(chosen, self.running, f"in the engine, with requests {names} running")
            return chosen

    return Asking


def compete(scheduler: type[Scheduler] = Scheduler, num_blocks: int = NUM_BLOCKS) -> Engine:
    """Run the requests of this exercise in a pool that is too small for them.

    Raises:
        Wrong: they never come to an end.
    """
    engine = tiny_engine(
        scheduler_class=scheduler,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=SEATS,
        max_num_batched_tokens=64,
    )
    for prompt_tokens, answer_tokens, priority in JOBS:
        inject(engine, prompt_tokens, answer_tokens, priority=priority)
    for _ in range(_MAX_STEPS):
        if not engine.has_unfinished:
            return engine
        engine.step()
    raise Wrong(
        "every request must reach its end", f"after {_MAX_STEPS} steps, some still push each other out"
    )


@functools.cache
def _competed(num_blocks: int) -> Engine:
    return compete(num_blocks=num_blocks)


def _run(function: Callable[..., Any]) -> Run:
    engine, reference = compete(victim_scheduler(function)), _competed(NUM_BLOCKS)
    expect_same_answers(engine, _competed(400), "the answers must be those of a pool with room for all")
    yours, theirs = ((preemptions(e.trace), recomputed(e.trace), len(e.trace)) for e in (engine, reference))
    names = ("preemptions", "tokens computed again", "steps")
    score = ", ".join(f"{a} {what} ({b})" for what, a, b in zip(names, yours, theirs, strict=True))
    sentence = (
        f"{len(JOBS)} requests in {NUM_BLOCKS} pages, yours (and newest first in brackets): {score}. The "
        "answers are those of a pool with room for all."
    )
    pictures = timelines({"Your choice of victims:": engine.trace, "The newest first:": reference.trace})
    return Run(sentence, pictures)


VICTIM = Exercise("06.1", "whose pages to take", choose_victim, _examine, _run)
