"""The exercises of notebook 13: what is refused and why, and what the engine does with what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.exercises import e13, judge
from labkit.exercises.common import answers, tiny_engine
from labkit.exercises.e13_forced import answer as jump
from labkit.exercises.e13_forced import forced
from labkit.exercises.e13_mask import allowed, answer, state_after, tree
from labkit.structured.token_dfa import TokenDFA
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution
from tests.structured.forms import vocabulary
from tests.structured.test_token_dfa import PATTERNS

REFERENCES: dict[str, Callable[..., Any]] = {"13.1": allowed, "13.2": forced}
NAMES = {"13.1": "allowed", "13.2": "forced"}
SAID = {"13.1": "the engine's own answers", "13.2": "The tokens are the same in all three"}

# -- 13.1 ------------------------------------------------------------------------------------------


@given(st.sampled_from(PATTERNS), st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_the_reference_is_the_engines_mask_in_any_state(pattern: str, number: int) -> None:
    form = TokenDFA(pattern, vocabulary())
    state = 1 + number % (len(form.dfa.table) - 1)
    ids = allowed(tree(vocabulary().tokens), form.dfa.table, state)
    assert sorted(ids) == np.flatnonzero(form.mask(state)).tolist()


def everywhere(root: Any, table: Any, state: Any) -> list[int]:
    found = list(root.tokens)
    for byte, child in root.children.items():
        found += everywhere(child, table, table[state, byte])
    return found


def with_dead_ends(root: Any, table: Any, state: Any) -> list[int]:
    found = list(root.tokens) if state else []
    for byte, child in root.children.items():
        found += with_dead_ends(child, table, table[state, byte])
    return found


def whole_words(root: Any, table: Any, state: Any) -> list[int]:
    return allowed(root, np.where(table[table].any(-1), 0, table), state)


def pops(root: Any, table: Any, state: Any) -> list[int]:
    found = allowed(root, table, state)
    root.children.popitem()
    return found


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (everywhere, "a token is refused if any of its bytes leads to state 0"),
        (with_dead_ends, "leave a branch where it dies"),
        (whole_words, "a token is allowed if each of its bytes leads on"),
        (lambda root, table, state: allowed(root, table, 1), "begin at `state`"),
        (lambda root, table, state: [], "a token is allowed"),
        (pops, "leave the tree and the table as they are"),
        (lambda root, table, state: [*allowed(root, table, state), 99], "ids that the nodes hold"),
        (lambda root, table, state: None, "return the ids of the tokens"),
        (lambda root, table, state: "0", "return the ids of the tokens"),
        (lambda root, table, state: [True], "return the ids of the tokens"),
        (lambda root, table, state: [0.5], "return the ids of the tokens"),
    ],
)
def test_wrong_masks_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("13.1", function, rule)


def test_what_a_message_shows_is_the_smallest_case() -> None:
    text = judge("13.1", everywhere).text
    assert "tokens: 0 'a'  1 'b'" in text and "form: 'a', written so far: ''" in text
    assert "yours: [0, 1]\n  right: [0]" in text and "for example b'b'" in text


def test_masks_in_the_engine_are_those_of_the_function() -> None:
    """The comparison in the engine can fail: with masks that leave tokens out, the answers are others."""
    engines = [tiny_engine(num_blocks=64) for _ in range(3)]
    own, same, less = (
        answer(engine, e13.OwnForms(engine.model, mask=mask) if mask else None)
        for engine, mask in zip(engines, (None, allowed, lambda *where: allowed(*where)[:-1]), strict=True)
    )
    assert answers(own) == answers(same) != answers(less)


# -- 13.2 ------------------------------------------------------------------------------------------


@given(st.sampled_from(PATTERNS), st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_what_the_reference_forces_is_what_the_engine_does(pattern: str, number: int) -> None:
    form = TokenDFA(pattern, vocabulary())
    state = 1 + number % (len(form.dfa.table) - 1)
    assert forced(form.dfa.table, form.dfa.accepting, state) == form.forced_bytes(state)


def past_ends(table: Any, accepting: Any, state: Any) -> Any:
    return forced(table, np.where(table.any(-1), False, accepting), state)


def one_byte(table: Any, accepting: Any, state: Any) -> Any:
    text, follows = forced(table, accepting, state)
    return text[:1], follows


def the_first_of_several(table: Any, accepting: Any, state: Any) -> Any:
    text, follows = forced(table, accepting, state)
    return (text + bytes([min(follows)]) if follows and not accepting[state] else text), follows


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (past_ends, "stop where the answer may end"),
        (one_byte, "go on as long as exactly one byte leads on"),
        (the_first_of_several, "stop where several bytes lead on"),
        (lambda table, accepting, state: forced(table, accepting, 1), "begin at `state`"),
        (lambda *where: (forced(*where)[0], ()), "what may follow are the bytes that lead on"),
        (lambda *where: (b"z" * len(forced(*where)[0]), forced(*where)[1]), "on the only way"),
        (lambda *where: forced(*where)[0], "return two things"),
        (lambda *where: None, "return two things"),
        (lambda *where: ([256], ()), "return two things"),
        (lambda *where: ("a", ()), "return two things"),
        (lambda table, *where: (forced(table, *where), table.fill(0))[0], "leave the table as it is"),
    ],
)
def test_wrong_jumps_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("13.2", function, rule)


def test_a_jump_saves_steps_and_changes_no_token() -> None:
    jumps, steps = jump(True, forced), jump(False, forced)
    assert answers(jumps) == answers(steps)
    assert len(jumps.trace) < len(steps.trace) / 3


def test_less_that_is_forced_saves_fewer_steps() -> None:
    assert len(jump(True, one_byte).trace) > len(jump(True, forced).trace)


# -- both ------------------------------------------------------------------------------------------


def test_a_state_after_a_text_is_that_of_its_bytes() -> None:
    dfa = TokenDFA("yes|no", vocabulary()).dfa
    assert state_after(dfa, b"") == dfa.start and state_after(dfa, b"x") == 0
    assert dfa.accepting[state_after(dfa, b"no")]


@pytest.mark.parametrize("exercise", REFERENCES)
def test_the_reference_and_the_folded_solution_are_right(exercise: str) -> None:
    verdict = assert_accepted(exercise, REFERENCES[exercise])
    assert SAID[exercise] in verdict.text and verdict.pictures
    assert_accepted(exercise, function_from(solution("13", exercise), NAMES[exercise]))


@pytest.mark.parametrize("exercise", REFERENCES)
def test_an_untouched_stub_is_open(exercise: str) -> None:
    def stub(*arguments: Any) -> Any:
        raise NotImplementedError

    assert_open(exercise, stub)
