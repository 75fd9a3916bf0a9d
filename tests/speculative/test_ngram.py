"""N-grams draft what followed when they were last seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import SamplingParams
from labkit.core.request import Request
from labkit.speculative.ngram import NgramDrafter


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), data=st.data())
def test_ngram_drafts_follow_the_longest_and_latest_match(tokens: list[int], data: st.DataObject) -> None:
    drafter = NgramDrafter(longest=4, shortest=2)
    count = data.draw(st.integers(1, 6))
    request = Request("0", tokens[:1], SamplingParams())
    for length in range(1, len(tokens) + 1):  # it reads on where it stopped
        if data.draw(st.booleans()) or length == len(tokens):
            request.token_ids = tokens[:length]
            assert drafter.propose([(request, count)]) == [by_hand(tokens[:length], count)]


@pytest.mark.parametrize(("longest", "shortest", "field"), [(2, 4, "longest"), (4, 0, "shortest")])
def test_ngrams_of_no_size_are_refused(longest: int, shortest: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be between"):
        NgramDrafter(longest, shortest)


def by_hand(tokens: list[int], count: int) -> tuple[int, ...]:
    for size in (4, 3, 2):
        end = tokens[-size:]
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(end) == size and tokens[place - size : place] == end:
                text = list(tokens)
                for i in range(count):
                    text.append(text[place + i])
                return tuple(text[len(tokens) :])
    return ()
