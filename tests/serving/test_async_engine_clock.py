"""The clock of an engine on its own thread, and those who are told of its steps."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import threading
import time

import pytest

from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord
from tests.serving.threaded import PATIENCE, drained, gated, last, live, model, wait_for  # noqa: F401

# -- the clock ------------------------------------------------------------------------------------


def test_pause_step_and_resume(live: AsyncEngine) -> None:
    live.pause()
    request_id = live.submit("hello", SamplingParams(max_tokens=5))
    drained(live)
    assert live.paused and live.records() == ()
    for done in (1, 2, 3):
        live.single_step()
        wait_for(lambda done=done: len(live.records()) == done)
        drained(live)
        assert len(live.records()) == done
    live.resume()
    assert last(live.stream(request_id)).finish_reason == "length"
    assert not live.paused


def test_a_step_asked_for_in_vain_is_not_owed(live: AsyncEngine) -> None:
    live.single_step()
    drained(live)
    wait_for(lambda: live._steps_wanted == 0)
    live.submit("hello")
    drained(live)
    drained(live)
    assert live.records() == ()


def test_single_step_pauses(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=5))
    assert gated.engine.in_step.wait(PATIENCE)
    gated.single_step()
    gated.engine.gate.release(100)
    wait_for(lambda: len(gated.records()) == 2)  # the one it was in, and the one asked for
    drained(gated)
    assert gated.paused and len(gated.records()) == 2
    gated.resume()
    last(gated.stream(request_id))


def test_speed_is_never_exceeded(live: AsyncEngine) -> None:
    live.speed = 100
    begin = time.perf_counter()
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=11))))
    assert time.perf_counter() - begin >= 10 / 100
    live.speed = 0.01  # a hundred seconds from step to step: but only for as long as it is wanted
    request_id = live.submit("hello", SamplingParams(max_tokens=5))
    drained(live)
    assert live.output(request_id).token_ids == []
    live.speed = 1e6
    assert last(live.stream(request_id)).finish_reason == "length"
    live.speed = None
    assert live.speed is None


@pytest.mark.parametrize("speed", [0, -1, float("nan"), "fast"])
def test_a_speed_that_cannot_be(live: AsyncEngine, speed: object) -> None:
    with pytest.raises(ValueError, match="speed must be"):
        live.speed = speed  # type: ignore[assignment]


def test_while_paused_the_next_step_is_known(live: AsyncEngine) -> None:
    live.pause()
    assert live.preview is None
    first = live.submit("hello", SamplingParams(max_tokens=4))
    wait_for(lambda: live.preview)
    assert live.preview.requests == (first,) and live.preview.kinds == "p" and live.records() == ()
    second = live.submit("world", SamplingParams(max_tokens=4))
    wait_for(lambda: live.preview and len(live.preview.requests) == 2)
    for step in range(3):
        foreseen = live.preview
        live.single_step()
        wait_for(lambda step=step: len(live.records()) > step)
        record = live.records()[step]
        assert (foreseen.step, foreseen.requests, foreseen.num_tokens) == (
            step,
            (first, second),
            record.num_tokens,
        )
        wait_for(lambda step=step: live.preview and live.preview.step == step + 1)
    live.abort(first)
    wait_for(lambda: live.preview and live.preview.requests == (second,))
    assert [finish.reason for finish in live.preview.finished] == ["abort"]
    live.resume()
    assert live.preview is None
    last(live.stream(second))


def test_a_scheduler_that_cannot_plan_ahead_is_let_be(live: AsyncEngine) -> None:
    def fail() -> None:
        raise RuntimeError("not now")

    live.engine.preview = fail  # type: ignore[method-assign]
    live.pause()
    request_id = live.submit("hello", SamplingParams(max_tokens=2))
    drained(live)
    assert live.preview is None
    live.resume()
    assert last(live.stream(request_id)).finish_reason == "length" and live.failure is None


def test_an_idle_engine_sleeps(gated: AsyncEngine) -> None:
    drained(gated)
    wait_for(lambda: gated.engine.looks)
    looks = gated.engine.looks
    time.sleep(0.2)
    assert gated.engine.looks <= looks + 2


# -- records --------------------------------------------------------------------------------------


def test_records_and_subscribers(live: AsyncEngine) -> None:
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    told: list[StepRecord] = []
    live.subscribe(told.append)
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    wait_for(lambda: len(told) == len(live.engine.trace))
    assert tuple(told) == live.records() == tuple(live.engine.trace.records)
    assert [record.step for record in live.records(after=5)] == [record.step for record in told[6:]]
    assert live.records(after=10_000) == ()


def test_who_unsubscribes_is_told_no_more(live: AsyncEngine) -> None:
    told: list[StepRecord] = []
    begun = threading.Event()
    unsubscribe = [
        live.subscribe(told.append),
        live.subscribe(lambda _: begun.set()),
        live.subscribe(told.append),
    ]
    drained(live)
    unsubscribe[0]()
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    wait_for(lambda: len(told) == 4)  # of the two that look alike, the other is still told
    assert begun.is_set()
    for stop in unsubscribe:
        stop()
        stop()  # a second time does nothing
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    drained(live)
    assert len(told) == 4 and not live._subscriptions


def test_a_subscriber_may_ask_for_the_latest_steps_only(live: AsyncEngine) -> None:
    for _ in range(3):
        last(live.stream(live.submit("hello " * 20, SamplingParams(max_tokens=4))))
    live.pause()
    live.submit("hello " * 20, SamplingParams(max_tokens=9))
    for step in range(12, 17):
        live.single_step()
        wait_for(lambda step=step: live.records(after=step - 1))
    told: list[StepRecord] = []
    live.subscribe(told.append, last=2)
    drained(live)
    assert tuple(told[1:]) == live.records(after=14) and told[0].step == 14
    state, whole = PoolState(16), live.engine.trace.state(16, after=True)
    for record in told:
        state.begin(record)
        state.end(record)
    assert whole.tables and whole.cached
    assert (state.tables, state.computed, state.cached) == (whole.tables, whole.computed, whole.cached)
    everything: list[StepRecord] = []
    live.subscribe(everything.append, last=17)
    drained(live)
    assert tuple(everything) == live.records()
    live.resume()


def test_a_subscriber_that_fails_is_let_go(live: AsyncEngine) -> None:
    calls: list[int] = []

    def bad(record: StepRecord) -> None:
        calls.append(record.step)
        raise RuntimeError("subscriber broke")

    live.subscribe(bad)
    assert last(live.stream(live.submit("hello", SamplingParams(max_tokens=4)))).finish_reason == "length"
    assert calls == [0] and live.failure is None
