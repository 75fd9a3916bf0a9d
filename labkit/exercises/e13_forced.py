"""Exercise 13.2: the bytes that a form forces, which need no step each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import PROMPTS, expect_same_answers, timelines, tiny_engine, whole
from labkit.exercises.e13_mask import OwnForms, state_after
from labkit.sampling_params import SamplingParams
from labkit.structured.regex_dfa import regex_dfa


def forced(table: np.ndarray, accepting: np.ndarray, state: int) -> tuple[bytes, set[int]]:
    """The bytes that must come next, and those among which there is a choice after them."""
    text = bytearray()
    while True:
        nexts = np.flatnonzero(table[state]).tolist()
        if accepting[state] or len(nexts) != 1:
            return bytes(text), set(nexts)
        text += bytes(nexts)
        state = int(table[state, nexts[0]])


# -- what is right --------------------------------------------------------------------------------

_SHAPE = "return two things: the forced bytes, and the bytes that may follow them"
_CHOICE = "stop where several bytes lead on: there the model chooses"
_END = "stop where the answer may end: the model may want to end it there"
_MORE = "go on as long as exactly one byte leads on: each is a step saved"
_BEGIN = "begin at `state`, where the answer stands"
_OTHER = "the forced bytes are those on the only way through the table"
_FOLLOWS = "what may follow are the bytes that lead on from the state in which you stopped"
_KEEP = "leave the table as it is"


def _cases() -> Iterator[tuple[str, bytes]]:
    """A form, and what is written of it: the smallest first."""
    yield "a", b""
    yield "a|b", b""
    yield "abc", b""
    yield "abc", b"a"
    yield "abc", b"abc"
    yield "ab|ac", b""
    yield "a|ab", b""
    yield "ab?", b"a"
    yield "(ab)?", b""
    yield "a*", b""
    yield "abc(de)*", b"a"
    yield "abc(de)*f", b"a"
    yield "\\x00\\x00(\\x00|a)", b""
    yield "ü|ö", b""
    yield "grüße|grün", b"g"
    yield '\\{"name": "[a-z]+", "age": [0-9]+\\}', b""
    yield '\\{"name": "[a-z]+", "age": [0-9]+\\}', b'{"name": "a"'
    yield '\\{"ok": (true|false)\\}', b'{"ok": t'
    yield '\\{"ok": (true|false)\\}', b'{"ok": f'
    yield "(abc){20}d?", b"ab"
    yield "x{300}|y", b"x"
    yield "a(bc|d)e", b"ad"
    yield "a(bc|de)+", b"ab"
    yield "[ab]cde", b"b"


def _examine(function: Callable[..., Any]) -> None:
    for form, written in _cases():
        dfa = regex_dfa(form, frozenset(range(256)))
        state = state_after(dfa, written)
        right, after = forced(dfa.table, dfa.accepting, state)
        table, accepting = dfa.table.copy(), dfa.accepting.copy()
        told = f"form: {form!r}, written so far: {written.decode()!r}\n"
        text, follows = _read(function(table, accepting, state), told)
        told += f"yours: {_short(text)} and then one of {_letters(follows)}\n"
        told += f"right: {_short(right)} and then one of {_letters(after)}"
        same = (table == dfa.table).all() and (accepting == dfa.accepting).all()
        expect(bool(same), _KEEP, told)
        if text != right:
            raise Wrong(_why(text, right, dfa.accepting, dfa.table, dfa.start, state), told)
        expect(follows == after, _FOLLOWS, told)


def _why(text: bytes, right: bytes, accepting: np.ndarray, table: np.ndarray, start: int, state: int) -> str:
    """The rule that these bytes break."""
    if start != state and text == forced(table, accepting, start)[0]:
        return _BEGIN
    if right.startswith(text):
        return _MORE
    if not text.startswith(right):
        return _OTHER
    for byte in right:
        state = int(table[state, byte])
    return _END if accepting[state] else _CHOICE


def _read(returned: Any, told: str) -> tuple[bytes, set[int]]:
    told += f"yours: {returned!r}"[:300]
    try:
        text, follows = returned
        if isinstance(text, str) or isinstance(follows, str):
            raise Wrong(_SHAPE, told)
        numbers = [[whole(byte) for byte in part] for part in (text, follows)]
    except (TypeError, ValueError):
        raise Wrong(_SHAPE, told) from None
    for part in numbers:
        expect(all(byte is not None and 0 <= byte < 256 for byte in part), _SHAPE, told)
    text, follows = ([byte for byte in part if byte is not None] for part in numbers)
    return bytes(text), set(follows)


def _short(text: bytes) -> str:
    return repr(text) if len(text) < 80 else f"{text[:40]!r}... ({len(text)} bytes)"


def _letters(follows: set[int]) -> str:
    some = sorted(follows)
    told = repr(bytes(some[:30])) + (" ..." if len(some) > 30 else "")
    return told if some else "none (the end)"


# -- in the engine --------------------------------------------------------------------------------

FORM = '\\{"first_name": "[A-Z][a-z]{1,5}", "years_of_age": [1-9][0-9]?, "is_a_member": (true|false)\\}'


def answer(jump_ahead: bool, force: Callable[..., Any] | None = None) -> Engine:
    """Fill in a form for each prompt, with tiny-random."""
    engine = tiny_engine(num_blocks=64, jump_ahead=jump_ahead)
    if force:
        engine.forms = OwnForms(engine.model, force=force)
    for number, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=90, temperature=1.0, seed=number, structured={"regex": FORM})
        engine.add_request(prompt, params)
    engine.run()
    return engine


def _run(function: Callable[..., Any]) -> Run:
    jumps, steps, reference = answer(True, function), answer(False, function), answer(True)
    expect_same_answers(jumps, reference, "with your forced bytes come the answers of the engine's own")
    expect_same_answers(jumps, steps, "the answers are the same with one step for each token")
    tokens = sum(len(output.token_ids) for output in jumps.outputs.values())
    only = sum(row.num_forced for record in jumps.trace for row in record.rows)
    sentence = (
        f"In the engine, {len(PROMPTS)} forms of {tokens} tokens in {len(jumps.trace)} steps with your "
        f"function, {len(reference.trace)} with the reference, {len(steps.trace)} with one for each token. "
        f"{only} tokens were the only ones allowed. The tokens are the same in all three."
    )
    pictures = timelines({"With your function:": jumps.trace, "A step for each token:": steps.trace})
    return Run(sentence, pictures)


FORCED = Exercise("13.2", "what a form forces", forced, _examine, _run)
