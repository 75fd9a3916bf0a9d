"""Whatever the reader accepts can be drawn, replayed and exported."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from labkit.page.upload import read_upload
from labkit.trace.records import TraceError
from labkit.trace.trace import Trace
from labkit.views import perfetto, picture, replay_data
from labkit.views.live_feed import Feed
from tests.views.bent import bend
from tests.views.stories import busy, draft_story, run, story, timed

SOURCES = [list(trace.lines()) for trace in (story(), draft_story(), timed(busy()), run([(0, "a", 5, 3)]))]


def replay(trace: Trace) -> None:
    """What the page does with a file."""
    packed = replay_data.pack(trace)
    lanes = replay_data.lanes_of(trace)
    shown = [replay_data.frames(trace, lanes, place, 32) for place in range(0, len(trace), 16)]
    json.dumps([packed, shown], allow_nan=False)
    json.loads("".join(perfetto.lines(trace)))
    assert Trace.from_lines(trace.lines()) == trace


def draw(trace: Trace) -> None:
    """What a notebook and a terminal do with it."""
    pictures = [picture.timeline(trace), picture.throughput(trace), picture.token_timeline(trace)]
    pictures += [picture.heatmap(trace, step) for step in {trace[0].step, trace[-1].step}]
    for drawn in pictures:
        json.loads(drawn.figure.to_json())
        assert all(char.isprintable() or char == "\n" for char in drawn.twin)
    for record in trace:
        for who in {"a", *record.requests}:
            assert trace.why(who, record.step).isprintable()
    feed = Feed(trace.meta)
    for record in trace:
        feed.append(record)
    json.dumps(feed.pictures("", -1, feed.frame()), allow_nan=False)


def everything(lines: list[str]) -> bool:
    try:
        trace = read_upload("\n".join(lines).encode())
    except TraceError as error:
        assert str(error).isprintable()
        return False
    replay(trace)
    draw(trace)
    return True


@given(st.integers(0, 10**9), st.integers(0, len(SOURCES) - 1))
def test_a_bent_trace_is_refused_or_can_be_shown(seed: int, source: int) -> None:
    everything(bend(SOURCES[source], seed))


def test_many_bent_traces_are_accepted() -> None:
    assert sum(everything(bend(SOURCES[0], seed)) for seed in range(100)) > 10
