"""Text as it streams: whole characters, exact stops, nothing lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.models.detokenizer import IncrementalDetokenizer
from labkit.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = ["Hello, world", "naïve café, 東京 🌊🏳️‍🌈", "a\n\n\tb  c ", "\u200b\ufeff", "日本語"]


def shown(stream: IncrementalDetokenizer, tokens: list[int]) -> list[str]:
    """What a reader sees after each token, and at the end."""
    seen = []
    for token in tokens:
        if stream.push(token):
            return [*seen, stream.text]
        seen.append(stream.text)
    stream.finish()
    return [*seen, stream.text]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_only_grow_and_end_in_the_whole(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    seen = shown(IncrementalDetokenizer(TOKENIZER), tokens)
    assert seen[-1] == text
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before)
        assert not before.endswith("\ufffd")


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_tokens_end_in_what_decode_says(tokens: list[int]) -> None:
    seen = shown(IncrementalDetokenizer(TOKENIZER), tokens)
    assert seen[-1] == TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert not any(text.endswith("\ufffd") for text in seen[:-1])


def test_an_unfinished_character_is_held_back_until_the_end() -> None:
    tokens = TOKENIZER.encode("ab🌊")[:-1]  # the last byte never comes
    seen = shown(IncrementalDetokenizer(TOKENIZER), tokens)
    assert seen[-2] == "ab"
    assert seen[-1].startswith("ab\ufffd")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_exactly_and_never_show_their_head(text: str, stops: list[str]) -> None:
    tokens = [token for letter in text for token in TOKENIZER.encode(letter)]
    seen = shown(IncrementalDetokenizer(TOKENIZER, stops), tokens)
    places = [text.find(stop) for stop in stops if stop in text]
    # The stop that is complete first ends the text; of those complete at once, the one that began first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not places:
        assert seen[-1] == text
    else:
        first = min(ends)
        cut = min(text[:first].find(stop) for stop in stops if stop in text[:first])
        assert seen[-1] == text[:cut]
    for before in seen:
        assert seen[-1].startswith(before), "something was shown that had to be taken back"


def test_a_stop_string_across_tokens_and_inside_one() -> None:
    tokens = TOKENIZER.encode("one two three")
    stream = IncrementalDetokenizer(TOKENIZER, ["wo th"])
    assert shown(stream, tokens)[-1] == "one t"
    assert shown(IncrementalDetokenizer(TOKENIZER, ["thre"]), tokens)[-1] == "one two "


def test_a_tokenizer_without_a_backend_gives_the_same() -> None:
    class Slow:
        decode = staticmethod(TOKENIZER.decode)

    for text in TEXTS:
        tokens = TOKENIZER.encode(text)
        assert shown(IncrementalDetokenizer(Slow()), tokens) == shown(
            IncrementalDetokenizer(TOKENIZER), tokens
        )


def test_special_tokens_are_no_text() -> None:
    tokens = [*TOKENIZER.encode("hi"), TOKENIZER.eos_token_id]
    assert shown(IncrementalDetokenizer(TOKENIZER), tokens)[-1] == "hi"


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=2),
    st.integers(0, 6),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_that_end_too_early_are_text(
    text: str, stops: list[str], least: int, keep: bool
) -> None:
    """With a token for each letter: a stop string counts if its last letter comes after the first tokens."""
    tokens = [token for letter in text for token in TOKENIZER.encode(letter)]
    stream = IncrementalDetokenizer(TOKENIZER, stops, min_tokens=least, keep_stop=keep)
    seen = shown(stream, tokens)
    expected = text
    for length in range(least + 1, len(text) + 1):
        if found := [stop for stop in stops if text[:length].endswith(stop)]:
            expected = text[:length] if keep else text[: length - max(map(len, found))]
            break
    assert seen[-1] == expected
    for before in seen:
        assert seen[-1].startswith(before), "something was shown that had to be taken back"
