"""Exercises of notebook 10: what is refused and why, what is accepted, and what the engine does with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, takewhile
from operator import eq
from typing import Any

import pytest

from labkit.core.model_runner import accept
from labkit.exercises import e10, judge
from labkit.exercises.e10 import accept_or_replace, chance_of, circles, overlap
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- 10.1, wrong -----------------------------------------------------------------------------------


def accept_all(drafts: Any, chosen: Any) -> Any:
    return len(drafts)


def accept_none(drafts: Any, chosen: Any) -> Any:
    return 0


def counts_hits(drafts: Any, chosen: Any) -> Any:
    return sum(map(eq, drafts, chosen))


def anywhere(drafts: Any, chosen: Any) -> Any:
    return sum(draft in chosen for draft in drafts)


def all_or_none(drafts: Any, chosen: Any) -> Any:
    return len(drafts) if drafts == chosen else 0


def with_the_next(drafts: Any, chosen: Any) -> Any:
    return accept(drafts, chosen) + 1


def the_tokens(drafts: Any, chosen: Any) -> Any:
    return drafts[: accept(drafts, chosen)]


def nothing_at_the_end(drafts: Any, chosen: Any) -> Any:
    for count, (draft, token) in enumerate(zip(drafts, chosen, strict=True)):
        if draft != token:
            return count
    return None


def same_objects(drafts: Any, chosen: Any) -> Any:
    return len(list(takewhile(lambda pair: pair[0] is pair[1], zip(drafts, chosen, strict=True))))


def shifted(drafts: Any, chosen: Any) -> Any:
    return accept(drafts[1:], chosen[:-1])


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (accept_all, "only if the model chose the same token in its place"),
        (accept_none, "each of them saves a step"),
        (counts_hits, "stop at the first wrong draft"),
        (anywhere, "only if the model chose the same token in its place"),
        (all_or_none, "take every draft before the first wrong one"),
        (with_the_next, "the token after the last right one is added by the engine"),
        (the_tokens, "return a whole number"),
        (nothing_at_the_end, "return a whole number"),
        (same_objects, "each of them saves a step"),
        (shifted, "each of them saves a step"),
    ],
)
def test_wrong_counts_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("10.1", function, rule)


def test_what_a_message_shows_is_the_smallest_case() -> None:
    assert "drafts (5,), chosen (7,)\n  yours: 1\n  right: 0" in judge("10.1", accept_all).text
    assert "drafts (5, 5), chosen (7, 5)\n  yours: 1" in judge("10.1", counts_hits).text


# -- 10.1, right -----------------------------------------------------------------------------------


def by_while(drafts: Any, chosen: Any) -> Any:
    count = 0
    while count < len(drafts) and drafts[count] == chosen[count]:
        count += 1
    return count


def by_products(drafts: Any, chosen: Any) -> Any:
    return sum(accumulate(map(eq, drafts, chosen), lambda a, b: a and b))


@pytest.mark.parametrize("function", [accept, by_while, by_products])
def test_right_counts_run_in_the_engine(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("10.1", function)
    steps = len(circles(None).trace)
    assert f"{steps} without drafts. The tokens are the same in all three." in verdict.text
    assert [caption for caption, _ in verdict.pictures] == ["With your rule:", "Without drafts:"]


def test_drafts_save_steps_and_what_the_run_compares_can_differ() -> None:
    """The negative control: a rule that the cases let pass would still be caught in the engine."""
    plain, drafting = circles(None), circles("ngram")
    assert len(drafting.trace) < 0.7 * len(plain.trace)
    with pytest.raises(e10.Wrong, match="must be those without drafts"):
        e10._run_accept(accept_all)
    with pytest.raises(e10.Wrong, match=r"request 0\n(.*\n)*  it failed: the step failed: TypeError"):
        e10._run_accept(lambda drafts, chosen: None)


# -- 10.2, wrong -----------------------------------------------------------------------------------


def left_of(p: Any, q: Any) -> list[float]:
    return [max(0.0, a - b) for a, b in zip(p, q, strict=True)]


def draw(weights: Any, rng: Any) -> int:
    return rng.choices(range(len(weights)), weights=weights)[0]


def taken(p: Any, q: Any, draft: int, rng: Any) -> bool:
    return rng.random() < p[draft] / q[draft]


def accept_always(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft


def only_if_p_is_larger(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if p[draft] >= q[draft] else draw(left_of(p, q), rng)


def replaces_from_p(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if taken(p, q, draft, rng) else draw(p, rng)


def replaces_from_q(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if taken(p, q, draft, rng) else draw(q, rng)


def either_way(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if taken(p, q, draft, rng) else draw([abs(a - b) for a, b in zip(p, q, strict=True)], rng)


def not_cut_off(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if taken(p, q, draft, rng) else draw([a - b for a, b in zip(p, q, strict=True)], rng)


def not_divided(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    if taken(p, q, draft, rng):
        return draft
    u = rng.random()
    for token, share in enumerate(left_of(p, q)):
        u -= share
        if u < 0:
            return token
    return len(p) - 1


def not_divided_and_falls_through(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    if taken(p, q, draft, rng):
        return draft
    u = rng.random()
    for token, share in enumerate(left_of(p, q)):
        u -= share
        if u < 0:
            return token
    return None


def by_p_alone(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if rng.random() < p[draft] else draw(left_of(p, q), rng)


def upside_down(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    if p[draft] == 0 or rng.random() < q[draft] / p[draft]:
        return draft
    return draw(left_of(p, q), rng)


def the_likeliest(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    left = left_of(p, q)
    return draft if taken(p, q, draft, rng) else left.index(max(left))


def throws_drafts_away(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draw(p, rng)


def refuses_equals(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    if p[draft] > q[draft] or (p[draft] < q[draft] and taken(p, q, draft, rng)):
        return draft
    left = left_of(p, q)
    return draw(left, rng) if any(left) else (draft + 1) % len(p)


def never_quite_zero(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draft if rng.random() < (p[draft] or 1e-1) / q[draft] else draw(left_of(p, q), rng)


def blames_the_drafter(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    if taken(p, q, draft, rng):
        return draft
    left = [x if b else 0.0 for x, b in zip(left_of(p, q), q, strict=True)]
    return draw(left, rng) if any(left) else p.index(max(p))


def noise_of_its_own(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return accept_or_replace(p, q, draft, random)


def changes_p(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    token = accept_or_replace(p, q, draft, rng)
    p[0] *= 1
    p[-1] += 1e-12
    return token


def some_other_rule(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    return draw([0.7, *[0.3 / (len(p) - 1)] * (len(p) - 1)], rng) if len(p) > 1 else 0


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (accept_always, "as if every draft were taken"),
        (only_if_p_is_larger, "taken only where p >= q"),
        (replaces_from_p, "replaced from p: draw from what p has more of"),
        (replaces_from_q, "replaced from q: draw from what p has more of"),
        (either_way, "cut the difference off at 0"),
        (not_cut_off, "Total of weights must be greater than zero"),
        (not_divided, "does not add up to 1, divide by the sum"),
        (not_divided_and_falls_through, "always return a token"),
        (by_p_alone, "taken with probability p: it is p/q"),
        (upside_down, "taken with probability q/p: it is p/q"),
        (the_likeliest, "replaced by the likeliest token"),
        (throws_drafts_away, "drafts that could be taken are thrown away"),
        (refuses_equals, "(p >= q) is always taken"),
        (never_quite_zero, "a token with p = 0 must never come out"),
        (blames_the_drafter, "a token that is never drafted (q = 0) must come out as well"),
        (noise_of_its_own, "draw from `rng` and nothing else"),
        (changes_p, "leave p and q as they are"),
        (some_other_rule, "tokens must come out as often as p says\n"),
    ],
)
def test_wrong_rules_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("10.2", function, rule)


# -- 10.2, right -----------------------------------------------------------------------------------


def by_one_number(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    """The number that decides is used again: below the threshold it is spent, above it is uniform anew."""
    ratio, u = p[draft] / q[draft], rng.random()
    if u < ratio:
        return draft
    left = left_of(p, q)
    u = (u - ratio) / (1 - ratio) * sum(left)
    for token, share in enumerate(left):
        if u < share:
            return token
        u -= share
    return max(range(len(left)), key=left.__getitem__)


def by_rejection(p: Any, q: Any, draft: Any, rng: Any) -> Any:
    """A draw from what is left: tokens of p, each kept with the share that q does not cover."""
    if q[draft] <= p[draft] or rng.random() * q[draft] < p[draft]:
        return draft
    while True:
        token = draw(p, rng)
        if rng.random() * p[token] < p[token] - q[token]:
            return token


@pytest.mark.parametrize("function", [accept_or_replace, by_one_number, by_rejection])
def test_right_rules_run_on_the_models(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("10.2", function)
    assert "After each of 192 tokens, an int8 copy drafted for tiny-random" in verdict.text
    assert "at most, on average" in repr(verdict.pictures[0][1])


def test_the_noise_of_the_model_makes_a_draft_right_nearly_as_often_as_can_be() -> None:
    """With a distance d between the two, (1 - d) / (1 + d) of the drafts at least (Daliri et al. 2024)."""
    mine, drafters = (each.exp() for each in e10._odds())
    d = float((mine - drafters).abs().sum(1).mean() / 2)
    assert 0.01 < d < 0.5
    assert overlap(mine[0].tolist(), drafters[0].tolist()) == pytest.approx(
        1 - float((mine - drafters)[0].abs().sum() / 2)
    )
    text = judge("10.2", accept_or_replace).text
    common = float(text.split("own noise, ")[1].split("%")[0])
    assert common > 100 * ((1 - d) / (1 + d) - 0.1)


def test_chance_of_is_that_of_the_chi_square_distribution() -> None:
    assert chance_of((50, 50), (0.5, 0.5)) == pytest.approx(1)
    assert chance_of((60, 40), (0.5, 0.5)) == pytest.approx(0.0455, abs=1e-4)  # two standard deviations
    assert chance_of((10, 20, 30), (1 / 3, 1 / 3, 1 / 3)) == pytest.approx(2.718281828**-5, rel=1e-6)
    assert chance_of((1, 99), (0.0, 1.0)) == 0


def test_no_two_mistakes_come_out_alike() -> None:
    """Otherwise a message could name a mistake that was not made."""
    shares = [tuple(round(x, 4) for x in some) for some in e10._mistakes(e10._P, e10._Q).values()]
    assert len({*shares, e10._P}) == len(shares) + 1
    assert all(sum(some) == pytest.approx(1, abs=1e-3) and min(some) >= 0 for some in shares)


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [("10.1", "accept"), ("10.2", "accept_or_replace")])
def test_the_folded_solution_is_right(number: str, name: str) -> None:
    assert_accepted(number, function_from(solution("10", number), name))


def test_an_untouched_stub_is_open() -> None:
    def accept(drafts: Any, chosen: Any) -> Any:
        raise NotImplementedError

    def accept_or_replace(p: Any, q: Any, draft: Any, rng: Any) -> Any:
        raise NotImplementedError

    assert_open("10.1", accept)
    assert_open("10.2", accept_or_replace)
