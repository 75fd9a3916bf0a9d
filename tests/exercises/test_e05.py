"""Exercise 05.1: plausible ways to share out a budget wrongly, and several right ones."""

from __future__ import annotations

import pytest

from labkit.config import EngineConfig
from labkit.core.block_pool import InvariantError
from labkit.engine import Engine
from labkit.exercises.e05 import NEWCOMERS, Split, run_split, scheduler_of, split_budget
from labkit.sampling_params import SamplingParams
from labkit.views.facts.token_timeline import token_timeline_of
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

Answer = tuple[list[int], list[int]]


def in_turn(budget: int, missing: list[int], order: list[int]) -> list[int]:
    given = [0] * len(missing)
    for place in order:
        given[place] = min(missing[place], budget)
        budget -= given[place]
    return given


def cut(numbers: list[int], running: list[int]) -> Answer:
    return numbers[: len(running)], numbers[len(running) :]


def shortest_first(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    order = sorted(range(len(missing)), key=lambda i: missing[i])
    return cut(in_turn(budget, missing, order), running)


def evenly(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    given = [int(i < len(running) and most == 1) for i, most in enumerate(missing)]
    while sum(given) < min(budget, sum(missing)):
        poorest = min((i for i in range(len(missing)) if given[i] < missing[i]), key=lambda i: given[i])
        given[poorest] += 1
    return cut(given, running)


def newest_first(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    answers = [i for i, most in enumerate(running) if most == 1]
    others = [i for i in reversed(range(len(missing))) if i not in answers]
    return cut(in_turn(budget, missing, answers + others), running)


@pytest.mark.parametrize("right", [split_budget, shortest_first, evenly, newest_first])
def test_right_ones_are_accepted(right: Split) -> None:
    verdict = assert_accepted("05.1", right)
    assert "Longest gap: 16 tokens (reference 16)" in verdict.text
    assert [caption for caption, _ in verdict.pictures] == ["Your split:", "The reference:"]
    assert "16 tokens computed" in verdict.pictures[0][1].twin


def test_the_solution_in_the_notebook_beats_the_reference() -> None:
    verdict = assert_accepted("05.1", function_from(solution("05", "05.1"), "split_budget"))
    assert "after 4.0 steps on average (reference 6.7), the last after 8 (8)" in verdict.text


def test_the_stub_is_open() -> None:
    def split_budget(budget: int, running: list[int], waiting: list[int]) -> Answer:
        raise NotImplementedError

    assert_open("05.1", split_budget)


def prompts_first(budget: int, running: list[int], waiting: list[int]) -> Answer:
    missing = [*running, *waiting]
    order = sorted(range(len(missing)), key=lambda i: -missing[i])
    return cut(in_turn(budget, missing, order), running)


def in_order(budget: int, running: list[int], waiting: list[int]) -> Answer:
    """Rows as they come: a prompt in front of an answer takes all."""
    return cut(in_turn(budget, [*running, *waiting], list(range(len(running) + len(waiting)))), running)


def all_of_it(budget: int, running: list[int], waiting: list[int]) -> Answer:
    return running, waiting


def budget_for_each(budget: int, running: list[int], waiting: list[int]) -> Answer:
    return [min(most, budget) for most in running], [min(most, budget) for most in waiting]


def decode_on_top(budget: int, running: list[int], waiting: list[int]) -> Answer:
    """Answers are not taken off the budget."""
    missing = [0 if i < len(running) and most == 1 else most for i, most in enumerate([*running, *waiting])]
    given = in_turn(budget, missing, list(range(len(missing))))
    return cut([1 if i < len(running) and running[i] == 1 else n for i, n in enumerate(given)], running)


def equal_shares(budget: int, running: list[int], waiting: list[int]) -> Answer:
    """Rounded down, and what a short one leaves is lost."""
    share = budget // max(1, len(running) + len(waiting))
    return [min(most, share) for most in running], [min(most, share) for most in waiting]


def one_prompt_a_step(budget: int, running: list[int], waiting: list[int]) -> Answer:
    given, offered = split_budget(budget, running, waiting[:1])
    return given, offered + [0] * len(waiting[1:])


def whole_prompts_only(budget: int, running: list[int], waiting: list[int]) -> Answer:
    given, _ = split_budget(budget, running, [])
    left = budget - sum(given)
    offered = []
    for most in waiting:
        offered.append(most if most <= left else 0)
        left -= offered[-1]
    return given, offered


def fills_up(budget: int, running: list[int], waiting: list[int]) -> Answer:
    """The first prompt gets all that is left, needed or not."""
    given = [1 if most == 1 else 0 for most in running]
    places = [i for i, most in enumerate(running) if most > 1]
    offered = [0] * len(waiting)
    if places:
        given[places[0]] = budget - sum(given)
    elif waiting:
        offered[0] = budget - sum(given)
    return given, offered


def below_zero(budget: int, running: list[int], waiting: list[int]) -> Answer:
    given, left = [], budget
    for most in [*running, *waiting]:
        given.append(min(most, left))
        left -= most
    return cut(given, running)


def one_list(budget: int, running: list[int], waiting: list[int]) -> list[int]:
    return in_turn(budget, [*running, *waiting], list(range(len(running) + len(waiting))))


def fractions(budget: int, running: list[int], waiting: list[int]) -> tuple[list[float], list[float]]:
    share = min(1.0, budget / max(1, sum(running) + sum(waiting)))
    return [most * share for most in running], [most * share for most in waiting]


@pytest.mark.parametrize(
    "wrong, fragment",
    [
        (prompts_first, "a running row that misses one token gets it in every step"),
        (in_order, "a running row that misses one token gets it in every step"),
        (all_of_it, "a step never computes more tokens than its budget"),
        (budget_for_each, "a step never computes more tokens than its budget"),
        (decode_on_top, "a step never computes more tokens than its budget"),
        (equal_shares, "stays unused while a request misses tokens"),
        (one_prompt_a_step, "stays unused while a request misses tokens"),
        (whole_prompts_only, "stays unused while a request misses tokens"),
        (fills_up, "no request computes more tokens than it misses"),
        (below_zero, "a number of tokens is 0 or more"),
        (one_list, "return two lists of whole numbers"),
        (fractions, "return two lists of whole numbers"),
    ],
)
def test_wrong_ones_are_refused_for_their_own_reason(wrong: Split, fragment: str) -> None:
    verdict = assert_refused("05.1", wrong, fragment)
    assert "split_budget(" in verdict.text


def test_what_is_handed_in_stays_as_it_was() -> None:
    def uses_up(budget: int, running: list[int], waiting: list[int]) -> Answer:
        answer = split_budget(budget, running, waiting)
        running.clear()
        waiting.clear()
        return answer

    assert_refused("05.1", uses_up, "leave the two lists as they are")


# -- in the engine --------------------------------------------------------------------------------


def test_the_reference_plans_as_the_engine_does() -> None:
    ours, theirs = run_split(split_budget), run_split()
    for one, other in zip(ours.trace, theirs.trace, strict=True):
        assert one.rows == other.rows


def test_a_plan_that_gives_prompts_the_budget_first_is_right_and_slow() -> None:
    slow, quick = run_split(prompts_first), run_split()
    assert {n: o.token_ids for n, o in slow.outputs.items()} == {
        n: o.token_ids for n, o in quick.outputs.items()
    }
    assert token_timeline_of(slow.trace).worst_gap > 2 * token_timeline_of(quick.trace).worst_gap


def test_the_audit_stops_a_split_that_spends_too_much() -> None:
    with pytest.raises(InvariantError, match="over budget"):
        run_split(all_of_it)


def tight(split: Split, *, seats: int = 3, num_blocks: int = 16, n: int = 1) -> Engine:
    config = EngineConfig(
        "tiny-random", device="cpu", num_blocks=num_blocks, block_size=4, max_num_seqs=seats,
        max_num_batched_tokens=8, audit=True,
    )  # fmt: skip
    engine = Engine(config, scheduler_of(split))
    for number in range(6):
        params = SamplingParams(max_tokens=20, ignore_eos=True, n=n, temperature=float(n > 1), seed=number)
        engine.add_request([300 + number * 7 + i for i in range(9 + number)], params)
    while engine.has_unfinished:
        engine.step()
        if engine.scheduler.waiting:
            engine.preview()
    return engine


@pytest.mark.parametrize("split", [split_budget, shortest_first, evenly])
def test_it_holds_when_pages_and_seats_are_short(split: Split) -> None:
    engine = tight(split)
    assert sum(len(record.preempted) for record in engine.trace) > 0
    reasons = {record.blocked[1].split(",")[0] for record in engine.trace if record.blocked}
    assert any("seats" in reason or "pages" in reason for reason in reasons)
    assert all(output.finish_reason == "length" for output in engine.outputs.values())
    roomy = tight(split_budget, seats=8, num_blocks=200)
    for name, output in roomy.outputs.items():
        assert engine.outputs[name].token_ids == output.token_ids


def test_several_answers_to_one_prompt_work_too() -> None:
    engine = tight(split_budget, n=2, num_blocks=60)
    assert len(engine.outputs) == 12
    assert all(output.finish_reason == "length" for output in engine.outputs.values())


def test_a_request_that_is_left_without_tokens_waits_and_says_so() -> None:
    engine = run_split(split_budget)
    names = [job.name for job in NEWCOMERS]
    assert (names[1], "the split leaves it no tokens") in [record.blocked for record in engine.trace]
