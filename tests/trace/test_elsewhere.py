"""Requests whose prompts another engine computes: where they are, in files, in states and in words."""

from __future__ import annotations

import json

import pytest

from labkit.trace.records import (
    Admission,
    Arrival,
    Blocks,
    Holding,
    Moved,
    OtherPool,
    StepRecord,
    TraceError,
    TraceMeta,
)
from labkit.trace.trace import Trace

META = TraceMeta(num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=16)


def apart() -> Trace:
    """a and b come; a's prompt is computed elsewhere and arrives; b's is not sent before."""
    there = OtherPool(8, (Holding("a", 4, (3,)),))
    left = OtherPool(8, (Holding("a", 6, (3, 5)),))
    sent = (Moved("a", "unsent", 6), Moved("b", "unsent", 5), Moved("a", "there", 6))
    return Trace(
        META,
        [
            StepRecord(0, moved=sent, free_blocks=8),
            StepRecord(1, other_pool=there, free_blocks=8),
            StepRecord(2, moved=(Moved("a", "arriving", 4096),), other_pool=left, free_blocks=8),
            StepRecord(
                3, ("a",), "p", (4,), (2,), ((9,),), arrived=(Arrival("a", 6, 4),), free_blocks=6,
                admitted=(Admission("a", 4, (0,), 6),), taken=(Blocks("a", (1,)),), other_pool=OtherPool(8),
                moved=(Moved("b", "there", 5),),
            ),
        ],
    )  # fmt: skip


def test_a_state_says_who_is_where() -> None:
    trace = apart()
    places = [{name: moved.place for name, moved in trace.state(step).elsewhere.items()} for step in range(4)]
    assert places == [
        {"a": "there", "b": "unsent"},
        {"a": "there", "b": "unsent"},
        {"a": "arriving", "b": "unsent"},
        {"b": "there"},
    ]
    held = [trace.state(step).other_pool for step in range(4)]
    assert held[0] is None and held[1].tables[0].blocks == (3,) and held[3].tables == ()
    assert trace.why("a", 2) == "request a has its pages on the way here"
    assert "before its prompt is sent" in trace.why("b", 2)
    assert trace.why("a", 3) == "request a is running"


def test_a_file_keeps_it() -> None:
    assert Trace.from_lines(apart().lines()) == apart()


def test_a_shortened_trace_says_it_too() -> None:
    whole, short = apart(), Trace(META, max_steps=1)
    for record in whole.records[:3]:
        short.append(record)
    for step in (1, 2):
        if step in [record.step for record in short]:
            assert short.state(step).elsewhere == whole.state(step).elsewhere
            assert short.state(step).other_pool == whole.state(step).other_pool
    assert len(short) < 3


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"moved": [["a", "nowhere", 6]]}, "a place must be one of unsent, there, arriving, not 'nowhere'"),
        ({"moved": [["a", "there", -1]]}, "a count is negative"),
        ({"moved": [["a", "there", 1, 1]]}, "too many values"),
        ({"other_pool": [0, []]}, "the other pool must have 1 to"),
        ({"other_pool": [8, [["a", 4, [8]]]]}, "request 'a' holds blocks outside the other pool of 8"),
        ({"other_pool": [8, [["a", 5, [1]]]]}, "request 'a' has more tokens in the other pool"),
        ({"other_pool": [8, [["a", -1, [1]]]]}, "request 'a' has more tokens in the other pool"),
        ({"other_pool": [8]}, "not enough values"),
        ({"other_pool": "x"}, "other_pool: expected a list"),
    ],
)
def test_a_line_that_cannot_be_is_refused(change: dict, complaint: str) -> None:
    lines = list(apart().lines())
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    with pytest.raises(TraceError, match=complaint):
        Trace.from_lines(lines)
