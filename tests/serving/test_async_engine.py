"""The engine on its own thread: many users, faults, and an end."""

# ruff: noqa: F811 - the fixtures of another module are imported, and asked for by name

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.sampling_params import SamplingParams
from labkit.serving.answer import Piece
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from tests.serving.threaded import PATIENCE, GatedEngine, drained, gated, last, live, model, solo, wait_for  # noqa: F401

PROMPTS = ["The quick brown fox", "What is the capital of France?", "One, two, three", "hello world"]


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


def test_a_family_is_ended_and_forgotten_together(model: LoadedModel) -> None:
    several = SamplingParams(max_tokens=60, n=3, temperature=1.0, seed=1, ignore_eos=True)
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64)), keep_finished=1) as live:
        live.pause()
        name = live.submit("hello", several)
        assert live.abort(f"{name}.1")  # one of them alone
        live.single_step()
        wait_for(lambda: live.output(f"{name}.1").finished)
        live.resume()
        last(live.stream(live.submit("world", SamplingParams(max_tokens=2))))
        last(live.stream(live.submit("again", SamplingParams(max_tokens=2))))
        assert live.output(f"{name}.1").finish_reason == "abort"  # finished long ago, but not the others
        live.abort(name)
        wait_for(lambda: live.num_unfinished == 0)
        last(live.stream(live.submit("the last", SamplingParams(max_tokens=2))))
        for member in (name, f"{name}.1", f"{name}.2"):
            with pytest.raises(KeyError):
                live.output(member)
        assert not live.abort(name)


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
        async for number, piece in live.follow(live.start(live.engine.make_request(prompt, params))):
            assert number == 0
            tokens += piece.token_ids
        return tokens

    async def everybody() -> list[list[int]]:
        return await asyncio.gather(*(user(prompt) for prompt in PROMPTS * 5))

    assert asyncio.run(everybody()) == [solo(model, prompt, params) for prompt in PROMPTS] * 5


def test_the_pieces_of_several_answers_are_the_answers(live: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=1, logprobs=2)
    requests = [live.engine.make_request(prompt, params) for prompt in PROMPTS[:2]]
    answers = [answer for request in requests for answer in live.start(request)]
    pieces: dict[int, list[Piece]] = {number: [] for number in range(6)}

    async def read() -> None:
        async for number, piece in live.follow(answers):
            pieces[number].append(piece)

    asyncio.run(read())
    for number, answer in enumerate(answers):
        output, mine = answer.output, pieces[number]
        assert output.finished and [piece.finish_reason for piece in mine if piece.finish_reason] == [
            "length"
        ]
        assert "".join(piece.text for piece in mine) == output.text
        assert [token for piece in mine for token in piece.token_ids] == output.token_ids
        assert [entry for piece in mine for entry in piece.logprobs] == output.logprobs


def test_a_slow_coroutine_gets_larger_pieces(gated: AsyncEngine) -> None:
    answers = gated.start(gated.engine.make_request("hello", SamplingParams(max_tokens=9)))

    async def read() -> list[int]:
        sizes = []
        gated.engine.gate.release(1)
        async for _, piece in gated.follow(answers):
            sizes.append(len(piece.token_ids))
            gated.engine.gate.release(100)
            wait_for(lambda: answers[0].finished)  # in the way of the event loop, and of no step
        return sizes

    assert asyncio.run(read()) == [1, 8]


def test_a_coroutine_waits_no_longer_than_it_says(gated: AsyncEngine) -> None:
    answers = gated.start(gated.engine.make_request("hello", SamplingParams(max_tokens=5)))

    async def read() -> None:
        async for _ in gated.follow(answers, seconds=0.05):
            pass

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(read())
    assert not answers[0].wakers and not answers[0].finished


def test_a_coroutine_that_is_cancelled_and_a_loop_that_is_gone(gated: AsyncEngine) -> None:
    answers = gated.start(gated.engine.make_request("hello", SamplingParams(max_tokens=5)))

    async def leave() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(anext(gated.follow(answers)), 0.01)  # no news: the gate is shut

    asyncio.run(leave())
    assert not answers[0].wakers
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(anext(gated.follow(answers)))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert len(answers[0].wakers) == 1 and not abandoned.done()
    gated.engine.gate.release(100)
    assert last(gated.stream(answers[0].output.request_id)).finish_reason == "length"
    assert gated.failure is None


@pytest.mark.parametrize("method", ["stream", "progress", "output"])
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
