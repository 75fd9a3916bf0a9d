"""Pictures say what the trace says: figures and text twins against the records they are drawn from."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import views
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.sampling_params import SamplingParams
from labkit.schedulers import SCHEDULERS
from labkit.trace.records import Admission, Arrival, Blocks, Finish, StepRecord, TraceMeta
from labkit.trace.trace import Trace
from labkit.views import style, text

KINDS = ("prefill", "chunk", "decode", "idle")
FIGURES = (views.block_heatmap, views.batch_timeline, views.throughput)
TWINS = (text.block_heatmap, text.batch_timeline, text.throughput)
HOSTILE = [
    "<b>bold</b>", "<img src=x onerror=alert(1)>", "&lt;", "$x^2$", "%{x}", "2024-01-01", "1e5", "0x10", "",
    "line\nbreak\t\x07\u202e", "日本語の長い名前です" * 3, "a" * 300, "9" * 5000, "\ud800", "a\u0301" * 20,
]  # fmt: skip

# -- traces ---------------------------------------------------------------------------------------


def record(
    step: int, rows: Sequence[tuple[str, str, int, int, tuple[int, ...]]] = (), **fields
) -> StepRecord:
    """A record from rows of (request, kind letter, start, tokens, sampled)."""
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return StepRecord(step, columns[0], "".join(columns[1]), *columns[2:], **fields)


def trace_of(*records: StepRecord, num_blocks: int = 8, block_size: int = 4) -> Trace:
    return Trace(TraceMeta(num_blocks, block_size, 4, 32), records)


def story() -> Trace:
    """Request a computes its prompt; b shares its first page, is preempted, and comes back."""
    return trace_of(
        record(
            3, [("a", "p", 0, 6, (50,))], published=(0,), waiting=1, blocked=("b", "no seat"), free_blocks=6,
            arrived=(Arrival("a", 6, 3), Arrival("b", 7, 2)), admitted=(Admission("a"),),
            taken=(Blocks("a", (0, 1)),),
        ),
        record(
            4, [("a", "d", 6, 1, (51,)), ("b", "c", 4, 1, ())], free_blocks=5,
            admitted=(Admission("b", 4, (0,)),), taken=(Blocks("b", (2,)),),
        ),
        record(
            5, [("a", "d", 7, 1, (52,))], preempted=(Blocks("b", (0, 2)),), waiting=1, free_blocks=8,
            blocked=("b", "no page"), finished=(Finish("a", "length", (0, 1)),),
        ),
        record(
            6, [("b", "p", 4, 3, (60,))], admitted=(Admission("b", 4, (0,)),), taken=(Blocks("b", (3,)),),
            free_blocks=8, finished=(Finish("b", "stop", (0, 3)),),
        ),
    )  # fmt: skip


def run(
    jobs: Sequence[tuple[int, str, int, int]],
    *,
    scheduler: str = "continuous",
    kv_policy: str = "paged",
    num_blocks: int = 16,
    block_size: int = 4,
    budget: int = 12,
    seats: int = 4,
    aborts: Sequence[tuple[int, str]] = (),
) -> Trace:
    """Let a real scheduler serve jobs of (arrival step, id, prompt length, max tokens), without a model."""
    limits = {"max_num_seqs": seats, "max_num_batched_tokens": budget}
    engine = SCHEDULERS[scheduler](BlockPool(num_blocks, block_size), **limits, kv_policy=kv_policy)
    trace = Trace(TraceMeta(num_blocks, block_size, seats, budget, scheduler, kv_policy))
    jobs = sorted(jobs)
    for step in range(2000):
        while jobs and (jobs[0][0] <= step or not engine.has_unfinished):
            _, name, prompt, answer = jobs.pop(0)
            engine.add(Request(name, list(range(prompt)), SamplingParams(max_tokens=answer)))
        for when, name in aborts:
            if when == step:
                engine.abort(name)
        if not engine.has_unfinished:
            return trace
        plan = engine.schedule()
        ends = [start + n for start, n in zip(plan.starts, plan.num_tokens, strict=True)]
        reached = [end == len(r.token_ids) for r, end in zip(plan.requests, ends, strict=True)]
        done = [r.status == "running" and full for r, full in zip(plan.requests, reached, strict=True)]
        result = StepResult([(100 + step,) if ends else () for ends in done])
        engine.commit(plan, result)
        trace.append(record_step(step, plan, result, engine))
    raise RuntimeError("the scheduler does not come to an end")


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    sizes = st.tuples(st.integers(0, 6), st.integers(1, 14), st.integers(1, 18))
    jobs = [
        (when, str(i), *rest) for i, (when, *rest) in enumerate(draw(st.lists(sizes, min_size=1, max_size=9)))
    ]
    return run(
        jobs,
        scheduler=draw(st.sampled_from(list(SCHEDULERS))),
        kv_policy=draw(st.sampled_from(["paged", "reserved"])),
        num_blocks=draw(st.sampled_from([8, 9, 300])),
        budget=draw(st.sampled_from([4, 9, 64])),
        aborts=draw(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("0123")), max_size=2)),
    )


# -- reading figures ------------------------------------------------------------------------------


def named(figure: go.Figure, name: str) -> go.Bar | None:
    """The drawn (not legend) trace of that name."""
    found = [part for part in figure.data if part.name == name and part.x != (None,)]
    return found[0] if found else None


def bars(figure: go.Figure, name: str) -> list[tuple[int, int, float, str]]:
    """(row, first step, length, facts) of each bar of a kind."""
    part = named(figure, name)
    columns = (part.y, part.base, part.x, part.customdata) if part else [()] * 4
    return [(y, base + 0.5, x, facts) for y, base, x, facts in zip(*columns, strict=True)]


def cells(figure: go.Figure) -> list[tuple[int, str]]:
    """(shade, facts) of each block."""
    grid = named(figure, "blocks")
    shades = [shade for row in grid.z for shade in row]
    facts = [fact for row in grid.customdata for fact in row]
    return [(shade, fact) for shade, fact in zip(shades, facts, strict=True) if shade is not None]


def words(marked_up: str) -> str:
    """What a reader sees of a plotly text."""
    return html.unescape(re.sub(r"<[^>]*>", "", marked_up.replace("<br>", "; ")))


def strings(value: object) -> list[str]:
    """All strings within a piece of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [s for item in value for s in strings(item)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )


# -- the facts ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(traces(), st.integers(0, 10**6))
def test_heatmap_colours_each_owned_block_and_fills_it_as_far_as_it_is_full(trace: Trace, pick: int) -> None:
    step = trace[pick % len(trace)].step
    state = trace.state(step)
    drawn = cells(figure := views.block_heatmap(trace, step))
    assert len(drawn) == trace.meta.num_blocks
    for block, (shade, facts) in enumerate(drawn):
        owners = state.owners.get(block, ())
        first_words = "free" if block not in state.cached else "cached and free"
        kind = first_words if not owners else "owned" if len(owners) == 1 else "shared"
        assert facts.startswith(f"<b>block {block}</b>: {kind}")
        assert (shade >= 2) == bool(owners)
        for owner in owners:
            assert f"request {owner}, entry {state.tables[owner].index(block)} of its block table" in facts
        if owners:
            assert f"tokens fill {state.filled[block]} of 4 slots" in facts
    kinds = Counter(facts.split(": ")[1].split("<")[0] for _, facts in drawn)
    title = figure.layout.title.text
    assert (
        f"{kinds['shared']} shared, {kinds['cached and free']} cached and free, {kinds['free']} free" in title
    )
    assert f"{len(state.owners)} of {len(drawn)} blocks owned" in title
    if state.owners:
        tokens = sum(state.filled[block] for block in state.owners)
        assert f"tokens fill {tokens} of {4 * len(state.owners)} owned slots" in title
    filled = named(figure, "filled")
    columns = len(named(figure, "blocks").z[0])
    expected = Counter(b for b, owners in state.owners.items() for _ in owners if state.filled[b])
    assert Counter(filled.customdata) == expected
    for block, left, length in zip(filled.customdata, filled.base, filled.x, strict=True):
        cell_width = 2 * (block % columns - left)
        assert length / cell_width == pytest.approx(state.filled[block] / 4, abs=1e-3)


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


@settings(max_examples=25, deadline=None)
@given(traces())
def test_text_twins_state_the_numbers_of_the_figures(trace: Trace) -> None:
    for figure, twin in zip(FIGURES, TWINS, strict=True):
        said = twin(trace)
        assert max(map(style.width_of, said.splitlines())) <= text.COLUMNS
        stated = "; ".join(said.split("\n\n")[0].splitlines())
        assert stated == words(figure(trace).layout.title.text)
    for name, line in _lanes(trace)[1].items():
        mine = [row for record in trace for row in record.rows if row.request_id == name]
        numbers = [int(word) for word in line.split() if word.isdecimal()]
        assert numbers[1:3] == [sum(row.num_tokens for row in mine), sum(len(row.sampled) for row in mine)]


def _lanes(trace: Trace, last: int | None = None) -> tuple[str, dict[str, str]]:
    """The ruler of a timeline in text, and the line of each request."""
    ruler, *lines = text.batch_timeline(trace, last=last).split("\n\n")[1].splitlines()
    return ruler, {line.split()[0]: line for line in lines}


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


# -- single facts ---------------------------------------------------------------------------------


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


def test_shared_blocks_are_outlined_and_striped() -> None:
    figure = views.block_heatmap(story(), 4)
    outline, filled = named(figure, "shared"), named(figure, "filled")
    assert (list(outline.y), outline.marker.line.color) == ([0], style.SHARED)
    stripes = [i for i, block in enumerate(filled.customdata) if block == 0]
    assert len({filled.marker.color[i] for i in stripes}) == len({filled.y[i] for i in stripes}) == 2
    assert sum(filled.width[i] for i in stripes) == pytest.approx(outline.width, abs=1e-3)
    assert "* 1 block (0) of AB" in text.block_heatmap(story(), 4)


def test_cached_and_free_blocks_have_a_pattern() -> None:
    figure = views.block_heatmap(story(), 5)  # b is preempted: page 2 is free; a still holds 0 and 1
    assert named(figure, "cached").y == ()
    finished = trace_of(*story().records, record(7, free_blocks=8))
    cached = named(views.block_heatmap(finished), "cached")
    assert (list(cached.y), cached.marker.pattern.shape) == ([0], "/")
    assert text.block_heatmap(finished).splitlines()[3] == "block 0  ~█" + " .." * 7


def test_what_the_step_gives_back_is_told() -> None:
    for record_ in story():
        figure = views.block_heatmap(story(), record_.step)
        owned = sum(shade >= 2 for shade, _ in cells(figure))
        given_back = re.search(r"gives back (\d+)", figure.layout.title.text)
        assert owned - int(given_back[1] if given_back else 0) == 8 - record_.free_blocks


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


@pytest.mark.parametrize(("requests", "more"), [(12, []), (13, ["and 2 more: point at a block"])])
def test_the_heatmap_names_as_many_owners_as_fit(requests: int, more: list[str]) -> None:
    jobs = [(0, name, 4, 2) for name in "abcdefghijklm"[:requests]]
    trace = run(jobs, seats=requests, num_blocks=64, budget=64)
    legend = [part.name for part in views.block_heatmap(trace, 0).data if part.showlegend]
    owners = [f"{name}: 1 block, 4 tokens" for name in "abcdefghijkl"[: 12 - len(more)]]
    assert legend == [*owners, *more, "free"]


@pytest.mark.parametrize("num_blocks", [1, 4, 16, 17, 700, 4096, 10_000])
def test_pools_of_any_size(num_blocks: int) -> None:
    owned = tuple(range(0, num_blocks, 3))
    step = record(
        0, [("a", "p", 0, len(owned) * 4 - 1, (1,))], arrived=(Arrival("a", 9, 9),),
        admitted=(Admission("a"),), taken=(Blocks("a", owned),), free_blocks=num_blocks - len(owned),
    )  # fmt: skip
    trace = trace_of(step, num_blocks=num_blocks)
    drawn = cells(views.block_heatmap(trace))
    assert [block for block, (shade, _) in enumerate(drawn) if shade >= 2] == list(owned)
    said = text.block_heatmap(trace)
    assert f"{len(owned)} of {num_blocks} block" in said
    assert max(map(len, said.splitlines())) <= text.COLUMNS and len(said.splitlines()) < 80
    if num_blocks == 10_000:
        assert "each character = 3 blocks" in said


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


@pytest.mark.parametrize("clock", [False, True])
def test_a_trace_that_forgot_its_beginning(clock: bool) -> None:
    whole = run([(0, str(i), 9, 9) for i in range(8)], seats=3)
    whole = timed(whole, [((i + 1) * clock, clock) for i in range(len(whole))])
    short = Trace(whole.meta, whole.records, max_steps=9)
    first = short[1].step  # the step before stands for all that is forgotten
    assert first > 1 and whole.at(first).waiting
    assert views.batch_timeline(short, first=first) == views.batch_timeline(whole, first=first)
    assert text.batch_timeline(short, first=first) == text.batch_timeline(whole, first=first)
    assert views.block_heatmap(short) == views.block_heatmap(whole)
    tails = [named(views.throughput(trace), "running").y[-len(short) :] for trace in (short, whole)]
    assert tails[0] == tails[1]
    assert named(views.throughput(short), "computed").y[:2] == (None, 3)
    rate = sum(record.total_tokens for record in short) / (len(short) - 1)
    assert text.throughput(short).startswith(
        f"{rate:.4g} generated tokens per {'second' if clock else 'step'}, "
    )


def test_steps_that_are_not_there() -> None:
    for module in (views, text):
        with pytest.raises(ValueError, match="step 99 is not in this trace"):
            module.block_heatmap(story(), 99)
        with pytest.raises(ValueError, match="no step from 7 to 9 is in this trace"):
            module.batch_timeline(story(), first=7, last=9)
        with pytest.raises(ValueError, match="window must be positive"):
            module.throughput(story(), window=0)


def test_empty_traces_say_so() -> None:
    for figure, twin in zip(FIGURES, TWINS, strict=True):
        drawn = figure(trace_of())
        assert drawn.layout.annotations[0].text == twin(trace_of())
        assert drawn.layout.height <= 120


# -- throughput -----------------------------------------------------------------------------------


def timed(trace: Trace, times: Sequence[tuple[float, float]]) -> Trace:
    records = [dataclasses.replace(r, time=t, seconds=s) for r, (t, s) in zip(trace, times, strict=True)]
    return Trace(trace.meta, records)


def test_throughput_without_a_clock_counts_per_step() -> None:
    figure = views.throughput(story())
    assert list(named(figure, "computed").y) == [6, 2, 1, 3]
    assert list(named(figure, "generated").y) == [1, 1, 1, 1]
    assert list(named(figure, "computed").x) == [3, 4, 5, 6]
    assert list(named(figure, "KV usage").y) == [0.25, 0.375, 0, 0]
    assert list(named(figure, "running").y) == [1, 2, 1, 1]
    assert list(named(figure, "waiting").y) == [1, 0, 1, 0]
    assert figure.layout.title.text.startswith("1 generated tokens per step, 3 computed")
    assert figure.layout.yaxis.title.text == "tokens / step"


def test_throughput_with_a_clock_divides_by_seconds_of_work() -> None:
    trace = timed(story(), [(0.5, 0.5), (0.75, 0.25), (9, 0.25), (10, 1.0)])
    figure = views.throughput(trace, window=0.75)
    computed = named(figure, "computed")
    assert list(computed.y) == [12, pytest.approx(8 / 0.75), None, 3 / 0.5, 3]
    assert list(computed.x) == [0.5, 0.75, None, 9, 10]  # a gap where the engine rested
    assert "2 generated tokens per second, 6 computed" in text.throughput(trace, window=0.75)
    assert list(named(figure, "preempted").x) == [9]


# -- JSON -----------------------------------------------------------------------------------------


def test_equal_traces_give_equal_json_whatever_the_clock_and_the_default_template(tmp_path: Path) -> None:
    trace = run([(i, str(i), 9, 9) for i in range(6)], num_blocks=9)
    before = [figure(trace).to_json() for figure in FIGURES]
    slow = timed(trace, [(i + 1.5, 0.5) for i in range(len(trace))])
    slow.save(tmp_path / "trace")
    default = plotly.io.templates.default
    try:
        plotly.io.templates.default = "seaborn"
        again = [figure(Trace.load(tmp_path / "trace")).to_json() for figure in FIGURES]
    finally:
        plotly.io.templates.default = default
    assert again[:2] == before[:2]
    assert again[2] != before[2]
    for figure in FIGURES:
        drawn = figure(trace)
        assert plotly.io.from_json(drawn.to_json()) == drawn
        assert "bdata" not in drawn.to_json()  # no packed arrays: lists read the same in every plotly


def test_what_users_typed_is_never_markup() -> None:
    trace = run([(i, name, 5, 9) for i, name in enumerate(HOSTILE)], num_blocks=64, aborts=[(2, HOSTILE[0])])
    for figure in (lambda t: views.block_heatmap(t, 8), views.batch_timeline, views.throughput):
        for string in strings(json.loads(figure(trace).to_json())):
            ours = re.sub(r"</?(b|br|extra)>|<span style=[^<>]*>|</span>", "", string)
            assert not re.search(r"[<>$\n\x07\u202e\ud800]|&(?!amp;|lt;|gt;|#36;)", ours)
    axis = views.batch_timeline(trace).layout.yaxis
    assert list(axis.tickvals) == list(range(len(HOSTILE)))  # places, so no id is taken for a date
    assert [html.unescape(tick) for tick in axis.ticktext][:8] == [
        "<b>bold</b>", "<img sr…lert(1)>", "&lt;", "$x^2$", "%{x}", "2024-01-01", "1e5", "0x10",
    ]  # fmt: skip
    for said in (text.block_heatmap(trace, 8), text.batch_timeline(trace), text.throughput(trace)):
        assert all(char == "\n" or char.isprintable() for char in said)
        assert max(map(style.width_of, said.splitlines())) <= text.COLUMNS


@given(st.text(max_size=40), st.integers(3, 20))
def test_labels_fit_and_keep_both_ends(name: str, width: int) -> None:
    shown = style.label(name, width)
    assert style.width_of(shown) <= width
    assert shown.isprintable() and shown
    if name.isprintable() and 0 < style.width_of(name) <= width:
        assert shown == name
    assert style.color_of(name) in style.PALETTE
