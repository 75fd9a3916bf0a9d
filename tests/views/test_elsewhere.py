"""Requests whose prompts another engine computes, in words and in what a browser is told."""

from __future__ import annotations

from labkit.trace.records import OtherPool
from labkit.views import replay_data, style, text
from labkit.views.events import events_of
from labkit.views.live_feed import Feed
from labkit.views.wire import Elsewhere, FarPool, Table
from tests.trace.test_elsewhere import apart
from tests.views.stories import story


def test_the_text_of_a_pool_says_what_the_other_one_holds() -> None:
    trace = apart()
    told = [text.block_heatmap(trace, step).split("free", 2)[-1] for step in range(4)]
    assert "the prefill engine" not in told[0] and "there: a; unsent: b" in told[0]
    assert "the prefill engine: 1 of 8 blocks owned; a has 4 tokens in 1 block" in told[1]
    assert "2 of 8 blocks owned; a has 6 tokens in 2 blocks" in told[2]
    assert "arriving: a; unsent: b; in flight: 4.1 kB" in told[2]
    assert "0 of 8 blocks owned" in told[3] and "there: b" in told[3] and "in flight" not in told[3]
    assert "prefill engine" not in text.block_heatmap(story())


def test_the_log_and_a_replay_say_where_requests_go() -> None:
    trace = apart()
    events = [(event.kind, event.request, event.first) for event in events_of(trace[0])]
    assert events == [("unsent", "a", 6), ("unsent", "b", 5), ("there", "a", 6)]
    frames = replay_data.frames(trace, replay_data.lanes_of(trace), 0, 4)
    assert [line.words for line in frames[2]["events"]] == ["its pages leave the prefill engine: 4.1 kB"]
    assert [line.words for line in frames[0]["events"]][
        -1
    ] == "is sent to the prefill engine: 6 prompt tokens"


def test_a_browser_is_told_where_they_are() -> None:
    trace = apart()
    feed, found = Feed(trace.meta, min_interval=0), []
    for record in trace:
        feed.append(record)
        found.append(feed.pictures())
    assert "far" not in found[0]  # before the other engine has told anything
    assert found[1]["far"] == FarPool(8, (Table("a", 4, (3,)),))
    colors = [style.color_index(name) for name in "ab"]
    assert set(found[2]["elsewhere"]) == {
        Elsewhere("a", "a", colors[0], "arriving", 4096),
        Elsewhere("b", "b", colors[1], "unsent", 5),
    }
    assert [one.request for one in found[3]["elsewhere"]] == ["b"]
    assert found[3]["far"] == FarPool(8, ()) and found[3]["tables"][0].request == "a"
    assert trace[3].other_pool == OtherPool(8)
    plain = Feed(story().meta, min_interval=0)
    for record in story():
        plain.append(record)
    assert "far" not in plain.pictures() and "elsewhere" not in plain.pictures()
