"""The engine on its own thread: many users, a clock, faults, and an end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from labkit.trace.pool_state import PoolState
from labkit.trace.records import StepRecord

PATIENCE = 60  # seconds until a test gives up; nothing is decided by it
PROMPTS = ["The quick brown fox", "What is the capital of France?", "One, two, three", "hello world"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


class GatedEngine(Engine):
    """An engine whose steps wait until they are let through, and fail when told to."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.gate = threading.Semaphore(0)
        self.in_step = threading.Event()
        self.fault: Exception | None = None
        self.looks = 0

    @property
    def has_unfinished(self) -> bool:
        self.looks += 1
        return super().has_unfinished

    def step(self) -> StepRecord:
        self.in_step.set()
        assert self.gate.acquire(timeout=PATIENCE)
        if self.fault:
            raise self.fault
        return super().step()


@pytest.fixture
def live(model: LoadedModel) -> Iterator[AsyncEngine]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        yield live


@pytest.fixture
def gated(model: LoadedModel) -> Iterator[AsyncEngine]:
    engine = GatedEngine(EngineConfig(model=model, num_blocks=64))
    with AsyncEngine(engine) as live:
        yield live
        engine.gate.release(10_000)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def drained(live: AsyncEngine) -> None:
    """Wait until the engine has obeyed every command handed in so far."""
    done = threading.Event()
    with live._changed:
        live._inbox.append(done.set)
        live._changed.notify_all()
    assert done.wait(PATIENCE)


def last(stream: Iterator[RequestOutput]) -> RequestOutput:
    *_, final = stream
    return final


def solo(model: LoadedModel, prompt: str, params: SamplingParams) -> list[int]:
    engine = Engine(EngineConfig(model=model, num_blocks=64))
    request_id = engine.add_request(prompt, params)
    while engine.has_unfinished:
        engine.step()
    return engine.outputs[request_id].token_ids


# -- requests -------------------------------------------------------------------------------------


def test_a_stream_grows_to_what_the_engine_would_say_alone(live: AsyncEngine, model: LoadedModel) -> None:
    params = SamplingParams(max_tokens=20)
    ids = [live.submit(prompt, params) for prompt in PROMPTS]
    for prompt, request_id in zip(PROMPTS, ids, strict=True):
        snapshots = list(live.stream(request_id))
        assert snapshots[-1].finish_reason == "length"
        assert snapshots[-1].token_ids == solo(model, prompt, params)
        assert [shot.finished for shot in snapshots[:-1]] == [False] * (len(snapshots) - 1)
        for before, after in itertools.pairwise(snapshots):
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert after.text.startswith(before.text)
            assert len(after.metrics.token_times) == len(after.token_ids)


def test_an_engine_is_built_on_a_thread_that_ends_and_what_goes_wrong_is_raised(model: LoadedModel) -> None:
    builders = []

    def build() -> Engine:
        builders.append(threading.current_thread())
        return Engine(EngineConfig(model=model, num_blocks=8, block_size=4))

    with AsyncEngine.build(build) as live:
        assert builders[0] is not threading.current_thread()
        assert not builders[0].is_alive()
        list(live.stream(live.submit("one", SamplingParams(max_tokens=2))))
    with pytest.raises(ValueError, match="num_blocks must be at least 1"):
        AsyncEngine.build(lambda: Engine(EngineConfig(model=model, num_blocks=0)))


def test_nobody_waits_for_a_step(gated: AsyncEngine) -> None:
    first = gated.submit("hello", SamplingParams(max_tokens=3))
    assert gated.engine.in_step.wait(PATIENCE)  # and there it stays
    second = gated.submit("world", SamplingParams(max_tokens=3))
    assert gated.output(first).token_ids == [] and gated.output(second).text == ""
    assert gated.records() == () and gated.busy
    gated.pause()
    gated.resume()
    gated.speed = 100
    gated.speed = None
    assert gated.abort(second)
    gated.engine.gate.release(10)
    assert last(gated.stream(first)).finish_reason == "length"
    assert last(gated.stream(second)).finish_reason == "abort"


def test_a_request_joins_while_others_run(gated: AsyncEngine) -> None:
    gated.submit("hello", SamplingParams(max_tokens=8))
    assert gated.engine.in_step.wait(PATIENCE)
    second = gated.submit("world", SamplingParams(max_tokens=2))
    gated.engine.gate.release(100)
    last(gated.stream(second))
    records = gated.records()
    assert [arrival.request_id for arrival in records[0].arrived] == ["0"]
    assert [arrival.request_id for arrival in records[1].arrived] == ["1"]
    assert records[1].requests == ("0", "1")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("word " * 3000, {}, "prompt has .* tokens, but max_model_len is"),
        ("hello", {"request_id": ""}, "request_id must be"),
        ("hello", {"priority": "high"}, "priority must be"),
    ],
)
def test_a_bad_request_is_refused_where_it_is_made(
    live: AsyncEngine, prompt: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        live.submit(prompt, **options)
    assert not live.busy and live.records() == ()


def test_an_id_is_used_once(gated: AsyncEngine) -> None:
    assert gated.submit("hello", request_id="mine") == "mine"
    with pytest.raises(ValueError, match="'mine' is already in use"):
        gated.submit("hello", request_id="mine")


def test_many_threads_at_once(live: AsyncEngine, model: LoadedModel) -> None:
    params = SamplingParams(max_tokens=6)
    expected = {prompt: solo(model, prompt, params) for prompt in PROMPTS}
    results: list[tuple[str, str, list[int]]] = []

    def user() -> None:
        for prompt in PROMPTS:
            request_id = live.submit(prompt, params)
            results.append((request_id, prompt, last(live.stream(request_id)).token_ids))

    threads = [threading.Thread(target=user) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len({request_id for request_id, _, _ in results}) == 8 * len(PROMPTS)
    assert all(tokens == expected[prompt] for _, prompt, tokens in results)


def test_several_answers_to_one_prompt(live: AsyncEngine) -> None:
    request_id = live.submit("hello", SamplingParams(max_tokens=4, n=3, temperature=1.0, seed=1))
    outputs = [last(live.stream(name)) for name in (request_id, f"{request_id}.1", f"{request_id}.2")]
    assert [output.index for output in outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in outputs}) > 1


def test_abort(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=50))
    gated.engine.gate.release(3)
    stream = gated.stream(request_id)
    while len(next(stream).token_ids) < 3:
        pass
    assert gated.abort(request_id)
    gated.engine.gate.release(100)
    assert last(stream).finish_reason == "abort"
    assert gated.engine.pool.num_free == 64
    assert not gated.abort(request_id) and not gated.abort("nobody")


def test_abort_of_a_request_that_has_not_been_seen_yet(gated: AsyncEngine) -> None:
    gated.submit("hello", SamplingParams(max_tokens=2))
    assert gated.engine.in_step.wait(PATIENCE)
    second = gated.submit("world")
    assert gated.abort(second)
    gated.engine.gate.release(100)
    assert last(gated.stream(second)).finish_reason == "abort"


def test_a_request_that_the_queue_refuses_fails_alone(live: AsyncEngine) -> None:
    def refuse(request: object) -> str:
        raise ValueError("no room for it")

    enqueue, live.engine.enqueue = live.engine.enqueue, refuse  # type: ignore[method-assign]
    output = last(live.stream(live.submit("hello")))
    assert (output.finish_reason, output.error) == ("error", "no room for it")
    live.engine.enqueue = enqueue  # type: ignore[method-assign]
    assert last(live.stream(live.submit("hello", SamplingParams(max_tokens=2)))).finish_reason == "length"


# -- consumers ------------------------------------------------------------------------------------


def test_a_consumer_that_leaves_changes_nothing(live: AsyncEngine) -> None:
    request_id = live.submit("hello", SamplingParams(max_tokens=30))
    for _ in live.stream(request_id):
        break
    assert last(live.stream(request_id)).finish_reason == "length"


def test_a_slow_consumer_gets_the_latest(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=9))
    stream = gated.stream(request_id)
    assert next(stream).token_ids == []
    gated.engine.gate.release(5)
    wait_for(lambda: len(gated.output(request_id).token_ids) == 5)
    assert len(next(stream).token_ids) == 5
    gated.engine.gate.release(100)
    wait_for(lambda: gated.output(request_id).finished)
    assert [len(shot.token_ids) for shot in stream] == [9]


def test_a_snapshot_never_changes(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=5))
    gated.engine.gate.release(2)
    wait_for(lambda: len(gated.output(request_id).token_ids) == 2)
    shot = gated.output(request_id)
    text = shot.text
    gated.engine.gate.release(100)
    last(gated.stream(request_id))
    assert len(shot.token_ids) == len(shot.metrics.token_times) == 2
    assert shot.text == text and not shot.finished


def test_coroutines(live: AsyncEngine, model: LoadedModel) -> None:
    params = SamplingParams(max_tokens=10)

    async def user(prompt: str) -> list[int]:
        tokens: list[int] = []
        async for shot in live.astream(live.submit(prompt, params)):
            tokens = shot.token_ids
        return tokens

    async def everybody() -> list[list[int]]:
        return await asyncio.gather(*(user(prompt) for prompt in PROMPTS * 5))

    assert asyncio.run(everybody()) == [solo(model, prompt, params) for prompt in PROMPTS] * 5


def test_a_coroutine_that_is_cancelled_and_a_loop_that_is_gone(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=5))

    async def leave() -> None:
        stream = gated.astream(request_id)
        await anext(stream)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)  # no news: the gate is shut

    asyncio.run(leave())
    gated.engine.gate.release(100)
    assert last(gated.stream(request_id)).finish_reason == "length"
    assert gated.failure is None


@pytest.mark.parametrize("method", ["stream", "astream", "output"])
def test_an_unknown_id(live: AsyncEngine, method: str) -> None:
    with pytest.raises(KeyError, match="no request 'nobody'"):
        getattr(live, method)("nobody")


def test_old_answers_are_forgotten(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64)), keep_finished=2) as live:
        params = SamplingParams(max_tokens=2)
        ids = [live.submit(prompt, params) for prompt in PROMPTS]
        streams = [live.stream(request_id) for request_id in ids]
        assert [last(stream).finish_reason for stream in streams] == ["length"] * 4  # held before: not lost
        assert len(live.engine.outputs) == 2 and len(live._answers) == 2
        with pytest.raises(KeyError):
            live.output(ids[0])
        assert live.output(ids[3]).finished


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


def test_records_and_listeners(live: AsyncEngine) -> None:
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    heard: list[StepRecord] = []
    live.listen(heard.append)
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    wait_for(lambda: len(heard) == len(live.engine.trace))
    assert tuple(heard) == live.records() == tuple(live.engine.trace.records)
    assert [record.step for record in live.records(after=5)] == [record.step for record in heard[6:]]
    assert live.records(after=10_000) == ()


def test_whoever_stops_listening_hears_no_more(live: AsyncEngine) -> None:
    heard: list[StepRecord] = []
    begun = threading.Event()
    stops = [live.listen(heard.append), live.listen(lambda _: begun.set()), live.listen(heard.append)]
    drained(live)
    stops[0]()
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    wait_for(lambda: len(heard) == 4)  # of the two that look alike, the other still listens
    assert begun.is_set()
    for stop in stops:
        stop()
        stop()  # a second time does nothing
    last(live.stream(live.submit("hello", SamplingParams(max_tokens=4))))
    drained(live)
    assert len(heard) == 4 and live._listeners == []


def test_a_listener_may_ask_for_the_latest_steps_only(live: AsyncEngine) -> None:
    for _ in range(3):
        last(live.stream(live.submit("hello " * 20, SamplingParams(max_tokens=4))))
    live.pause()
    live.submit("hello " * 20, SamplingParams(max_tokens=9))
    for step in range(12, 17):
        live.single_step()
        wait_for(lambda step=step: live.records(after=step - 1))
    heard: list[StepRecord] = []
    live.listen(heard.append, last=2)
    drained(live)
    assert tuple(heard[1:]) == live.records(after=14) and heard[0].step == 14
    state, whole = PoolState(16), live.engine.trace.state(16, after=True)
    for record in heard:
        state.begin(record)
        state.end(record)
    assert whole.tables and whole.cached
    assert (state.tables, state.computed, state.cached) == (whole.tables, whole.computed, whole.cached)
    everything: list[StepRecord] = []
    live.listen(everything.append, last=17)
    drained(live)
    assert tuple(everything) == live.records()
    live.resume()


def test_unfinished(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=2))
    assert gated.unfinished(request_id) and not gated.unfinished("nobody")
    gated.engine.gate.release(10)
    last(gated.stream(request_id))
    assert not gated.unfinished(request_id)


def test_progress_is_the_output_in_short(gated: AsyncEngine) -> None:
    request_id = gated.submit("hello", SamplingParams(max_tokens=3))
    assert gated.progress(request_id)[:2] == ("", 0)
    gated.engine.gate.release(2)
    wait_for(lambda: gated.progress(request_id).num_tokens == 2)
    gated.engine.gate.release(10)
    output = last(gated.stream(request_id))
    expected = (output.text, 3, len(output.prompt_token_ids), "length", None)
    assert gated.progress(request_id) == expected
    with pytest.raises(KeyError, match="no request 'nobody'"):
        gated.progress("nobody")


def test_a_listener_that_fails_is_let_go(live: AsyncEngine) -> None:
    calls: list[int] = []

    def bad(record: StepRecord) -> None:
        calls.append(record.step)
        raise RuntimeError("listener broke")

    live.listen(bad)
    assert last(live.stream(live.submit("hello", SamplingParams(max_tokens=4)))).finish_reason == "length"
    assert calls == [0] and live.failure is None


# -- faults and the end ---------------------------------------------------------------------------


def test_a_failing_step_ends_everything_and_says_so(gated: AsyncEngine) -> None:
    first = gated.submit("hello")
    stream = gated.stream(first)
    next(stream)
    assert gated.engine.in_step.wait(PATIENCE)
    second = gated.submit("world")
    gated.engine.fault = RuntimeError("a bug")
    gated.engine.gate.release(1)
    for output in (last(stream), last(gated.stream(second))):
        assert (output.finish_reason, output.error) == ("error", "the engine failed: RuntimeError: a bug")
    assert isinstance(gated.failure, RuntimeError) and not gated.busy
    with pytest.raises(EngineStoppedError, match="RuntimeError: a bug"):
        gated.submit("again")
    assert not gated.abort(first)


def test_close_ends_what_is_in_flight(gated: AsyncEngine) -> None:
    stream = gated.stream(gated.submit("hello"))
    next(stream)
    assert gated.engine.in_step.wait(PATIENCE)
    closing = threading.Thread(target=gated.close)
    closing.start()
    gated.engine.gate.release(1)
    output = last(stream)
    assert (output.finish_reason, output.error) == ("abort", "the engine was closed")
    closing.join(PATIENCE)
    gated.close()
    with pytest.raises(EngineStoppedError, match="closed"):
        gated.submit("again")
