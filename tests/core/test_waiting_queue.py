"""Requests leave the queue by priority, then by arrival, whatever was pushed, moved or removed before."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from labkit.core.request import Request
from labkit.core.waiting_queue import WaitingQueue, order
from labkit.sampling_params import SamplingParams


def request(number: int, priority: int = 0) -> Request:
    made = Request(str(number), [1], SamplingParams(), priority=priority)
    made.arrival = number
    return made


MOVES = st.tuples(st.sampled_from(["push", "move", "remove", "again"]), st.integers(-2, 2))


@given(st.lists(MOVES, max_size=60))
def test_the_head_is_always_the_first_of_a_sorted_list(moves: list[tuple[str, int]]) -> None:
    queue, members, gone = WaitingQueue(), [], []
    for number, (move, value) in enumerate(moves):
        if move == "push":
            members.append(request(number, value))
            queue.push(members[-1])
        elif move == "again" and gone:  # as after a preemption
            members.append(gone.pop())
            queue.push(members[-1])
        elif move == "move" and members:
            members[value % len(members)].priority = value
            queue.push(members[value % len(members)])
        elif move == "remove" and members:
            gone.append(members.pop(value % len(members)))
            queue.remove(gone[-1])
        members.sort(key=order)
        assert list(queue) == members and len(queue) == len(members)
        assert queue.peek() is (members[0] if members else None)
        assert all(one in queue for one in members) and not any(one in queue for one in gone)


def test_leftovers_of_those_who_went_do_not_pile_up() -> None:
    queue, rng = WaitingQueue(), random.Random(0)
    waiting = [request(i) for i in range(10)]
    for one in waiting:
        queue.push(one)
    for number in range(10, 3000):
        one = waiting.pop(rng.randrange(10))
        queue.remove(one)
        waiting.append(request(number))
        queue.push(waiting[-1])
    assert len(queue._heap) <= 2 * 10 + 65
    assert list(queue) == sorted(waiting, key=order)
