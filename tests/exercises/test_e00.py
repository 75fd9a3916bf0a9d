"""The exercise of notebook 00: each wrong prediction is refused for its own reason, right ones pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from labkit.exercises import e00
from labkit.exercises.common import arrivals
from labkit.exercises.e00 import Facts, Running, Waiting, facts_of, next_step, plan_of
from tests.exercising import (
    assert_accepted,
    assert_open,
    assert_refused,
    boxes,
    function_from,
    notebook,
    solution,
)

Plan = dict[str, int]


def predict(
    facts: Facts,
    *,
    budget_of: Callable[[int, int], int] = min,
    running: bool = True,
    waiting: bool = True,
    in_order: bool = True,
    shared_budget: bool = True,
    seats: int | None = None,
    seats_of_newcomers: bool = True,
    kept: Callable[[Plan, Facts], int] = lambda plan, facts: 1 if plan else 0,
    pages: Callable[[int, int, int], int] = lambda known, tokens, size: -(-known // size),
    grows: Callable[[Running, int], bool] = lambda request, size: request.computed == request.pages * size,
    takes: bool = True,
    overtakes: bool = False,
    ignores_pages: bool = False,
    newcomers_need_budget: bool = True,
) -> Plan:
    """The rules of the exercise; each argument bends one of them."""
    plan: Plan = {}
    budget, free = facts.budget, facts.free_pages
    for request in facts.running if running else ():
        free -= grows(request, facts.page_size)
        plan[request.request_id] = budget_of(request.known - request.computed, budget)
        budget -= plan[request.request_id] if shared_budget else 0
    taken = len(facts.running)
    queue = facts.waiting if in_order else facts.waiting[::-1]
    for newcomer in queue if waiting else ():
        tokens = budget_of(newcomer.known, budget)
        need = pages(newcomer.known, tokens, facts.page_size) + kept(plan, facts)
        if taken == (facts.seats if seats is None else seats):
            break
        if newcomers_need_budget and not budget:
            break
        if need > free and not ignores_pages:
            if overtakes:
                continue
            break
        plan[newcomer.request_id] = tokens
        budget -= tokens
        taken += seats_of_newcomers
        free -= pages(newcomer.known, tokens, facts.page_size) if takes else 0
    return {name: tokens for name, tokens in plan.items() if tokens}


def bent(**bend: Any) -> Callable[[Facts], Plan]:
    return lambda facts: predict(facts, **bend)


WRONG = {
    "nobody": (lambda facts: {}, "a running request computes the tokens"),
    "a list": (lambda facts: [], "return a dictionary"),
    "not whole": (lambda facts: {r.request_id: 1.0 for r in facts.running}, "return a dictionary"),
    "all that is known": (
        lambda facts: {r.request_id: r.known for r in facts.running},
        "a running request computes the tokens",
    ),
    "one token each": (bent(budget_of=lambda tokens, budget: min(1, tokens, budget)), "and all of those"),
    "ten tokens at most": (
        bent(budget_of=lambda tokens, budget: min(10, tokens, budget)),
        "no more, and no less",
    ),
    "without a budget": (bent(budget_of=lambda tokens, budget: tokens), "no more, and no less"),
    "nobody joins": (bent(waiting=False), "a waiting request that finds a seat"),
    "the last joins first": (bent(in_order=False), "a request that joins in this step takes a seat"),
    "a budget for each": (bent(shared_budget=False), "the budget is one for the whole step"),
    "no seats": (bent(seats=99), "nobody joins while all seats are taken"),
    "seats of newcomers": (bent(seats_of_newcomers=False), "a request that joins in this step takes a seat"),
    "no pages": (bent(ignores_pages=True), "finds too few free pages"),
    "none kept": (bent(kept=lambda plan, facts: 0), "while anyone runs, one page more"),
    "always one kept": (bent(kept=lambda plan, facts: 1), "where nobody runs, no page"),
    "one kept if some ran before": (
        bent(kept=lambda plan, facts: bool(facts.running)),
        "a request that joins in this step runs as well",
    ),
    "rounded down": (bent(pages=lambda known, tokens, size: known // size), "a page that is begun"),
    "pages of this step": (
        bent(pages=lambda known, tokens, size: -(-tokens // size)),
        "pages for all its tokens",
    ),
    "pages not taken": (bent(takes=False), "pages that a newcomer takes are gone"),
    "nobody grows": (bent(grows=lambda request, size: False), "a running request takes a page before"),
    "all grow": (bent(grows=lambda request, size: True), "a page that is half full"),
    "overtaking": (bent(overtakes=True), "nobody overtakes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prediction_is_refused_for_its_own_reason(name: str) -> None:
    assert_refused("00.1", *WRONG[name])


def by_head_count(facts: Facts) -> Plan:
    """Another way to say it: growth first, a loop over the queue with `while`."""
    size = facts.page_size
    free = facts.free_pages - sum(r.computed == r.pages * size for r in facts.running)
    left = facts.budget
    plan = {}
    for name, known, computed, _ in facts.running:
        plan[name] = min(known - computed, left)
        left -= plan[name]
    queue = list(facts.waiting)
    while queue and left > 0 and len(plan) < facts.seats:
        name, known = queue.pop(0)
        need = (known + size - 1) // size
        if need + bool(plan) > free:
            break
        plan[name] = min(known, left)
        left, free = left - plan[name], free - need
    return {name: tokens for name, tokens in plan.items() if tokens}


def with_zeros(facts: Facts) -> Plan:
    """It names requests that compute nothing."""
    return {w.request_id: 0 for w in facts.waiting} | next_step(facts)


def test_who_computes_nothing_is_left_out() -> None:
    assert_refused("00.1", with_zeros, "leave out those who compute nothing")


@pytest.mark.parametrize("right", [predict, by_head_count])
def test_right_ones_are_accepted_and_plan_a_real_run(right: Callable[[Facts], Plan]) -> None:
    verdict = assert_accepted("00.1", right)
    assert "served 12 requests in 27 steps; the engine's own scheduler takes 27" in verdict.text
    yours, own = (picture.twin.split("the head of the queue")[0] for _, picture in verdict.pictures)
    assert yours == own


def test_the_folded_solution_is_right() -> None:
    assert_accepted("00.1", function_from(solution("00", "00.1"), "next_step"))


def test_the_stub_is_open() -> None:
    def stub(facts: Facts) -> Plan:
        raise NotImplementedError

    assert_open("00.1", stub)


def test_an_error_names_the_line() -> None:
    code = "def next_step(facts):\n    return facts.running[0].tokens\n"
    assert_refused("00.1", function_from(code, "next_step"), "in line 2: return facts.running[0].tokens")


def test_a_wrong_prediction_shows_the_facts_and_both_plans() -> None:
    text = assert_refused("00.1", lambda facts: {}, "running").text
    for line in ("running  A: knows 6, computed 5, holds 2 pages", "yours:  nobody", "engine: A 1"):
        assert line in text


def right_so_far(text: str) -> list[tuple[str, str]]:
    return re.findall(r"right so far: (\d+) of (\d+) states", text)


@pytest.mark.parametrize("number", range(len(e00._CASES) + 1))
def test_a_refusal_counts_the_states_that_were_right_before_it(number: int) -> None:
    """Before the first state there is no count, and behind the last one there is no list to count in."""
    cases, asked = [*e00._CASES, e00._WHOLE_RUN], itertools.count()

    def until(facts: Facts) -> Plan:
        return next_step(facts) if next(asked) < number else {"nobody": 1}

    text = assert_refused("00.1", until, cases[number].rule).text
    counted = 0 < number < len(e00._CASES)
    assert right_so_far(text) == ([(str(number), str(len(e00._CASES)))] if counted else [])


def test_the_count_grows_with_the_rules_that_a_learner_adds() -> None:
    texts = [
        assert_refused("00.1", bent(**missing), "right so far").text
        for missing in ({"waiting": False}, {"seats": 99}, {"ignores_pages": True}, {"overtakes": True})
    ]
    ((first, _), *others) = counts = [found for text in texts for found in right_so_far(text)]
    assert first == "3"  # what the text of the exercise proposes to begin with
    assert len(others) == 3 and counts == sorted(set(counts), key=lambda count: int(count[0]))


def test_the_text_of_the_exercise_tells_the_number_of_its_states() -> None:
    (box,) = boxes(notebook("00").cells).values()
    assert f"in {len(e00._CASES)} such states" in box


def test_no_state_of_the_exercise_is_short_of_pages() -> None:
    """Preemption is not among the rules that the learner is told."""
    engine = e00._run_engine(None)
    assert not any(record.preempted for record in engine.trace)
    reasons = " ".join(record.blocked[1] for record in engine.trace if record.blocked)
    assert all(word in reasons for word in ("seats", "budget", "pages")), "the run should show every limit"


def test_facts_are_those_of_the_engine() -> None:
    case = next(case for case in e00._CASES if case.rule.startswith("the budget is one"))
    facts, plan = e00._state(case)
    assert facts.running == [Running("A", 7, 6, 2), Running("B", 45, 15, 12)]
    assert facts.waiting == [] and facts.free_pages == 18 and plan == {"A": 1, "B": 15}
    engine = e00._engine(case)
    next(arrivals(engine, e00._jobs(case)))
    assert facts_of(engine).waiting == [Waiting("A", 5)]
    predicted = next_step(facts_of(engine))
    assert predicted == plan_of(engine.preview()) == plan_of(engine.step()) == {"A": 5}
