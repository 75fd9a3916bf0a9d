"""A request grows by a token at a time, and `append` alone decides where it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from labkit.core.request import Request
from labkit.sampling_params import SamplingParams

TOKENS = st.integers(0, 9)


class Reader:
    """Takes note of what it reads, and finds a stop string at some of the tokens."""

    def __init__(self, stops: set[int]) -> None:
        self.stops, self.text, self.seen = stops, "", []

    def push(self, token: int) -> bool:
        self.seen.append(token)
        return token in self.stops

    def finish(self) -> bool:
        return False


@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=5),
    answer=st.lists(TOKENS, min_size=1, max_size=12),
    max_tokens=st.integers(1, 12),
    room=st.integers(0, 12),
    stop_ids=st.frozensets(TOKENS, max_size=2),
    reads=st.none() | st.sets(TOKENS, max_size=2),
)
def test_a_request_ends_at_the_first_stop_or_at_its_length(
    prompt, answer, max_tokens, room, stop_ids, reads
) -> None:
    reader = None if reads is None else Reader(reads)
    request = Request(
        "r",
        prompt,
        SamplingParams(max_tokens=max_tokens),
        max_len=room and len(prompt) + room,  # 0: its own max_tokens count
        stop_ids=stop_ids,
        reader=reader,
    )
    length = room or max_tokens
    reasons = []
    for token in answer:
        reasons.append(request.append(token))
        if reasons[-1]:
            break
    taken = answer[: len(reasons)]
    assert request.token_ids == [*prompt, *taken]
    assert request.output_token_ids == taken
    assert reader is None or reader.seen == taken, "the reader sees every token, the last one too"
    stops = [token in stop_ids or token in (reads or ()) for token in taken]
    assert not any(stops[:-1]) and reasons[:-1] == [None] * (len(taken) - 1) and len(taken) <= length
    expected = "stop" if stops[-1] else "length" if len(taken) == length else None
    assert reasons[-1] == expected, "a stop counts more than the length that is reached with it"


def test_the_callers_prompt_stays_as_it_was_and_a_look_ahead_too() -> None:
    prompt = [1, 2, 3]
    request = Request("r", prompt, SamplingParams(max_tokens=4), seed=5)
    request.append(7)
    assert prompt == [1, 2, 3]
    ahead = request.ahead([8, 9])
    assert (ahead.token_ids, ahead.output_token_ids, ahead.seed) == ([1, 2, 3, 7, 8, 9], [7, 8, 9], 5)
    assert request.token_ids == [1, 2, 3, 7]


def test_requests_are_told_apart_by_what_they_are_and_not_by_what_they_hold() -> None:
    one, same = (Request("r", [1], SamplingParams()) for _ in range(2))
    assert one != same and len({one, same}) == 2
    one.num_computed_tokens = 1
    assert repr(one) == "Request('r', waiting, computed 1 of 1 tokens, prompt 1)"
