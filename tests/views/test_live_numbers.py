"""Latencies, hits and waste from records, with any events between the steps."""

from __future__ import annotations

from labkit.trace.pool_state import PoolState
from labkit.trace.records import Admission, Arrival, Blocks, Finish, StepRecord
from labkit.views.events import events_of
from labkit.views.live_numbers import LATEST_GAPS, LATEST_REQUESTS, Numbers

STEPS = [
    StepRecord(
        0, ("a",), "p", (0,), (8,), ((1,),), arrived=(Arrival("a", 8, 9), Arrival("b", 8, 9)),
        admitted=(Admission("a", 0, (), 8),), taken=(Blocks("a", (0, 1, 2)),),
        waiting=1, seconds=0.5, time=10,
    ),
    StepRecord(
        1, ("a", "b"), "dp", (8, 4), (1, 4), ((2,), (3,)), admitted=(Admission("b", 4, (0,), 8),),
        taken=(Blocks("b", (3,)),), seconds=0.25, time=99,
    ),
    StepRecord(
        2, ("a",), "d", (9,), (1,), ((4,),), preempted=(Blocks("b", (0, 3)),), evicted=(3,),
        finished=(Finish("a", "length", (0, 1, 2)),), waiting=1, seconds=0.25, time=100,
    ),
]  # fmt: skip


def numbers_of(records: list[StepRecord]) -> dict[str, float | None]:
    numbers = Numbers()
    for record in records:
        numbers.append(record)
    return numbers.pack()


def test_seconds_of_work_count_and_pauses_do_not() -> None:
    assert numbers_of(STEPS) == {
        "ttft": 0.625,  # of 0.5 and 0.75
        "itl": 0.25,
        "hits": 4 / 16,
        "preemptions": 1,
        "generated": 4,
    }


def test_hits_after_a_preemption_do_not_count() -> None:
    back = StepRecord(3, ("b",), "p", (4,), (5,), ((7,),), admitted=(Admission("b", 4, (0,), 9),))
    assert numbers_of([*STEPS, back])["hits"] == numbers_of(STEPS)["hits"] == 4 / 16


def test_nothing_measured_is_none() -> None:
    assert numbers_of([]) == {"ttft": None, "itl": None, "hits": None, "preemptions": 0, "generated": 0}


def test_requests_of_a_record_that_stands_for_others_have_no_ttft() -> None:
    state = PoolState(4)
    state.begin(STEPS[0])
    start = state.as_record(STEPS[0])
    assert start.admitted and numbers_of([start, *STEPS[1:]])["ttft"] is None


def test_memory_is_bounded() -> None:
    numbers = Numbers()
    for step in range(3 * LATEST_GAPS):
        name = str(step)
        numbers.append(
            StepRecord(
                step, (name,), "p", (0,), (3,), ((1, 2),), arrived=(Arrival(name, 3, 1),),
                admitted=(Admission(name, 0, (), 3),), finished=(Finish(name, "length", ()),), seconds=0.1,
            )
        )  # fmt: skip
    assert (
        len(numbers._ttft) == len(numbers._looked_up) == LATEST_REQUESTS and len(numbers._itl) == LATEST_GAPS
    )
    assert not numbers._arrived and not numbers._latest


def test_the_log_tells_all_that_happened_in_order() -> None:
    assert [event for record in STEPS for event in events_of(record)] == [
        (0, "arrive", "a", 8, 0, ""),
        (0, "arrive", "b", 8, 0, ""),
        (0, "admit", "a", 3, 0, ""),
        (1, "admit", "b", 2, 0, ""),
        (1, "hit", "b", 4, 8, ""),
        (2, "preempt", "b", 2, 0, ""),
        (2, "evict", "", 1, 0, ""),
        (2, "finish", "a", 3, 0, "length"),
    ]
    aborted = StepRecord(3, finished=(Finish("b", "abort", ()),))
    assert list(events_of(aborted)) == [(3, "abort", "b", 0, 0, "")]
