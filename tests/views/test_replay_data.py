"""What a browser replays is compared with the trace that it was made of."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings

from labkit.trace.memory_use import memory_uses
from labkit.trace.trace import Trace
from labkit.views import replay_data
from labkit.views.facts.pool_blocks import blocks_of
from labkit.views.wire import ReplayLine, Span
from tests.views.stories import HOSTILE, busy, run, story, timed, trace_of, traces


def bits(text: str) -> set[int]:
    data = base64.b64decode(text)
    return {i for i in range(8 * len(data)) if data[i >> 3] >> (i & 7) & 1}


@settings(max_examples=60, deadline=None)
@given(traces())
def test_columns_say_what_the_pool_held(trace: Trace) -> None:
    packed = json.loads(json.dumps(replay_data.pack(trace)))
    steps = packed["steps"]
    assert steps["begin"] is None
    assert steps["step"] == [record.step for record in trace]
    for place, record in enumerate(trace):
        pool = blocks_of(trace, record.step)
        assert (steps["owned"][place], steps["filled"][place]) == (pool.owned, pool.filled_slots)
        assert steps["sampled"][place] == record.total_sampled
    assert all(len(column) == len(trace) for column in steps.values() if column is not None)


@settings(max_examples=60, deadline=None)
@given(traces())
def test_frames_say_who_held_what_and_who_waited(trace: Trace) -> None:
    lanes = replay_data.lanes_of(trace)
    names = list(lanes)
    assert list(lanes.values()) == list(range(len(replay_data.pack(trace)["lanes"])))
    found: list[dict] = []
    while len(found) < len(trace):
        found += replay_data.frames(trace, lanes, len(found), 7)
    assert json.loads(json.dumps(found))
    for frame, record in zip(found, trace, strict=True):
        state = trace.state(record.step)
        assert frame["step"] == record.step
        assert {names[n]: table for n, _, table in frame["tables"]} == state.tables
        assert {names[n]: tokens for n, tokens, _ in frame["tables"]} == state.computed
        assert bits(frame["cached"]) == state.cached
        assert [names[n] for n, _ in frame["queue"]] == state.queue and frame["queued"] == len(state.queue)
        ran = [(row.request_id, row.kind[0], row.num_tokens) for row in record.rows]
        assert [(names[n], kind, tokens) for n, kind, _, tokens, *_ in frame["batch"]] == ran
        if record.blocked and record.blocked[0] in state.waiting:
            assert (names.index(record.blocked[0]), record.blocked[1]) in frame["queue"]


@settings(max_examples=40, deadline=None)
@given(traces())
def test_lanes_show_all_rows(trace: Trace) -> None:
    packed = replay_data.pack(trace)["lanes"]
    numbers = replay_data.lanes_of(trace)
    letters = {"prefill": "p", "chunk": "c", "decode": "d", "idle": "i"}
    for record in trace:
        for row in record.rows:
            spans = packed[numbers[row.request_id]]["spans"]
            assert any(k == letters[row.kind] and a <= record.step <= b for k, a, b, *_ in spans)
        for name, reason, _ in record.finished:
            early = name not in record.requests
            assert (record.step - early, reason) in packed[numbers[name]]["ends"]
        for name, _ in record.preempted:
            assert Span("x", record.step, record.step, 0) in packed[numbers[name]]["spans"]


def test_the_clock_starts_with_the_first_step_and_never_goes_back() -> None:
    trace = timed(run([(0, "a", 5, 12), (3, "b", 4, 3)]))
    steps = replay_data.pack(trace)["steps"]
    assert steps["begin"][0] == 0 and steps["end"][0] == pytest.approx(0.01)
    assert steps["end"] == sorted(steps["end"]) and steps["begin"] == sorted(steps["begin"])
    assert steps["begin"][9] - steps["end"][8] == pytest.approx(1)
    backwards = Trace(trace.meta, [trace[i] for i in range(3)])
    object.__setattr__(backwards.records[2], "time", 0.001)
    steps = replay_data.pack(backwards)["steps"]
    assert steps["end"] == sorted(steps["end"])


def test_events_in_words() -> None:
    trace = story()
    lanes = replay_data.lanes_of(trace)
    words = [[what for _, what in frame["events"]] for frame in replay_data.frames(trace, lanes, 0, 9)]
    assert words == [
        ["arrives with 6 prompt tokens", "arrives with 7 prompt tokens", "admitted"],
        ["admitted, 4 tokens found in the prefix cache"],
        ["preempted, gives 2 pages back", "ends: length"],
        ["admitted, 4 tokens found in the prefix cache", "ends: stop"],
    ]
    assert replay_data.frames(trace, lanes, 2, 1)[0]["queue"] == [ReplayLine(1, "no page")]


def test_never_more_frames_than_asked_or_held() -> None:
    trace = busy()
    lanes = replay_data.lanes_of(trace)
    assert len(replay_data.frames(trace, lanes, 0, 10**9)) == min(replay_data.MAX_FRAMES, len(trace))
    assert replay_data.frames(trace, lanes, len(trace), 5) == []
    assert [frame["step"] for frame in replay_data.frames(trace, lanes, -5, 2)] == [0, 1]
    assert len(replay_data.frames(trace, lanes, len(trace) - 2, 30)) == 2


def test_a_huge_trace_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = busy()
    exact = [use.owned for use in memory_uses(trace)]
    monkeypatch.setattr(replay_data, "_MAX_WORK", sum(exact) // 4)
    owned = replay_data.pack(trace)["steps"]["owned"]
    assert len(owned) == len(exact) and owned != exact and owned[0] == exact[0]
    assert owned == [use.owned for use in memory_uses(trace, most=sum(exact) // 4)]


def test_an_answer_has_fewer_frames_where_many_blocks_are_owned(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = busy()
    lanes = replay_data.lanes_of(trace)
    whole = replay_data.frames(trace, lanes, 0, 9)
    monkeypatch.setattr(replay_data, "_MAX_ENTRIES", 0)
    assert [replay_data.frames(trace, lanes, place, 9) for place in range(9)] == [[frame] for frame in whole]


def test_an_empty_trace() -> None:
    packed = replay_data.pack(trace_of())
    assert packed["lanes"] == [] and packed["headline"][0] == "No steps yet: nothing has run."
    assert replay_data.frames(trace_of(), {}, 0, 5) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_short_and_printable(name: str) -> None:
    trace = run([(0, name, 5, 3)])
    packed = json.dumps(
        [replay_data.pack(trace), replay_data.frames(trace, replay_data.lanes_of(trace), 0, 3)]
    )
    assert len(packed) < 4000
    assert json.loads(packed)[0]["lanes"][0]["name"].isprintable()
