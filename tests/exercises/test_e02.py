"""The exercises of notebook 02: what a learner might write, and what becomes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from labkit.exercises.common import JOBS, Job
from labkit.exercises.e02 import (
    SEATS,
    Batches,
    idle_share,
    in_order,
    make_batches,
    run_jobs,
    steps_of,
)
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution


def cut(names: list[str], seats: int) -> Batches:
    return [names[i : i + seats] for i in range(0, len(names), seats)]


# -- 02.1 -----------------------------------------------------------------------------------------


def tokens_for_seats(records, seats):
    if not records:
        return 0.0
    return 1 - sum(row.num_tokens for r in records for row in r.rows) / (seats * len(records))


def padding_is_idle(records, seats):
    if not records:
        return 0.0
    return sum(row.padding > 0 for r in records for row in r.rows) / (seats * len(records))


def idle_rows(records, seats):
    if not records:
        return 0.0
    return sum(row.kind == "idle" for r in records for row in r.rows) / (seats * len(records))


def of_rows(records, seats):
    rows = [row for r in records for row in r.rows]
    return sum(row.num_tokens == 0 for row in rows) / len(rows) if rows else 0.0


def no_records_forgotten(records, seats):
    return 1 - sum(row.num_tokens > 0 for r in records for row in r.rows) / (seats * len(records))


def busy_share(records, seats):
    return 1 - idle_share(records, seats)


def percent(records, seats):
    return 100 * idle_share(records, seats)


def nothing(records, seats):
    idle_share(records, seats)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (tokens_for_seats, "a prompt fills its seat for one step"),
        (padding_is_idle, "padded on its left is computed all the same"),
        (idle_rows, "a seat that nobody took is idle as well"),
        (of_rows, "a seat that nobody took is idle as well"),
        (no_records_forgotten, "it raised ZeroDivisionError"),
        (busy_share, "a seat whose request computes a token is busy"),
        (percent, "a share is a number from 0 to 1, not a percentage"),
        (nothing, "return a number from 0 to 1"),
    ],
)
def test_wrong_shares_are_refused_each_for_its_own_reason(function: Callable[..., Any], reason: str) -> None:
    assert_refused("02.1", function, reason)


def test_right_shares_are_accepted() -> None:
    def by_step(records, seats):
        idle = 0
        for record in records:
            idle += seats
            for row in record.rows:
                if row.num_tokens:
                    idle -= 1
        return idle / (seats * len(records)) if records else 0

    def by_columns(records, seats):
        busy = [sum(map(bool, record.num_tokens)) for record in records]
        return sum(1 - b / seats for b in busy) / max(1, len(busy))

    for function in (by_step, by_columns, function_from(solution("02", "02.1"), "idle_share")):
        verdict = assert_accepted("02.1", function)
        assert (
            "static batching of the 12 requests leaves 53.1% idle, continuous batching 27.2%" in verdict.text
        )
        assert len(verdict.pictures) == 1


def test_a_share_is_what_one_counts_by_hand() -> None:
    records = run_jobs([Job(6, 1, name="a"), Job(2, 3, name="b")], seats=2, scheduler="static")[0].records
    assert [record.num_tokens for record in records] == [(6, 2), (0, 1), (0, 1)]
    assert idle_share(records, 2) == pytest.approx(2 / 6)
    assert idle_share(records, 4) == pytest.approx(8 / 12)
    assert idle_share([], 4) == 0


# -- 02.2 -----------------------------------------------------------------------------------------


def full_ones_only(jobs, seats):
    return [batch for batch in in_order(jobs, seats) if len(batch) == seats]


def overlapping(jobs, seats):
    names = [job.name for job in jobs]
    return [names[i : i + seats] for i in range(0, len(names), max(1, seats - 1))]


def one_for_all(jobs, seats):
    return [[job.name for job in jobs]]


def shortest_first(jobs, seats):
    return cut([job.name for job in sorted(jobs, key=lambda job: job.answer_tokens)], seats)


def whole_jobs(jobs, seats):
    return [list(jobs[i : i + seats]) for i in range(0, len(jobs), seats)]


def flat(jobs, seats):
    return [job.name for job in sorted(jobs, key=lambda job: -job.answer_tokens)]


def one_by_one(jobs, seats):
    return [[job.name] for job in jobs]


def nothing_returned(jobs, seats):
    make_batches(jobs, seats)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (full_ones_only, "every request must be in a batch"),
        (overlapping, "no request may stand in two places"),
        (one_for_all, "at most as many requests as there are seats"),
        (shortest_first, "never need more steps than batches in order of arrival"),
        (one_by_one, "never need more steps than batches in order of arrival"),
        (in_order, "must need fewer steps than batches in order of arrival"),
        (whole_jobs, "a batch holds names of requests, and nothing else"),
        (flat, "a list of batches, each a list of names"),
        (nothing_returned, "a list of batches, each a list of names"),
    ],
)
def test_wrong_batches_are_refused_each_for_its_own_reason(function: Callable[..., Any], reason: str) -> None:
    assert_refused("02.2", function, reason)


def test_right_batches_are_accepted() -> None:
    def longest_then_the_next(jobs, seats):
        left, batches = {job.name: job.answer_tokens for job in jobs}, []
        while left:
            batches.append(sorted(left, key=left.get)[-seats:])
            for name in batches[-1]:
                del left[name]
        return batches

    def the_better_of_two(jobs, seats):
        ways = (shortest_first(jobs, seats), in_order(jobs, seats))
        return min(ways, key=lambda batches: steps_of(batches, jobs))

    def short_batches_first(jobs, seats):
        return ([], *(tuple(batch) for batch in reversed(make_batches(jobs, seats))))

    functions = (longest_then_the_next, the_better_of_two, short_batches_first)
    for function in (*functions, function_from(solution("02", "02.2"), "make_batches")):
        verdict = assert_accepted("02.2", function)
        assert "your batches 50 steps, 15.5% of the seats idle" in verdict.text
        assert "in order of arrival 90 steps, 53.1% of the seats idle" in verdict.text
        assert [caption for caption, _ in verdict.pictures] == ["Your batches:", "Reference:"]


def partitions(names: list[str], seats: int) -> Iterator[Batches]:
    """All ways to put names into batches of at most `seats`."""
    if not names:
        yield []
        return
    first, rest = names[0], names[1:]
    for count in range(min(seats, len(names))):
        for others in itertools.combinations(rest, count):
            for batches in partitions([name for name in rest if name not in others], seats):
                yield [[first, *others], *batches]


@pytest.mark.parametrize("answers", [(6, 6, 1), (5, 1, 4, 2, 3), (9, 1, 1, 9, 4, 4, 2), (3, 8, 8, 3, 5, 5)])
def test_no_batches_need_fewer_steps_than_the_references(answers: tuple[int, ...]) -> None:
    jobs = [Job(4, n, name="abcdefg"[i]) for i, n in enumerate(answers)]
    for seats in (1, 2, 3, 4):
        best = min(steps_of(batches, jobs) for batches in partitions([job.name for job in jobs], seats))
        assert steps_of(make_batches(jobs, seats), jobs) == best


@pytest.mark.parametrize("seats", [1, 3, SEATS, 12])
def test_the_engine_takes_as_many_steps_as_the_formula_says_and_gives_the_same_tokens(seats: int) -> None:
    trace, tokens = run_jobs(JOBS, seats=seats, scheduler="static")
    assert len(trace) == steps_of(in_order(JOBS, seats), JOBS)
    for batches in (in_order(JOBS, seats), make_batches(JOBS, seats), shortest_first(JOBS, seats)):
        grouped, same = run_jobs(JOBS, batches=batches, seats=seats)
        assert len(grouped) == steps_of(batches, JOBS)
        assert same == tokens
        ran = [set(names) for names, _ in itertools.groupby(record.requests for record in grouped)]
        assert ran == [set(batch) for batch in batches]


def test_untouched_stubs_are_open() -> None:
    for exercise, name in (("02.1", "idle_share"), ("02.2", "make_batches")):
        code = f"def {name}(first, second):\n    raise NotImplementedError\n"
        assert_open(exercise, function_from(code, name))
