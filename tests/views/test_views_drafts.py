"""Every picture says how many drafts there were, how many were right, and which blocks were given back."""

from __future__ import annotations

import itertools
import json
from typing import Any

import plotly.graph_objects as go
import pytest

from labkit import views
from labkit.trace.records import Blocks, Row, StepRecord, TraceMeta
from labkit.trace.trace import Trace
from labkit.views import events, perfetto, replay_data, style, text
from labkit.views.facts.batch_timeline import timeline_of
from labkit.views.facts.pool_blocks import blocks_of
from labkit.views.live_feed import Feed
from labkit.views.live_numbers import Numbers
from labkit.views.wire import ReplayLine, ReplayRow, Span, Table
from tests.views.stories import WHY, draft_run, draft_story


@pytest.fixture(params=range(6))
def trace(request: pytest.FixtureRequest) -> Trace:
    trace = draft_run(request.param)
    assert sum(record.total_accepted for record in trace) > 0 and any(record.returned for record in trace)
    return trace


def rows_of(trace: Trace, request_id: str) -> list[tuple[int, Row]]:
    return [(record.step, row) for record in trace for row in record.rows if row.request_id == request_id]


# -- the timeline ---------------------------------------------------------------------------------


def test_equal_steps_are_one_span_and_others_are_not(trace: Trace) -> None:
    timeline = timeline_of(trace)
    assert timeline.drafting
    for lane in timeline.lanes:
        spans = [span for span in lane.spans if span.kind != "waiting"]
        for step, row in rows_of(trace, lane.request_id):
            (span,) = [span for span in spans if span.first <= step <= span.last]
            assert (span.drafted, span.accepted) == (
                len(row.drafted) * span.steps,
                row.num_accepted * span.steps,
            )
        for before, after in itertools.pairwise(spans):
            same = [(s.kind, s.drafted / s.steps, s.accepted / s.steps) for s in (before, after)]
            assert same[0] != same[1] or before.last + 1 < after.first or before.kind != "decode"
    drafted = sum(record.total_drafted for record in trace)
    accepted = sum(record.total_accepted for record in trace)
    assert f"; {drafted} drafted, {accepted} of them right" in timeline.headline[1]


def test_the_story_as_text() -> None:
    lines = text.batch_timeline(draft_story()).splitlines()
    assert lines[1] == "25 tokens computed, 14 generated; 10 drafted, 5 of them right"
    assert lines[3].split()[-5:] == ["computed", "generated", "drafts", "right", "ends"]
    assert lines[4].split() == ["a", "█◇◆◆◈▪", "20", "11", "5", "of", "10", "length", "5"]
    assert lines[5].split() == ["b", "█▪▪", "5", "3", "0", "of", "0", "length", "5"]
    legend = " ".join(lines[6:])
    assert all(f"{mark} {what}" in legend for what, mark in style.DRAFT_MARKS.items())
    assert max(map(style.width_of, lines)) <= text.COLUMNS
    plain = text.batch_timeline(draft_story(), last=0)
    assert "draft" not in plain and not any(mark in plain for mark in style.DRAFT_MARKS.values())


def test_long_runs_say_which_mark_comes_first() -> None:
    decode = {"kinds": "d", "num_tokens": (3,), "drafted": ((1, 2),)}
    records = [
        StepRecord(i, ("a",), starts=(i,), sampled=((1, 2, 3) if i % 2 else (9,),), **decode)
        for i in range(300)
    ]
    said = text.batch_timeline(Trace(TraceMeta(900, 1, 1, 8), records))
    assert "shows the first of x █ ▓ ◈ ◆ ◇ ▪ · ░ among them" in said
    assert said.splitlines()[4].count("◆") == 50 and max(map(len, said.splitlines())) <= text.COLUMNS


def bars_of(figure: go.Figure, name: str) -> list[tuple[Any, ...]]:
    (part,) = [part for part in figure.data if part.name == name and part.x != (None,)]
    return list(zip(part.y, part.base, part.x, part.customdata, strict=True))


def test_the_story_as_a_figure() -> None:
    figure = views.batch_timeline(draft_story())
    assert "10 drafted, 5 of them right" in figure.layout.title.text
    (pale,) = [part for part in figure.data if part.name == "drafted"]
    (solid,) = [part for part in figure.data if part.name == "right"]
    assert [(row, base, steps) for row, base, steps, _ in bars_of(figure, "drafted")] == [
        (0, 0.5, 1),
        (0, 1.5, 2),
        (0, 3.5, 1),
    ]
    (plain,) = [part for part in figure.data if part.name == "decode" and part.x != (None,)]
    (between,) = [part for part in figure.data if part.name == "between"]
    assert plain.width < between.width < pale.width < 0.84, "stripes along the bar, lower than a prefill"
    heights = [between.width, pale.width, (between.width + pale.width) / 2]  # none, all, and half are right
    assert list(solid.width) == pytest.approx(heights)
    assert solid.marker.color == tuple([style.color_of("a")] * 3) != pale.marker.color
    names = [part.name for part in figure.data]
    order = [names.index(name) for name in ("drafted", "right", "between", "decode")]
    assert order == sorted(order), "they lie beneath"
    facts = [facts for *_, facts in bars_of(figure, "decode")]
    assert "5 tokens computed, from position 5 on: 4 drafted, 0 of them right" in facts[0]
    assert "6 tokens computed, from position 6 on: 4 drafted, 4 of them right" in facts[1]
    assert "drafted" not in facts[3]
    assert "drafts, solid if right" in [part.name for part in figure.data if part.showlegend]
    assert "draft" not in views.batch_timeline(draft_story(), last=0).to_json()


def test_perfetto_is_told(trace: Trace) -> None:
    found = [event for event in perfetto.events(trace) if event["ph"] == "X"]
    for steps in (True, False):
        some = [event["args"] for event in found if (event["tid"] == 1) == steps]
        assert sum(args.get("tokens drafted", 0) for args in some) == sum(r.total_drafted for r in trace)
        assert sum(args.get("drafts right", 0) for args in some) == sum(r.total_accepted for r in trace)
    args = [event["args"] for event in perfetto.events(draft_story()) if event["name"] == "step 4"]
    assert args[0]["drafts held back"] == WHY.format("15%")


# -- replay data ----------------------------------------------------------------------------------


def test_the_story_as_replay_data() -> None:
    packed = json.loads(json.dumps(replay_data.pack(draft_story())))
    assert packed["steps"]["drafted"] == [0, 4, 2, 2, 2, 0]
    assert packed["steps"]["accepted"] == [0, 0, 2, 2, 1, 0]
    a, b = [[Span(*span) for span in lane["spans"]] for lane in packed["lanes"]]
    assert a == [
        Span("p", 0, 0, 5),
        Span("d", 1, 1, 5, 4, 0),
        Span("d", 2, 3, 6, 4, 4),
        Span("d", 4, 4, 3, 2, 1),
        Span("d", 5, 5, 1),
    ]
    assert b == [Span("p", 3, 3, 3), Span("d", 4, 5, 2)]
    frames = replay_data.frames(draft_story(), {"a": 0, "b": 1}, 0, 6)
    assert frames[1]["batch"] == [ReplayRow(0, "d", 5, 5, 0, drafted=4, accepted=0)]
    assert frames[5]["batch"][0] == ReplayRow(0, "d", 14, 1, 0)
    assert frames[1]["events"] == [ReplayLine(0, "gives 1 page back, because its drafts were wrong")]
    assert frames[4]["events"] == [ReplayLine(-1, WHY.format("15%"))]
    assert frames[1]["tables"] == [Table(0, 10, [0, 1, 2])], "while the step runs, drafts are in the cache"
    assert frames[2]["tables"] == [Table(0, 9, [0, 1, 2])]
    short = replay_data.pack(Trace(draft_story().meta, draft_story().records[:1]))
    assert "drafted" not in short["steps"] and "accepted" not in short["steps"]


def test_replay_data_add_up(trace: Trace) -> None:
    packed = replay_data.pack(trace)
    spans = [span for lane in packed["lanes"] for span in lane["spans"]]
    assert sum(span.drafted for span in spans) == sum(packed["steps"]["drafted"])
    assert sum(span.accepted for span in spans) == sum(packed["steps"]["accepted"]) > 0
    for place, record in enumerate(trace):
        pool = blocks_of(trace, record.step)
        assert packed["steps"]["owned"][place] == pool.owned
        assert pool.owned_after == trace.meta.num_blocks - record.free_blocks


# -- the live canvas ------------------------------------------------------------------------------


def test_the_live_pictures_show_drafts(trace: Trace) -> None:
    feed = Feed(trace.meta, min_interval=0, speculative="ngram")
    spans: dict[tuple[str, str, int], tuple[int, ...]] = {}
    step, steps, events = -1, [], []
    for record in trace:
        feed.append(record)
        news = feed.pictures(feed.name, step)
        step = news["step"]
        steps += news["steps"]
        events += news["events"]
        after = trace.state(record.step, after=True)
        assert {name: table for name, _, table in news["tables"]} == {
            name: tuple(table) for name, table in after.tables.items()
        }
        assert {name: computed for name, computed, _ in news["tables"]} == after.computed
        for lane in news["lanes"]:
            spans |= {(lane.request, kind, first): rest for kind, first, *rest in lane.spans}
    for name in {name for name, *_ in spans}:
        for at, row in rows_of(trace, name):
            ((first, rest),) = [
                (first, rest)
                for (who, kind, first), rest in spans.items()
                if who == name and kind == row.kind[0] and first <= at <= rest[0]
            ]
            last, _, *drafts = rest
            each = (len(row.drafted), row.num_accepted)
            assert tuple(drafts) == tuple(count * (last - first + 1) for count in each)
    assert [(row.drafted, row.accepted) for row in steps] == [
        (record.total_drafted, record.total_accepted) for record in trace
    ]
    returned = [(r.step, name, len(blocks)) for r in trace for name, blocks in r.returned]
    assert [(at, who, count) for at, kind, who, count, *_ in events if kind == "return"] == returned


def test_only_who_drafts_says_so() -> None:
    plain = Feed(draft_story().meta, min_interval=0)
    plain.append(draft_story()[0])
    news = plain.pictures()
    assert "speculative" not in news and "drafts" not in news["numbers"]
    assert (news["steps"][0].drafted, news["steps"][0].accepted) == (0, 0)
    drafting = Feed(draft_story().meta, min_interval=0, speculative="ngram")
    assert drafting.pictures()["speculative"] == "ngram"


def test_the_step_to_come_says_how_many_drafts_it_will_check() -> None:
    feed = Feed(draft_story().meta, min_interval=0)
    for record in draft_story().records[:4]:
        feed.append(record)
    coming = StepRecord(
        4, ("a", "b"), "dd", (12, 3), (3, 1), ((), ()), drafted=((67, 70), ()), taken=(Blocks("a", (3,)),),
        held_back="why", free_blocks=3,
    )  # fmt: skip
    plan = feed.preview(coming, lambda tokens: f"<{tokens[0]}>")
    drafts = (2, ["<67>", "<70>"])  # what becomes of them is not known yet
    assert [row[3:] for row in plan["rows"]] == [("d", 12, 3, [3], *drafts), ("d", 3, 1, [], 0, [])]
    assert plan["held_back"] == "why" and not hasattr(plan["rows"][0], "accepted")
    assert feed.preview(coming)["rows"][0][7:] == (2, [])


def test_why_nobody_drafts_is_told_when_it_changes() -> None:
    def told(*reasons: str) -> list[str]:
        feed = Feed(draft_story().meta, min_interval=0)
        for step, why in enumerate(reasons):
            feed.append(StepRecord(step, held_back=why, free_blocks=8))
        return [event[-1] for event in feed.pictures()["events"] if event[1] == "hold"]

    first, second = WHY.format("15%"), WHY.format("9% to 41%").replace("1 of 2", "3 of 12")
    other = "nobody drafts: in a step of 12 rows a draft costs more than it can bring"
    assert told("", first, "", second, other, "", other) == [first, other]
    assert told(other, first, other) == [other, first, other]
    assert list(events.events_of(StepRecord(0))) == []


def test_numbers_share_a_gap_among_the_tokens_that_come_together() -> None:
    numbers = Numbers()
    for record in draft_story():
        fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
        numbers.append(StepRecord(**(fields | {"seconds": 0.3})))
    assert sorted(numbers._itl) == pytest.approx([0.1] * 6 + [0.15] * 2 + [0.3] * 4)
    assert numbers.pack()["drafts"] == 0.5 and numbers.pack()["itl"] == pytest.approx(0.125)


# -- the pool -------------------------------------------------------------------------------------


def test_blocks_given_back_leave_with_the_end_of_the_step() -> None:
    during, after = blocks_of(draft_story(), 1), blocks_of(draft_story(), 2)
    assert during.owned == 3 and during.headline[1].endswith("; the step's end gives back 1")
    assert "gives back" not in after.headline[1]
    assert "gives back 1" in views.block_heatmap(draft_story(), 1).layout.title.text
    assert "gives back 1" in text.block_heatmap(draft_story(), 1)
    feed = Feed(draft_story().meta, min_interval=0)
    for record in draft_story().records[:2]:
        feed.append(record)
    assert feed.pictures()["tables"] == (("a", 6, (0, 1)),)


def test_the_stories_are_traces() -> None:
    for trace in (draft_story(), draft_run(1)):
        assert Trace.from_lines(trace.lines()) == trace
