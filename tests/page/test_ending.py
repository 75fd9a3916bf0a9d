"""How the program that serves the page ends: all are told, within bounds, and a second signal is obeyed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx

from labkit.page.sse import PATH
from tests.page.program import PATIENCE, program

MANY = 40
LIMITS = ("--max-requests", "100", "--max-num-seqs", "1")
LONG = {"model": "tiny-random", "prompt": "a b", "max_tokens": 1900, "ignore_eos": True, "temperature": 1}


@contextlib.asynccontextmanager
async def stream(url: str, method: str = "GET", body: Any = None) -> AsyncIterator[AsyncIterator[str]]:
    """The data of a stream's events."""
    async with (
        httpx.AsyncClient(timeout=PATIENCE) as client,
        client.stream(method, url, json=body) as response,
    ):
        assert response.status_code == 200
        yield (line[6:] async for line in response.aiter_lines() if line.startswith("data: "))


async def ask(url: str) -> str:
    """The last words of a streamed answer; the stream has to end as it should."""
    async with stream(url + "/v1/completions", "POST", LONG | {"stream": True}) as events:
        *_, last, done = [event async for event in events]
    assert done == "[DONE]"
    error = json.loads(last).get("error")
    return error["code"] if error else json.loads(last)["choices"][0]["finish_reason"]


async def until_busy(client: httpx.AsyncClient, url: str) -> None:
    while (await client.get(url + "/health")).json()["requests"] < MANY:
        await asyncio.sleep(0.02)


async def watch(url: str) -> dict[str, Any]:
    """What a page that watches knows in the end."""
    seen: dict[str, Any] = {"notice": "", "reasons": []}
    async with stream(url + PATH) as events:
        async for event in events:
            update = json.loads(event)
            if "live" in update:
                seen["notice"] = update["live"]["notice"]
                seen["reasons"] += [item["reason"] for item in update["cards"]["items"] if item["reason"]]
    return seen


def test_all_are_told() -> None:
    async def test(process: Any, url: str) -> None:
        watching = asyncio.create_task(watch(url))
        asking = [asyncio.create_task(ask(url)) for _ in range(MANY)]
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            await until_busy(client, url)
            process.send_signal(signal.SIGTERM)
            assert set(await asyncio.gather(*asking)) == {"aborted"}
        seen = await watching
        assert seen["reasons"] == ["abort"] * MANY and "The lab is ending" in seen["notice"]

    with program("--drain-seconds", "0.5", *LIMITS) as (process, url):
        asyncio.run(test(process, url))
        assert process.wait(PATIENCE) == 0
        said = process.stdout.read()
        assert re.fullmatch(r"Ending. Requests under way: 40, .* 0.5 s. Ctrl-C ends them now.\s*", said), said


def test_what_is_under_way_may_end_and_nothing_new_is_taken_in() -> None:
    async def test(process: Any, url: str) -> None:
        body = LONG | {"max_tokens": 500, "stream": True}
        async with stream(url + "/v1/completions", "POST", body) as events:
            await anext(events)
            process.send_signal(signal.SIGTERM)
            *_, last, done = [event async for event in events]
        assert json.loads(last)["choices"][0]["finish_reason"] == "length" and done == "[DONE]"

    with program("--drain-seconds", "3600") as (process, url):
        asyncio.run(test(process, url))
        assert process.wait(PATIENCE) == 0


def test_a_second_signal_ends_at_once() -> None:
    async def test(process: Any, url: str) -> None:
        asking = [asyncio.create_task(ask(url)) for _ in range(MANY)]
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            await until_busy(client, url)
            process.send_signal(signal.SIGTERM)
            while (await client.get(url + "/health")).status_code == 200:
                pass
            refused = await client.post(url + "/v1/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        process.send_signal(signal.SIGTERM)
        ends = await asyncio.gather(*asking, return_exceptions=True)
        assert any(isinstance(end, httpx.TransportError) for end in ends)

    with program("--drain-seconds", "3600", *LIMITS) as (process, url):
        asyncio.run(test(process, url))
        assert process.wait(PATIENCE) == -signal.SIGTERM


def test_one_who_does_not_read_holds_up_nothing() -> None:
    with program() as (process, url), socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        deaf.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        for _ in range(3):
            body = LONG | {"max_tokens": 300, "n": 8}
            assert httpx.post(url + "/v1/completions", json=body, timeout=PATIENCE).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
