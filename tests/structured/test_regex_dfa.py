"""Our automata match what Python's `re.fullmatch` does; what they cannot match is named."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.structured.regex_dfa import ByteDFA, regex_dfa

ALPHABET = (
    "abB1_- .\n\t\u00e9\u0660\u20ac\u4e00\U0001f600"  # of one to four bytes; letters, digits and others
)
ATOMS = [re.escape(char) for char in ALPHABET]
ATOMS += [
    ".",
    r"\d",
    r"\D",
    r"\w",
    r"\W",
    r"\s",
    r"\S",
    "[a-c]",
    "[^a]",
    r"[\d_]",
    r"[^\w ]",
    "[\u00e0-\u4e00]",
    "[B-b]",
]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?", "??", "{1,2}?"]
GROUPS = ["(?:{})", "({})", "(?P<n>{})", "(?s:{})", "(?a:{})"]


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner | st.just(""), min_size=2, max_size=3).map("|".join).map("(?:{})".format),
        st.tuples(inner.map("(?:{})".format), st.sampled_from(REPEATS)).map("".join),
        st.tuples(st.sampled_from(GROUPS), inner).map(lambda pair: pair[0].format(pair[1])),
    )


patterns = st.recursive(st.sampled_from(ATOMS), _larger, max_leaves=6).filter(
    lambda pattern: pattern.count("(?P<n>") < 2
)
whole = st.tuples(st.sampled_from(["", "^", r"\A"]), patterns, st.sampled_from(["", "$", r"\Z"])).map("".join)


def matches(dfa: ByteDFA, text: str) -> bool:
    state = dfa.start
    for byte in text.encode():
        state = dfa.table[state, byte]
    return bool(dfa.accepting[state])


@given(whole, st.lists(st.text(ALPHABET, max_size=6), min_size=1, max_size=20), st.data())
def test_an_automaton_matches_what_fullmatch_does(
    pattern: str, texts: list[str], data: st.DataObject
) -> None:
    dfa = regex_dfa(pattern)
    if dfa.start and "(?a" not in pattern:
        texts.append(data.draw(st.from_regex(pattern, fullmatch=True)))
    for text in texts:
        if len(text) < 20:  # backtracking takes its time
            assert matches(dfa, text) == bool(re.fullmatch(pattern, text)), (pattern, text)


@given(patterns)
def test_every_state_leads_to_a_match_and_the_shortest_is_known(pattern: str) -> None:
    dfa = regex_dfa(pattern)
    assert not dfa.table[0].any() and not dfa.accepting[0]
    here, steps = {dfa.start}, 0
    while not any(dfa.accepting[state] for state in here):  # breadth first
        here = {int(after) for state in here for after in dfa.table[state] if after}
        steps += 1
        assert here
    assert steps == dfa.shortest
    left = {int(state) for state in dfa.accepting.nonzero()[0]}
    while True:
        more = {state for state in range(1, len(dfa.table)) if left.intersection(dfa.table[state].tolist())}
        if more <= left:
            break
        left |= more
    reached, todo = {dfa.start}, [dfa.start]
    while todo:
        todo += (new := set(dfa.table[todo.pop()].tolist()) - {0} - reached)
        reached |= new
    assert reached <= left


@pytest.mark.parametrize(
    "pattern", [r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", ".", "(?s:.)", r"(?a:\w)", "[^\u00e9]"]
)
def test_a_class_has_the_characters_that_python_has_in_it(pattern: str) -> None:
    dfa, wanted = regex_dfa(pattern), re.compile(pattern)
    for point in (*range(0x3000), *range(0x3000, 0xD800, 97), *range(0xE000, sys.maxunicode + 1, 997)):
        assert matches(dfa, chr(point)) == bool(wanted.fullmatch(chr(point))), hex(point)


def test_bytes_that_are_no_utf8_match_nothing() -> None:
    dfa = regex_dfa("(?s:.)*")
    for bad in (
        b"\x80",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"\xe0\x80\x80",
        b"\xf4\x90\x80\x80",
    ):
        state = dfa.start
        for byte in bad:
            state = dfa.table[state, byte]
        assert state == 0, bad


def test_what_cannot_be_written_is_left_out() -> None:
    dfa = regex_dfa("a|\u00e9|\u20ac", frozenset(b"a\xe2\x82"))
    assert [matches(dfa, text) for text in ("a", "\u00e9", "\u20ac")] == [True, False, False]
    assert dfa.table[dfa.start].nonzero()[0].tolist() == [ord("a")]  # and nothing leads towards it


@pytest.mark.parametrize("pattern", [r"[^\d\D]", "[\ud800-\udfff]", r"a[^\w\W]+"])
def test_an_empty_language_has_no_first_state(pattern: str) -> None:
    assert regex_dfa(pattern).start == 0


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (r"(?=a)a", "lookaround"),
        (r"a(?!b).", "lookaround"),
        (r"(?<=a)b", "lookaround"),
        (r"(a)\1", "a backreference"),
        (r"(?P<n>a)(?P=n)", "a backreference"),
        (r"(a)?(?(1)b|c)", "a condition"),
        (r"a\bb", "a word boundary"),
        (r"a\Bb", "a word boundary"),
        (r"a^b", r"\^ elsewhere"),
        (r"(a$|b)c", r"\$ elsewhere"),
        (r"(?i)a", "IGNORECASE"),
        (r"(?m)^a$", "MULTILINE"),
        (r"a(?i:b)", "flags i and m"),
        (r"[a-", "unterminated character set"),
        (r"*a", "nothing to repeat"),
        ("(" * 5000 + ")" * 5000, "recursion"),
    ],
)
def test_what_is_not_supported_is_named(pattern: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"structured: regex: .*{part}"):
        regex_dfa(pattern)


@pytest.mark.parametrize("pattern", ["(?>a+)b", "a++b"])
def test_what_only_newer_pythons_know_is_not_supported_either(pattern: str) -> None:
    with pytest.raises(ValueError, match="structured: regex: "):
        regex_dfa(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "a{20000}",
        "(a|b)*a(a|b){20}",
        r"\w{1,5000}",
        "((a?){100}){1000}",
        "(.*a.{14})",
        "(((a{99}){99}){99}){99}",
    ],
)
def test_what_would_grow_without_end_is_refused_soon(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"structured: regex: .* more than"):
        regex_dfa(pattern)
