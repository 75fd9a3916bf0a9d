"""What the browser is sent: the trace, step by step, and nothing that it already has."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.sampling_params import SamplingParams
from labkit.schedulers import SCHEDULERS
from labkit.trace.records import Admission, Arrival, Blocks, Finish, StepRecord, TraceMeta
from labkit.trace.trace import Trace
from labkit.views import assets, style
from labkit.views.assets import asset
from labkit.views.live_feed import WINDOW, Feed
from labkit.views.wire import Lane, PlannedRow, Queued, Shared, Span, Step, Table

META = TraceMeta(num_blocks=12, block_size=4, max_num_seqs=3, max_num_batched_tokens=8)

# Two seats are in use, a third request waits; then the second is preempted, and at last the first ends.
STORY = [
    StepRecord(
        0,
        ("a", "b"),
        "pc",
        (0, 0),
        (3, 5),
        ((1,), ()),
        arrived=(Arrival("a", 3, 9), Arrival("b", 9, 9), Arrival("c", 30, 9)),
        admitted=(Admission("a"), Admission("b")),
        taken=(Blocks("a", (0,)), Blocks("b", (1, 2, 3))),
        waiting=1,
        blocked=("c", "it needs 8 pages, and 8 are free"),
        free_blocks=8,
        seconds=0.5,
    ),
    StepRecord(1, ("a", "b"), "dc", (3, 5), (1, 4), ((2,), (3,)), waiting=1, free_blocks=8, published=(0, 1)),
    StepRecord(
        2,
        ("a",),
        "d",
        (4,),
        (1,),
        ((4,),),
        preempted=(Blocks("b", (1, 2, 3)),),
        taken=(Blocks("a", (4,)),),
        waiting=2,
        free_blocks=10,
    ),
    StepRecord(
        3,
        ("a",),
        "d",
        (5,),
        (1,),
        ((5,),),
        finished=(Finish("a", "stop", (0, 4)),),
        waiting=2,
        free_blocks=12,
    ),
]


def feed_of(records: list[StepRecord], meta: TraceMeta = META) -> Feed:
    feed = Feed(meta, min_interval=0)
    for record in records:
        feed.append(record)
    return feed


def lanes_of(pictures: dict[str, Any]) -> dict[str, Lane]:
    """The lanes by request, whether they went through JSON or not."""
    lanes = [Lane(*lane) for lane in pictures["lanes"]]
    return {lane.request: lane._replace(spans=tuple(Span(*span) for span in lane.spans)) for lane in lanes}


def bits(text: str) -> set[int]:
    return {
        i
        for i, byte in enumerate(base64.b64decode(text))
        for i in range(8 * i, 8 * i + 8)
        if byte >> i % 8 & 1
    }


def busy_trace(scheduler: str = "continuous", *, steps: int = 10_000, requests: int = 12) -> Trace:
    """A run of the real scheduler with too few pages, without a model."""
    pool = BlockPool(14, 4)
    planner = SCHEDULERS[scheduler](pool, max_num_seqs=5, max_num_batched_tokens=16)
    trace = Trace(TraceMeta(14, 4, 5, 16))
    for i in range(requests):
        prompt = [7] * 4 + [100 + i] * (i % 9)
        planner.add(Request(str(i), prompt, SamplingParams(max_tokens=8 + i % 5)))
    step = 0
    while planner.has_unfinished and step < steps:
        plan = planner.schedule()
        ends = [
            n and s + n == len(r.token_ids)
            for r, s, n in zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ]
        result = StepResult([(step % 50,) if end else () for end in ends])
        planner.commit(plan, result)
        trace.append(record_step(step, plan, result, planner, seconds=0.01))
        step += 1
    return trace


class Browser:
    """Does what `live_feed.js` does with pictures."""

    def __init__(self) -> None:
        self.feed, self.step = "", -1
        self.lanes: dict[str, dict[str, Any]] = {}
        self.steps: list[Any] = []
        self.tables: Any = ()

    def ask(self, feed: Feed) -> dict[str, Any]:
        update = json.loads(json.dumps(feed.pictures(self.feed, self.step)))
        if update.get("full"):
            self.feed, self.lanes, self.steps = update["feed"], {}, []
        self.step = update["step"]
        if "steps" not in update:
            return update
        self.tables = [Table(*table) for table in update["tables"]]
        self.steps = (self.steps + update["steps"])[-WINDOW:]
        for request_id, part in lanes_of(update).items():
            lane = self.lanes.setdefault(request_id, {"spans": {}})
            lane["facts"] = part._replace(spans=())
            for span in part.spans:
                assert (span.drafted, span.accepted) == (0, 0)
                lane["spans"][span.kind, span.first] = (span.last, span.tokens)
        return update


# -- what it says ---------------------------------------------------------------------------------


def test_nothing_has_run_yet() -> None:
    pictures = Feed(META).pictures()
    assert pictures["full"] and pictures["step"] == -1
    assert pictures["meta"]["num_blocks"] == 12 and pictures["palette"] == style.PALETTE
    assert pictures["lanes"] == [] and pictures["steps"] == [] and not pictures["tables"]


def test_lanes_say_what_each_request_did() -> None:
    lanes = lanes_of(feed_of(STORY).pictures())
    assert lanes["a"].spans == (Span("p", 0, 0, 3), Span("d", 1, 3, 3))
    assert lanes["b"].spans == (Span("c", 0, 1, 9), Span("x", 2, 2, 3), Span("w", 2, 3, 0))
    assert lanes["c"].spans == (Span("w", 0, 3, 0),)
    assert lanes["a"]._replace(spans=()) == Lane("a", "a", style.color_index("a"), 0, 3, 3, "stop", ())
    assert (lanes["b"].ended, lanes["b"].reason) == (-1, "")


def test_pages_after_the_step() -> None:
    pictures = feed_of(STORY[:3]).pictures()
    assert pictures["tables"] == (("a", 5, (0, 4)),)
    assert bits(pictures["cached"]) == {0, 1}
    assert feed_of(STORY).pictures()["tables"] == ()


def test_counts_of_each_step() -> None:
    steps = feed_of(STORY).pictures()["steps"]
    assert steps[0] == Step(
        step=0,
        seconds=0.5,
        sampled=1,
        computed=8,
        used=4,
        running=2,
        waiting=1,
        blocked=("c", "it needs 8 pages, and 8 are free"),
        wasted=8,
    )
    assert [(step.running, step.waiting) for step in steps] == [(2, 1), (2, 1), (1, 2), (1, 2)]
    assert [step.used for step in steps] == [4, 4, 2, 0]


def test_the_queue_the_log_and_the_numbers() -> None:
    pictures = feed_of(STORY[:3]).pictures()
    assert pictures["queue"] == ("b", "c")
    assert [event[:3] for event in pictures["events"] if event.step == 2] == [(2, "preempt", "b")]
    assert pictures["numbers"]["preemptions"] == 1
    assert feed_of(STORY[:3]).pictures()["held"] == ()
    feed, browser = feed_of(STORY[:3]), Browser()
    browser.ask(feed)
    feed.append(STORY[3])
    assert [event[1:3] for event in browser.ask(feed)["events"]] == [["finish", "a"]]


def test_the_step_to_come() -> None:
    feed = feed_of(STORY[:2])
    coming = StepRecord(
        2, ("a", "d"), "dp", (4, 0), (1, 6), ((), ()),
        arrived=(Arrival("d", 6, 9),), admitted=(Admission("d", 4, (0,)),),
        preempted=(Blocks("b", (1, 2, 3)),), taken=(Blocks("a", (1,)), Blocks("d", (2, 3))),
        evicted=(1,), waiting=2, blocked=("b", "it needs 8 pages"), free_blocks=8,
    )  # fmt: skip
    before = feed.pictures()
    plan = feed.preview(coming)
    assert plan["rows"] == [
        PlannedRow("a", "a", style.color_index("a"), "d", 4, 1, [1], 0, []),
        PlannedRow("d", "d", style.color_index("d"), "p", 0, 6, [2, 3], 0, []),
    ]
    assert [(row.request, row.num_blocks) for row in plan["preempted"]] == [("b", 3)]
    assert plan["queue"] == [Queued(name, name, style.color_index(name), False) for name in "bc"]
    assert plan["shared"] == [Shared("d", 4, (0,))] and plan["admitted"] == ["d"] and plan["evicted"] == 1
    assert feed.pictures(feed.name, 1) == {"feed": feed.name, "step": 1}, "a preview changed something"
    assert feed.pictures() == before
    assert feed.preview(STORY[3]) is None, "not the next one"


def test_a_seat_that_gets_nothing_of_the_budget_is_idle() -> None:
    records = [
        StepRecord(
            0, ("a", "b"), "pp", (0, 0), (3, 3), ((1,), (1,)),
            arrived=(Arrival("a", 3, 9), Arrival("b", 3, 9)), admitted=(Admission("a"), Admission("b")),
            taken=(Blocks("a", (0,)), Blocks("b", (1,))), free_blocks=10,
        ),
        StepRecord(1, ("a",), "d", (3,), (1,), ((1,),), free_blocks=10),
    ]  # fmt: skip
    assert lanes_of(feed_of(records).pictures())["b"].spans == (Span("p", 0, 0, 3), Span("i", 1, 1, 0))


def test_a_request_cancelled_while_it_waits() -> None:
    records = [
        StepRecord(0, arrived=(Arrival("a", 3, 9),), waiting=1, free_blocks=12),
        StepRecord(1, finished=(Finish("a", "abort", ()),), free_blocks=12),
    ]
    lane = lanes_of(feed_of(records).pictures())["a"]
    assert (lane.ended, lane.reason, lane.spans) == (1, "abort", (Span("w", 0, 0, 0),))


def test_a_name_used_again_begins_a_new_lane() -> None:
    again = StepRecord(
        5, ("a",), "p", (0,), (2,), ((1,),), arrived=(Arrival("a", 2, 4),), admitted=(Admission("a"),),
        taken=(Blocks("a", (7,)),), free_blocks=11,
    )  # fmt: skip
    feed = feed_of([*STORY, again])
    assert lanes_of(feed.pictures())["a"][3:] == (5, 2, -1, "", (Span("p", 5, 5, 2),))
    for step in range(6, 6 + WINDOW):
        feed.append(StepRecord(step, ("a",), "d", (step,), (1,), ((1,),), free_blocks=11))
    assert "a" in lanes_of(feed.pictures())


@pytest.mark.parametrize("scheduler", ["continuous", "static", "naive"])
def test_a_whole_run_agrees_with_its_trace(scheduler: str) -> None:
    trace = busy_trace(scheduler)
    feed, browser = Feed(trace.meta, min_interval=0), Browser()
    for record in trace:
        feed.append(record)
        browser.ask(feed)
        after = trace.state(record.step, after=True)
        assert {name: table for name, _, table in browser.tables} == after.tables
        assert {name: computed for name, computed, _ in browser.tables} == after.computed
        assert bits(feed.pictures()["cached"]) == after.cached
    if scheduler == "continuous":
        assert any(record.preempted for record in trace), "this run should have been short of pages"
    for record in trace:
        for row in record.rows:
            letter = {"prefill": "p", "chunk": "c", "decode": "d", "idle": "i"}[row.kind]
            spans = browser.lanes[row.request_id]["spans"].items()
            assert any(k == letter and first <= record.step <= last for (k, first), (last, _) in spans)
        for request_id, reason, _ in record.finished:
            assert browser.lanes[request_id]["facts"][-3:-1] == (record.step, reason)
    computed = sum(
        tokens
        for lane in browser.lanes.values()
        for (k, _), (_, tokens) in lane["spans"].items()
        if k in "pcd"
    )
    assert computed == sum(record.total_tokens for record in trace)


# -- only what is new -----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 7])
def test_increments_add_up_to_the_whole(every: int) -> None:
    trace = busy_trace()
    feed, often, once = Feed(trace.meta, min_interval=0), Browser(), Browser()
    for i, record in enumerate(trace):
        feed.append(record)
        if i % every == 0:
            often.ask(feed)
    often.ask(feed)
    once.ask(feed)
    assert (often.lanes, often.steps, often.tables) == (once.lanes, once.steps, once.tables)


def test_nothing_new_is_a_short_answer() -> None:
    feed, browser = feed_of(STORY), Browser()
    assert browser.ask(feed)["full"]
    assert browser.ask(feed) == {"feed": feed.name, "step": 3}


def test_an_answer_holds_the_new_part_of_a_lane_only() -> None:
    feed, browser = feed_of(STORY[:2]), Browser()
    browser.ask(feed)
    feed.append(STORY[2])
    update = browser.ask(feed)
    assert "full" not in update and [step[0] for step in update["steps"]] == [2]
    assert lanes_of(update)["b"].spans == (Span("x", 2, 2, 3), Span("w", 2, 2, 0))


@pytest.mark.parametrize("lost", ["the engine was started anew", "it slept too long", "it is ahead of us"])
def test_a_browser_that_has_lost_the_thread_gets_everything(lost: str) -> None:
    feed = feed_of(STORY)
    for step in range(4, 4 + WINDOW):
        feed.append(StepRecord(step, free_blocks=12))
    name = "another" if lost == "the engine was started anew" else feed.name
    after = {"it slept too long": 0, "it is ahead of us": 999}.get(lost, 150)
    pictures = feed.pictures(name, after)
    assert pictures["full"] and len(pictures["steps"]) == WINDOW


def test_the_steps_of_the_window_and_a_record_of_what_was_before_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("labkit.views.live_feed.WINDOW", 12)
    trace = busy_trace(requests=40)
    records = trace.records[:36]
    before = records[-13]
    start = trace.state(before.step, after=True).as_record(before)
    part = feed_of([start, *records[-12:]], trace.meta).pictures()
    whole = feed_of(records, trace.meta).pictures()
    assert whole["tables"] and whole["steps"][0].waiting, "nobody runs or nobody waits: that proves little"
    for key in ("step", "tables", "cached", "steps"):
        assert part[key] == whole[key]
    last_spans = [
        {name: (lane.spans[-1].kind, lane.spans[-1].last) for name, lane in lanes_of(feed).items()}
        for feed in (part, whole)
    ]
    assert last_spans[0] == last_spans[1]


def test_it_does_not_grow() -> None:
    feed = Feed(TraceMeta(50, 4, 8, 64), min_interval=0)
    for step in range(5 * WINDOW):
        name, page = str(step), (step % 50,)
        feed.append(
            StepRecord(
                step, (name,), "p", (0,), (3,), ((1,),), arrived=(Arrival(name, 3, 1),),
                admitted=(Admission(name),), taken=(Blocks(name, page),),
                finished=(Finish(name, "length", page),), free_blocks=50,
            )
        )  # fmt: skip
    pictures = feed.pictures()
    assert len(pictures["steps"]) == len(pictures["lanes"]) == WINDOW
    assert len(feed._lanes) == len(feed._ended) == WINDOW


def test_a_frame_is_told_to_each_as_far_as_they_do_not_know_it() -> None:
    feed = feed_of(STORY[:3])
    frame = feed.frame()
    feed.append(STORY[3])
    update, everything = feed.pictures(feed.name, 1, frame), feed.pictures("", -1, frame)
    assert update["step"] == everything["step"] == 2 and feed.pictures()["step"] == 3
    assert [step.step for step in update["steps"]] == [2] and len(everything["steps"]) == 3
    assert update["tables"] == everything["tables"] != feed.pictures()["tables"]


def test_all_browsers_share_a_frame_for_a_moment() -> None:
    feed = Feed(META, min_interval=3600)
    for record in STORY[:2]:
        feed.append(record)
    first = feed.pictures()["step"]
    feed.append(STORY[2])
    assert feed.pictures()["step"] == first  # the next frame is an hour away


def test_reading_while_the_engine_writes() -> None:
    trace = busy_trace(requests=60)
    feed, browser, faults = Feed(trace.meta, min_interval=0), Browser(), []

    def read() -> None:
        try:
            while browser.step < trace[-1].step:
                browser.ask(feed)
        except Exception as error:
            faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for record in trace:
        feed.append(record)
    reader.join(60)
    whole = Browser()
    whole.ask(feed)
    assert not faults and browser.tables == whole.tables and browser.steps == whole.steps


def test_the_files_of_the_page_are_there_and_safe_to_put_into_a_template() -> None:
    for name in sorted(path.name for path in (Path(assets.__file__).parent / "static").iterdir()):
        if name.endswith((".py", "__")):
            continue
        text = asset(name)
        assert text
        if not name.endswith(".js"):  # gradio reads these as templates
            assert not any(mark in text for mark in ("{{", "${", "`", "\\"))
        else:
            assert not any(mark in text for mark in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval("))
