"""The exercise of notebook 04: what a learner might write, and what becomes of it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from labkit.exercises import Wrong
from labkit.exercises.common import JOBS, Job
from labkit.exercises.e04 import SMALL, Situation, Ticket, run_jobs, schedule
from labkit.trace.trace import Trace
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution


def written(
    *,
    by: Callable[[Ticket], Any] = lambda t: t.missing > 1,
    queue: Callable[[list[Ticket]], list[Ticket]] = list,
    kept: Callable[[int], int] = lambda taken: 0,
    spends: bool = True,
    counts_seats: bool = True,
    counts_pages: bool = True,
    skips: bool = False,
    chunk: int = 10**6,
    first: int | None = None,
) -> Callable[..., Any]:
    """A schedule with one thing or another done differently."""

    def mine(running, waiting, seats, budget, free_pages, page_size):
        rows = []
        for ticket in sorted(running, key=by):
            tokens = min(ticket.missing, budget, chunk)
            if tokens > 0:
                rows.append((ticket.name, tokens))
                budget -= tokens if spends else 0
        taken = len(running)
        for ticket in queue(waiting):
            pages = -(-ticket.known // page_size)
            fits = not counts_pages or pages + kept(taken) <= free_pages
            if skips and not fits:
                continue
            if (
                (counts_seats and taken == seats)
                or budget <= 0
                or not fits
                or (first is not None and taken > first)
            ):
                break
            tokens = min(ticket.known, budget, chunk)
            rows.append((ticket.name, tokens))
            taken, free_pages = taken + 1, free_pages - pages
            budget -= tokens if spends else 0
        return rows

    return mine


def newcomers_first(running, waiting, seats, budget, free_pages, page_size):
    fixed = [Ticket(t.name, 0, 0) for t in running]  # they keep their seats, and come to no tokens yet
    rows = [row for row in written()(fixed, waiting, seats, budget, free_pages, page_size) if row[1]]
    left = budget - sum(tokens for _, tokens in rows)
    return rows + written()(running, [], seats, left, free_pages, page_size)


def floor_pages(running, waiting, seats, budget, free_pages, page_size):
    return written()(running, waiting, seats, budget, free_pages * page_size, page_size)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (written(spends=False), "a step never computes more tokens than its budget"),
        (written(counts_seats=False), "admit only as many as there are free seats"),
        (written(counts_pages=False), "as many must be free"),
        (floor_pages, "as many must be free"),
        (written(skips=True), "nobody may overtake"),
        (written(queue=lambda waiting: waiting[::-1]), "nobody may overtake"),
        (written(queue=lambda waiting: sorted(waiting, key=lambda t: t.known)), "nobody may overtake"),
        (written(by=lambda t: (t.missing == 1, t.name)), "decode goes first"),
        (newcomers_first, "decode goes first"),
        (written(first=0), "a free seat is refilled at once"),  # a static batch
        (written(queue=lambda waiting: waiting[:1]), "a free seat is refilled at once"),
        (written(queue=lambda waiting: []), "a free seat is refilled at once"),
        (written(kept=lambda taken: 3), "a free seat is refilled at once"),
        (written(chunk=2), "a request that has a seat gets what is left of the budget"),
        (lambda *situation: [], "a free seat is refilled at once"),
        (lambda *situation: None, "return a list of pairs"),
        (lambda *situation: dict(schedule(*situation)), "return a list of pairs"),
        (lambda *situation: [name for name, _ in schedule(*situation)], "return a list of pairs"),
        (lambda *situation: [(n, float(t)) for n, t in schedule(*situation)], "return a list of pairs"),
        (lambda *situation: schedule(*situation) * 2, "each request has one row in a step"),
        (lambda *situation: [*schedule(*situation), ("zoe", 1)], "schedule only requests that run or wait"),
        (
            lambda running, waiting, *limits: [(t.name, t.known) for t in running + waiting],
            "more than it misses",
        ),
        (lambda running, waiting, *limits: [(t.name, 0) for t in running + waiting], "at least one token"),
        (lambda running: [], "it cannot be called as the exercise calls it"),
    ],
)
def test_wrong_schedules_are_refused_each_for_its_own_reason(
    function: Callable[..., Any], reason: str
) -> None:
    assert_refused("04.1", function, reason)


def test_right_schedules_are_accepted_with_their_score() -> None:
    def takes_lists_apart(running, waiting, seats, budget, free_pages, page_size):
        plan, running, waiting = {}, list(running), list(waiting)
        for ticket in list(running):
            if ticket.missing == 1:
                plan[ticket.name] = 1
                running.remove(ticket)
        taken, budget = len(plan) + len(running), budget - len(plan)
        for ticket in running:
            plan[ticket.name] = min(ticket.missing, budget)
            budget -= plan[ticket.name]
        while waiting and taken < seats and budget:
            ticket = waiting.pop(0)
            free_pages -= (ticket.known + page_size - 1) // page_size
            if free_pages < taken:
                break
            plan[ticket.name] = min(ticket.known, budget)
            taken, budget = taken + 1, budget - plan[ticket.name]
        return tuple((name, tokens) for name, tokens in plan.items() if tokens)

    scores = {
        takes_lists_apart: "yours 68 steps, at most 10 pages, 1 preemption;",
        written(): "yours 67 steps, at most 10 pages, 4 preemptions;",
        function_from(solution("04", "04.1"), "schedule"): "yours 68 steps, at most 10 pages, 2 preemptions;",
    }
    for function, score in scores.items():
        verdict = assert_accepted("04.1", function)
        assert score in verdict.text
        assert "reference 68 steps, at most 10 pages, 2 preemptions; static batching needs 98" in verdict.text
        assert "The same 169 tokens" in verdict.text
        assert [caption for caption, _ in verdict.pictures] == ["Your schedule:", "The reference:"]


def test_the_example_of_the_box() -> None:
    running, waiting = [Ticket("a", 9, 8), Ticket("b", 20, 12)], [Ticket("c", 5, 0)]
    expected = [("a", 1), ("b", 8), ("c", 5)]
    assert schedule(running, waiting, 3, 16, 4, 4) == expected
    for free_pages, kept in ((4, 0), (4, 1), (4, 2)):
        mine = written(kept=lambda taken, kept=kept: kept)
        assert Situation(tuple(running), tuple(waiting), 3, 16, free_pages, 4).ask(mine) == expected


def test_keeping_a_page_for_each_that_runs_is_a_choice_and_more_is_not() -> None:
    running, head = (Ticket("a", 4, 3), Ticket("b", 4, 3)), (Ticket("c", 4, 0),)
    decode = [("a", 1), ("b", 1)]
    for free_pages in (1, 2):
        for rows in (decode, [*decode, ("c", 4)]):
            assert Situation(running, head, 3, 16, free_pages, 4).ask(lambda *_, rows=rows: rows) == rows
    with pytest.raises(Wrong, match="a free seat is refilled at once"):
        Situation(running, head, 3, 16, 3, 4).ask(lambda *_: decode)
    with pytest.raises(Wrong, match="as many must be free"):
        Situation(running, head, 3, 16, 0, 4).ask(lambda *_: [*decode, ("c", 4)])


def unexplained(trace: Trace) -> list[Any]:
    """The records without why the head of the queue waits, which only the engine's scheduler can say."""
    return [dataclasses.replace(record, blocked=None) for record in trace]


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_does_in_every_step_what_the_engine_does(seed: int) -> None:
    rng = random.Random(seed)
    jobs = [Job(rng.randrange(1, 30), rng.randrange(1, 24), rng.randrange(0, 40)) for _ in range(14)]
    sizes = {"num_blocks": 14 + 6 * seed, "block_size": 4, "max_num_batched_tokens": 5 + 4 * seed}
    engine, tokens = run_jobs(jobs, **sizes)
    mine, same = run_jobs(jobs, schedule, **sizes)
    assert unexplained(mine) == unexplained(engine)
    assert same == tokens


def test_a_wrong_schedule_stops_the_engine_where_it_breaks_the_rule() -> None:
    with pytest.raises(Wrong, match="nobody may overtake"):
        run_jobs(JOBS, written(queue=lambda waiting: waiting[::-1]), **SMALL)


def test_an_untouched_stub_is_open() -> None:
    code = "def schedule(*situation):\n    raise NotImplementedError\n"
    assert_open("04.1", function_from(code, "schedule"))
