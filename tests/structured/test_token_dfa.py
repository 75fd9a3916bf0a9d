"""Masks allow exactly the tokens after which the form can still be reached."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.structured.token_dfa import TokenDFA
from tests.structured.forms import guidance, tokens_of, vocabulary, walk
from tests.structured.test_regex_dfa import patterns

PATTERNS = [
    r"yes|no|not now",
    r"[a-z]+",
    r"\d{1,3}(\.\d+)?",
    r"(the|a) [a-z]{3,9}( and (the|a) [a-z]+)*\.?",
    r"[A-Z][a-z]+ [A-Z]\.",
    r'\{"name": "[^"\n]*", "age": \d+\}',
    r"a{3,7}b*|c(d|ef)+",
    "gr\u00fc\u00df|\u4e00+|\U0001f600",
]


def leads_on(form: TokenDFA, text: bytes) -> bool:
    state = form.dfa.start
    for byte in text:
        state = int(form.dfa.table[state, byte])
    return bool(state)


@given(st.sampled_from(PATTERNS) | patterns, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_a_mask_is_what_trying_every_token_gives(pattern: str, rng: random.Random) -> None:
    form = TokenDFA(pattern, vocabulary())
    for text, allowed in walk(form.start(), rng, 5):
        tried = {
            token for token, data in enumerate(vocabulary().tokens) if data and leads_on(form, text + data)
        }
        assert allowed == tried, (pattern, text)


@given(st.sampled_from(PATTERNS[:-1]), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_both_backends_allow_the_same(pattern: str, rng: random.Random) -> None:
    pattern = pattern.replace(r"\d", "[0-9]")  # the two know different versions of Unicode
    ours = TokenDFA(pattern, vocabulary()).start()
    theirs = guidance().compile("grammar", f"start: /{pattern}/").start()
    for _ in range(10):
        allowed = tokens_of(ours.mask())
        assert allowed == (set() if theirs.is_over else tokens_of(theirs.mask()))
        assert ours.may_end == theirs.may_end and ours.is_over == theirs.is_over
        if not allowed:
            break
        token = rng.choice(sorted(allowed))
        assert ours.advance(token) and theirs.advance(token)


@given(st.sampled_from(PATTERNS), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_an_answer_that_may_end_has_the_form(pattern: str, rng: random.Random) -> None:
    matcher = TokenDFA(pattern, vocabulary()).start()
    ends = [matcher.may_end]
    texts = []
    for text, allowed in walk(matcher, rng, 20):
        texts.append(text)
        assert allowed or matcher.is_over
        ends.append(matcher.may_end)
    for text, may_end in zip(texts, ends[1:], strict=True):
        assert may_end == bool(re.fullmatch(pattern, text.decode(errors="surrogateescape"))), text


def test_what_breaks_the_form_changes_nothing_and_what_fits_is_taken_back() -> None:
    encode = vocabulary().encode
    matcher = TokenDFA("abc|abd", vocabulary()).start()
    a, b, c, d = encode(b"abcd")
    assert not matcher.advance(c)
    assert matcher.advance(a) and not matcher.advance(a) and matcher.advance(b)
    assert tokens_of(matcher.mask()) == {c, d}
    assert matcher.advance(c) and matcher.may_end and matcher.is_over
    assert not matcher.advance(d)
    matcher.rollback(2)
    matcher.rollback(0)
    assert tokens_of(matcher.mask()) == {b} and not matcher.may_end
    assert not matcher.advance(next(t for t, data in enumerate(vocabulary().tokens) if not data))


WORDS = [
    "the same",
    "the same thing",
    "them",
    "together",
    "12:30",
    "12:35",
    "a  b",
    "\u4e00\u4e8c",
    "\u4e00\u4e09",
]


@given(
    st.lists(st.sampled_from(WORDS) | st.text("the .\u00e9", min_size=1, max_size=8), min_size=1, max_size=4)
)
def test_forced_tokens_are_those_of_every_answer_as_the_tokenizer_writes_it(choices: list[str]) -> None:
    form = TokenDFA("|".join(map(re.escape, choices)), vocabulary())
    forced = form.start().forced()
    for choice in choices:
        assert vocabulary().encode(choice.encode())[: len(forced)] == forced
    matcher = form.start()
    for token in forced:
        assert token in tokens_of(matcher.mask())
        assert matcher.advance(token)


def test_text_that_is_forced_to_its_end_is_forced_whole() -> None:
    form = TokenDFA(re.escape("thank you, and that is all"), vocabulary())
    assert form.start().forced() == vocabulary().encode(b"thank you, and that is all")


def test_text_that_is_not_as_the_tokenizer_writes_it_forces_nothing() -> None:
    form = TokenDFA("(x| to|y) and so on", vocabulary())
    whole = form.start()
    (to,) = vocabulary().encode(b" to")
    assert whole.advance(to) and vocabulary().written(whole.forced()) == b" and so on"
    apart = form.start()
    for byte in b" to":
        assert apart.advance(vocabulary().encode(bytes([byte]))[0])
    assert apart.forced() == []


def test_the_fewest_tokens_are_a_lower_bound() -> None:
    form = TokenDFA("(word ){40}", vocabulary())
    assert 1 < form.fewest_tokens <= len(vocabulary().encode(b"word " * 40))


def test_a_form_without_an_answer_is_refused() -> None:
    for pattern in (r"a[^\d\D]", "[\ud800-\udfff]"):
        with pytest.raises(ValueError, match="no answer that this model can write has this form"):
            TokenDFA(pattern, vocabulary())
