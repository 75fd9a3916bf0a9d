"""What the processes of a model send to each other is shown wherever a run is, and nowhere else."""

from __future__ import annotations

import json

import pytest

from labkit import views
from labkit.trace.trace import Trace
from labkit.views import perfetto, replay_data, style, text
from labkit.views.live_feed import Feed
from tests.views.reading import named
from tests.views.stories import busy, sent, story


def test_text_and_figure_show_the_share_of_each_step() -> None:
    trace = sent(busy())
    computed = sum(record.total_tokens for record in trace)
    told = f"each process sent {style.size(107 * computed)} to the others, 25% of the time"
    assert told in text.throughput(trace).replace("\n", " ")
    (row,) = [line for line in text.throughput(trace).splitlines() if line.startswith("communication")]
    assert row.endswith("█  25%")
    figure = views.throughput(trace)
    shares = [y for y in named(figure, "communication").y if y is not None]  # none where the engine rested
    assert shares == [pytest.approx(0.25)] * len(trace)
    assert figure.layout.yaxis4.title.text == "sending" and figure.layout.xaxis4.title.text == "seconds"


def test_without_a_clock_there_are_bytes_and_no_share() -> None:
    told = text.throughput(sent(story())).replace("\n", " ")
    assert "each process sent 1.28 kB to the others" in told and "of the time" not in told


def test_perfetto_counts_it() -> None:
    trace = sent(busy())
    found = json.loads("".join(perfetto.lines(trace)))["traceEvents"]
    counters = {name: [e["args"] for e in found if e["name"] == name] for name in ("communication", "sent")}
    assert counters["communication"] == [{"% of a step": 25}] * len(trace) + [{"% of a step": 0}]
    *steps, end = counters["sent"]
    assert [step["bytes in layers"] for step in steps] == [record.sent_in_layers for record in trace]
    assert [step["bytes elsewhere"] for step in steps] == [record.sent_elsewhere for record in trace]
    assert set(end.values()) == {0}


def test_a_browser_is_told() -> None:
    trace = sent(busy())
    columns = replay_data.pack(trace)["steps"]
    feed = Feed(trace.meta, min_interval=0)
    for place, record in enumerate(trace):
        feed.append(record)
        facts = record.sent_in_layers, record.sent_elsewhere, pytest.approx(record.sending, abs=1e-6)
        live = feed.frame().steps[-1]
        assert (live.sent_in_layers, live.sent_elsewhere, live.sending) == facts
        names = ("sent_in_layers", "sent_elsewhere", "sending")
        assert tuple(columns[name][place] for name in names) == facts


@pytest.mark.parametrize("trace", [busy(), story()])
def test_nothing_changes_where_nothing_is_sent(trace: Trace) -> None:
    assert "communication" not in text.throughput(trace) and "sent" not in text.throughput(trace)
    assert len(views.throughput(trace).data) < len(views.throughput(sent(trace)).data)
    assert "communication" not in "".join(perfetto.lines(trace))
    assert "sending" not in replay_data.pack(trace)["steps"]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (12_345, "12.3 kB"),
        (2e15, "2,000 TB"),
    ],
)
def test_sizes_in_words(count: float, words: str) -> None:
    assert style.size(count) == words
