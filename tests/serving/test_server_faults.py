"""What breaks in mid-stream ends whom it touches, with an error that says so, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.serving.handler import Options
from labkit.serving.schema import CompletionBody
from labkit.serving.stream import CompletionFormat
from tests.serving import api_server
from tests.serving.api_server import Served, served

LENGTH = {"max_tokens": 12, "ignore_eos": True}


def ask(prompt: str = "a b", **fields: Any) -> dict[str, Any]:
    return api_server.ask(prompt=prompt, **LENGTH, **fields)


def solo(site: Served, prompt: str) -> str:
    """What the engine itself answers to `ask(prompt)`."""
    return api_server.solo(site, prompt, **LENGTH).text


@contextlib.contextmanager
def streams(site: Served, *prompts: str) -> Iterator[list[Iterator[dict[str, Any]]]]:
    """The events of streams that wait for the engine, in the order of the prompts."""

    def events(stream: httpx.Response) -> Iterator[dict[str, Any]]:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return map(json.loads, lines)

    with contextlib.ExitStack() as stack:
        site.live.pause()
        opened = []
        for number, prompt in enumerate(prompts, 1):
            request = {"json": ask(prompt, stream=True), "timeout": 30}
            opened.append(stack.enter_context(httpx.stream("POST", f"{site.url}/v1/completions", **request)))
            assert site.live.num_unfinished == number
        site.live.resume()
        yield [events(stream) for stream in opened]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("a fault of the kernel"), "RuntimeError: a fault of the kernel"),
        (MemoryError(), "the step failed: MemoryError"),
        (torch.OutOfMemoryError("no room"), "the step ran out of memory: lower max_num_batched_tokens"),
    ],
)
def test_a_step_that_fails_ends_those_in_it_and_the_queue_goes_on(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(max_num_seqs=2) as site:
        model = site.live.engine.runner.model
        forward, calls = model.forward, 0
        third, later = solo(site, "the third"), solo(site, "later")

        def failing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise error
            return forward(*arguments)

        monkeypatch.setattr(model, "forward", failing)
        with streams(site, "the first", "the second", "the third") as (one, two, three):
            for events in (one, two):
                *tokens, last = events
                assert "".join(event["choices"][0]["text"] for event in tokens)  # it was in mid-stream
                assert last["error"]["type"] == "server_error" and words in last["error"]["message"]
            assert "".join(event["choices"][0]["text"] for event in three) == third
        assert calls > 6
        site.until_quiet()
        answer = httpx.post(f"{site.url}/v1/completions", json=ask("later"), timeout=30)
        assert answer.json()["choices"][0]["text"] == later
        assert httpx.get(f"{site.url}/health").status_code == 200


def fail_at(call: int, error: Exception, site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pool of the engine raise at one call of `allocate`."""
    allocate, calls = BlockPool.allocate, 0

    def failing(pool: BlockPool, request_id: str, count: int) -> list[int]:
        nonlocal calls
        calls += pool is site.live.engine.pool  # and not the copy that a preview plans on
        if calls == call:
            raise error
        return allocate(pool, request_id, count)

    monkeypatch.setattr(BlockPool, "allocate", failing)


@pytest.mark.parametrize("call", [2, 4], ids=["as it comes", "in mid-stream"])
def test_who_gets_no_page_ends_and_the_others_go_on(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["the first", "the second", "the third"]
    with served(max_num_seqs=3) as site:
        expected = [solo(site, prompt) for prompt in prompts]
        fail_at(call, OutOfBlocks("a bug"), site, monkeypatch)
        failed = []
        with streams(site, *prompts) as opened:
            for i, events in enumerate(opened):
                *tokens, last = events
                if "error" in last:
                    failed.append(i)
                    assert last["error"]["message"] == "the pool gave it no page: a bug"
                    assert bool(tokens) == (call == 4)
                else:
                    assert "".join(event["choices"][0]["text"] for event in (*tokens, last)) == expected[i]
        assert len(failed) == 1
        site.until_quiet()
        assert httpx.get(f"{site.url}/health").status_code == 200


def test_a_broken_pool_stops_the_engine_and_everybody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds which page is unknown then: to go on would be to mix up answers."""
    with served(max_num_seqs=2) as site:
        fail_at(4, InvariantError("a bug"), site, monkeypatch)
        with streams(site, "the first", "the second", "the third") as opened:
            for events in opened:
                *_, last = events
                assert "InvariantError: a bug" in last["error"]["message"]
        health = httpx.get(f"{site.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        answer = httpx.post(f"{site.url}/v1/completions", json=ask(), timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
        assert not site.handler.busy


def test_an_answer_that_takes_too_long_ends_in_mid_stream() -> None:
    with served(Options(request_seconds=0.5)) as site:
        site.live.pause()
        with httpx.stream("POST", f"{site.url}/v1/completions", json=ask(stream=True), timeout=30) as stream:
            site.live.single_step()
            *_, last, done = [line for line in stream.iter_lines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert done == "data: [DONE]"
        site.live.resume()
        site.until_quiet()


def test_a_client_that_leaves_as_news_comes_is_not_followed_to_the_end() -> None:
    """`asyncio.wait_for` before Python 3.12 loses a cancellation that comes together with the result."""
    told: list[int] = []

    async def leave_as_news_comes(site: Served) -> None:
        handler, live = site.handler, site.live
        call = await handler.start(CompletionBody.model_validate(ask()), "", CompletionFormat)

        async def listen() -> None:
            async for _, piece in handler.follow(call):
                told.append(len(piece.token_ids))

        def step() -> None:  # in the way of the event loop, which finds the news and the end together
            before = call.answers[0].num_tokens
            live.single_step()
            while call.answers[0].num_tokens == before:
                time.sleep(0.001)

        listening = asyncio.create_task(listen())
        step()
        while not told:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        step()
        asyncio.get_running_loop().call_soon(listening.cancel)
        await asyncio.wait({listening}, timeout=30)
        assert listening.cancelled() and told == [1]
        await handler.finish(call)

    with served() as site:
        site.live.pause()
        asyncio.run(leave_as_news_comes(site))
        site.live.resume()
        site.until_quiet()
