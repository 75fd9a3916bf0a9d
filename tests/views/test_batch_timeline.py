"""The batch timeline shows what each request did in each step: figure and text twin against the trace."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings

from labkit import views
from labkit.trace.trace import Trace
from labkit.views import style, text
from tests.views.reading import bars, named, words
from tests.views.stories import record, run, story, trace_of, traces

KINDS = ("prefill", "chunk", "decode", "idle")


@settings(max_examples=25, deadline=None)
@given(traces())
def test_timeline_bars_add_up_to_the_rows_of_the_trace(trace: Trace) -> None:
    figure = views.batch_timeline(trace)
    rows = [(record.step, row) for record in trace for row in record.rows]
    for kind in KINDS:
        drawn = Counter(
            (figure.layout.yaxis.ticktext[y], first + i)
            for y, first, length, _ in bars(figure, kind)
            for i in range(length)
        )
        assert drawn == Counter((row.request_id, step) for step, row in rows if row.kind == kind)
        facts = [facts for *_, facts in bars(figure, kind)]
        computed = sum(int(fact) for f in facts for fact in re.findall(r"(\d+) tokens? computed", f))
        padding = sum(int(fact) for f in facts for fact in re.findall(r"(\d+) padded slot", f))
        assert computed == sum(row.num_tokens for _, row in rows if row.kind == kind)
        assert padding == sum(row.padding for _, row in rows if row.kind == kind)
    waiting = Counter(first + i for _, first, length, _ in bars(figure, "waiting") for i in range(length))
    assert waiting == Counter({record.step: record.waiting for record in trace if record.waiting})
    ends = [f for part in figure.data if (part.name or "").startswith("ends: ") for f in part.customdata]
    assert len(ends) == sum(len(record.finished) for record in trace)


def _lanes(trace: Trace, last: int | None = None) -> tuple[str, dict[str, str]]:
    """Return the ruler of a timeline in text, and the line of each request."""
    ruler, *lines = text.batch_timeline(trace, last=last).split("\n\n")[1].splitlines()
    return ruler, {line.split()[0]: line for line in lines}


@settings(max_examples=25, deadline=None)
@given(traces())
def test_the_text_states_what_each_request_computed(trace: Trace) -> None:
    for name, line in _lanes(trace)[1].items():
        mine = [row for record in trace for row in record.rows if row.request_id == name]
        numbers = [int(word) for word in line.split() if word.isdecimal()]
        assert numbers[1:3] == [sum(row.num_tokens for row in mine), sum(len(row.sampled) for row in mine)]


@settings(max_examples=25, deadline=None)
@given(traces())
def test_timeline_characters_are_the_rows_of_the_trace(trace: Trace) -> None:
    records = trace.records[:40]  # so many steps have a column each
    ruler, lanes = _lanes(trace, last=records[-1].step)
    begin = ruler.index("0")
    crossed = {(name, record.step) for record in records for name, _ in record.preempted}
    for kind, mark in style.MARKS.items():
        drawn = {(name, i - begin) for name in lanes for i, char in enumerate(lanes[name]) if char == mark}
        rows = {(row.request_id, r.step) for r in records for row in r.rows if row.kind == kind}
        if kind != "waiting":
            assert drawn == (crossed if kind == "preempted" else rows - crossed)


def test_a_story_is_drawn() -> None:
    figure = views.batch_timeline(story())
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]
    assert [bar[:3] for bar in bars(figure, "prefill")] == [(0, 3, 1), (1, 6, 1)]
    assert [bar[:3] for bar in bars(figure, "chunk")] == [(1, 4, 1)]
    assert [bar[:3] for bar in bars(figure, "decode")] == [(0, 4, 2)]
    assert "2 tokens sampled: 51, 52" in bars(figure, "decode")[0][3]
    assert [bar[:3] for bar in bars(figure, "waiting")] == [(1, 3, 1), (1, 5, 1)]
    assert [words(bar[3]).split("; ")[1] for bar in bars(figure, "waiting")] == [
        "no seat (1 step)",
        "no page (1 step)",
    ]
    cross = named(figure, "preempted")
    assert (list(cross.x), list(cross.y), cross.marker.symbol) == ([4.5], [1], "x")
    assert [(p.name, p.x[0], p.y[0]) for p in figure.data if p.name.startswith("ends")] == [
        ("ends: stop", 6.5, 1),
        ("ends: length", 5.5, 0),
    ]
    lines = text.batch_timeline(story()).splitlines()
    assert [line.split() for line in lines[4:6]] == [
        ["a", "█▪▪", "8", "3", "length", "5"],
        ["b", "░▓x█", "4", "1", "stop", "6"],
    ]


def test_aborted_requests_end_before_the_step() -> None:
    trace = run([(0, "a", 4, 9), (0, "b", 4, 9)], seats=1, aborts=[(3, "a"), (3, "b")])
    mark = named(views.batch_timeline(trace), "ends: abort")
    assert (list(mark.x), list(mark.y), mark.marker.symbol) == ([2.5, 2.5], [0, 1], "diamond")
    assert [bar[:3] for bar in bars(views.batch_timeline(trace), "waiting")] == [(1, 0, 3)]
    assert "ends before step 3, abort" in mark.customdata[0]


def test_bars_do_not_bridge_steps_in_which_nothing_ran() -> None:
    decode = [record(step, [("a", "d", step, 1, (7,))]) for step in (2, 3, 5)]
    assert [bar[:3] for bar in bars(views.batch_timeline(trace_of(*decode)), "decode")] == [
        (0, 2, 2),
        (0, 5, 1),
    ]


def test_kinds_differ_by_more_than_colour() -> None:
    trace = run([(0, "0", 30, 3), (0, "1", 4, 9), (3, "2", 4, 4)], scheduler="static", seats=2)
    looks = {}
    for kind in (*KINDS, "waiting"):
        part = named(views.batch_timeline(trace), kind)
        looks[kind] = (part.width, part.marker.pattern.shape)
    assert len(set(looks.values())) == len(looks) == 5


def test_idle_seats_of_a_static_batch_are_drawn() -> None:
    trace = run([(0, "0", 4, 2), (0, "1", 4, 9)], scheduler="static")
    idle = bars(views.batch_timeline(trace), "idle")
    assert [(y, length) for y, _, length, _ in idle] == [(0, 7)]  # merged: seven equal steps, one bar
    assert "7 padded slots wasted" in idle[0][3]
    assert text.batch_timeline(trace).splitlines()[4].count(style.MARKS["idle"]) == 7


def test_long_runs_stay_light() -> None:
    jobs = [(0, str(i), 8, 500) for i in range(32)]
    trace = run(jobs, seats=32, num_blocks=32 * 130, budget=512)
    figure = views.batch_timeline(trace)
    assert sum(len(part.x) for part in figure.data) < 150
    assert sum(length for *_, length, _ in bars(figure, "decode")) == 32 * 499


@pytest.mark.parametrize("window", [(1, 2), (1, 1), (None, 0), (2, None)])
def test_limits_cut_the_timeline(window: tuple[int | None, int | None]) -> None:
    trace = run([(i // 2, str(i), 9, 5) for i in range(8)])
    first, last = window
    figure = views.batch_timeline(trace, first=first, last=last)
    kept = [r for r in trace if (first or 0) <= r.step <= (trace[-1].step if last is None else last)]
    for kind in KINDS:
        assert sum(length for *_, length, _ in bars(figure, kind)) == sum(
            row.kind == kind for r in kept for row in r.rows
        )
    assert sum(length for *_, length, _ in bars(figure, "waiting")) == sum(r.waiting for r in kept)
