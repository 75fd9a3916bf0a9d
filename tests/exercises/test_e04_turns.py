"""The bonus of notebook 04: wrong counts are refused for what is wrong, right ones choose in the engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.exercises.e04_turns import JOBS, FairTurns, mean_ttft, run_turns
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- right ----------------------------------------------------------------------------------------


def test_the_solution_in_the_notebook_is_accepted_and_serves_bob_sooner() -> None:
    verdict = assert_accepted("04.2", function_from(solution("04", "04.2"), "Turns"))
    assert "Bob's first tokens came after 8.2 steps on average, and after 75.4" in verdict.text
    assert "Ann's came after 55.0 (41.0)" in verdict.text and len(verdict.pictures) == 2


def test_the_stub_is_open() -> None:
    class Turns:
        def arrived(self, user: str, present: list[str]) -> None:
            raise NotImplementedError

    assert_open("04.2", Turns)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), min_size=1, max_size=60))
def test_two_who_always_want_more_never_drift_far_apart(costs: list[tuple[str, int]]) -> None:
    """The bound of the paper: as long as all have requests, counters differ by no more than one request."""
    turns, users = FairTurns(), list("abcd")
    for i, user in enumerate(users):
        turns.arrived(user, users[:i])
    for _, tokens in costs:
        turns.computed(turns.choose(users), tokens)
    counts = [turns.counters.get(user, 0) for user in users]
    assert max(counts) - min(counts) <= max(tokens for _, tokens in costs)


# -- wrong ----------------------------------------------------------------------------------------


class NoLift(FairTurns):
    def arrived(self, user: str, present: list[str]) -> None:
        self.counters.setdefault(user, 0)


class Forgives(FairTurns):
    def arrived(self, user: str, present: list[str]) -> None:
        self.counters[user] = min((self.counters.get(other, 0) for other in present), default=0)


class Requests(FairTurns):
    def computed(self, user: str, tokens: int) -> None:
        super().computed(user, 1)


class Shared(FairTurns):
    everybody: dict[str, int] = {}  # noqa: RUF012 (that is the fault)

    def __init__(self) -> None:
        self.counters = self.everybody


class Number(FairTurns):
    def choose(self, users: list[str]) -> int:
        return 0


class Sorts(FairTurns):
    def choose(self, users: list[str]) -> str:
        users.sort(key=lambda user: self.counters.get(user, 0))
        return users[0]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (NoLift, "begins at the lowest counter of those who are there"),
        (Forgives, "going away is no way to be forgiven"),
        (Requests, "the fewest tokens is next"),
        (Shared, "two schedulers know nothing of each other"),
        (Number, "choose one of the users in the list"),
        (Sorts, "leave the lists as they are"),
    ],
)
def test_wrong_counts_are_refused_for_what_is_wrong(wrong: type, rule: str) -> None:
    assert_refused("04.2", wrong, rule)


# -- in the engine --------------------------------------------------------------------------------


def test_turns_change_the_order_and_no_token_nor_the_length_of_the_run() -> None:
    ours, theirs = run_turns(FairTurns), run_turns()
    assert {n: o.token_ids for n, o in ours.outputs.items()} == {
        n: o.token_ids for n, o in theirs.outputs.items()
    }
    assert len(ours.trace) == len(theirs.trace) and len(ours.outputs) == len(JOBS)
    assert mean_ttft(ours, "bob") < mean_ttft(theirs, "bob") / 5
    waits = [record.blocked for record in ours.trace if record.blocked]
    assert waits and all("seats are taken" in reason for _, reason in waits)
