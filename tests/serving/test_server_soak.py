"""Two thousand calls, sixty-four at a time, of clients that behave in all the ways that clients behave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from labkit.config import EngineConfig
from labkit.engine import Engine, answer_ids
from labkit.sampling_params import SamplingParams
from labkit.serving.handler import Options
from labkit.serving.limits import Limits
from tests.serving.api_server import MODEL, Served, served

CALLS, ROUNDS, AT_ONCE = 2000, 4, 64
TEXT = "the sea is a prime number and some words of many kinds go on to their end in a long night"
BAD = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "word " * 200}, "prompt"),
    ({"prompt": [["a"], 1]}, "prompt"),
    ({"stop": 5}, "stop"),
    ({"model": "another"}, "model"),
    ({"wibble": 1}, "wibble"),
]
LONG = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}


class Alone:
    """What an engine answers to one request at a time."""

    def __init__(self, model: Any) -> None:
        self.engine = Engine(
            EngineConfig(model, num_blocks=64, block_size=4, enable_prefix_caching=False, max_trace_steps=1)
        )
        self._known: dict[str, list[tuple[str, str]]] = {}

    def answers(self, prompt: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
        """Text and finish reason of each answer to a prompt with these fields."""
        key = json.dumps([prompt, fields])
        if key not in self._known:
            params = SamplingParams(**fields)
            name = self.engine.add_request(prompt, params)
            while self.engine.has_unfinished:
                self.engine.step()
            outputs = [self.engine.outputs.pop(answer) for answer in answer_ids(name, params.n)]
            self._known[key] = [(output.text, output.finish_reason) for output in outputs]
        return self._known[key]


class Clients:
    """Sends calls of every kind, and checks what comes back.

    Args:
        site: to call.
        seed: of all that is random.
    """

    def __init__(self, site: Served, seed: int) -> None:
        self.site = site
        self.host, self.port = site.url.removeprefix("http://").split(":")
        self.random = random.Random(seed)
        self.alone = Alone(site.live.engine.model)
        self.prompts = [" ".join(self.random.choices(TEXT.split(), k=k)) for k in range(2, 26, 2)]
        self.done: Counter[str] = Counter()

    async def run(self, count: int) -> None:
        """So many calls, `AT_ONCE` at a time."""
        left = iter(range(count))
        kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.plain, 5), (self.streamed, 5), (self.stopped, 2), (self.several, 2), (self.slow, 1),
            (self.refused, 2), (self.leaves_in_mid_stream, 2), (self.leaves_before_the_first_token, 2),
            (self.leaves_while_it_waits, 1), (self.resets, 1), (self.aborted, 1),
        ]  # fmt: skip
        deck = [kind for kind, share in kinds for _ in range(share)]

        async def one_after_another() -> None:
            for _ in left:
                kind = self.random.choice(deck)
                await kind()
                self.done[kind.__name__] += 1

        await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))

    @contextlib.asynccontextmanager
    async def call(self, **fields: Any) -> AsyncIterator[tuple[int, str, asyncio.StreamReader]]:
        """Status, request id and the rest of an answer; the connection is closed after it."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request_of(fields))
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            yield int(first.split()[1]), headers.get("x-request-id", ""), reader
        finally:
            writer.close()

    # -- clients that stay ------------------------------------------------------------------------

    async def plain(self) -> None:
        await self.whole({"max_tokens": self.random.choice((1, 6, 14)), "temperature": 0})

    async def streamed(self) -> None:
        await self.pieces({"max_tokens": self.random.choice((1, 6, 14)), "temperature": 0})

    async def slow(self) -> None:
        await self.pieces(LONG, wait=0.02)

    async def stopped(self) -> None:
        prompt = self.random.choice(self.prompts)
        words = self.alone.answers(prompt, LONG)[0][0].split()
        fields = {"max_tokens": 14, "temperature": 0, "stop": [words[len(words) // 8], "\0"]}
        await self.random.choice((self.whole, self.pieces))(fields, prompt)

    async def several(self) -> None:
        fields = {"max_tokens": 6, "temperature": 0.9, "n": 3, "seed": self.random.randrange(2)}
        await self.random.choice((self.whole, self.pieces))(fields)

    async def whole(self, fields: dict[str, Any], prompt: str = "") -> None:
        prompt = prompt or self.random.choice(self.prompts)
        async with self.call(prompt=prompt, **fields) as (status, _, reader):
            answer = json.loads(await reader.read())
        assert status == 200, answer
        got = [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
        assert got == self.alone.answers(prompt, fields)

    async def pieces(self, fields: dict[str, Any], prompt: str = "", wait: float = 0) -> None:
        prompt = prompt or self.random.choice(self.prompts)
        async with self.call(prompt=prompt, stream=True, **fields) as (status, _, reader):
            assert status == 200
            got = await joined(reader, wait)
        assert got == self.alone.answers(prompt, fields)

    async def refused(self) -> None:
        fields, param = self.random.choice(BAD)
        stream = self.random.random() < 0.5
        async with self.call(**{"prompt": "a", "stream": stream} | fields) as (status, _, reader):
            assert 400 <= status < 500 and json.loads(await reader.read())["error"]["param"] == param

    async def aborted(self) -> None:
        """Somebody else ends the request: the stream says so, unless it was complete before."""
        prompt = self.random.choice(self.prompts)
        async with self.call(prompt=prompt, stream=True, **LONG) as (_, name, reader):
            await reader.readline()
            self.site.live.abort(name)
            *_, last, done = [line async for line in reader if line.strip()]
        assert done == b"data: [DONE]\n"
        last = json.loads(last.removeprefix(b"data: "))
        assert last.get("error", {}).get("code") == "aborted" or last["choices"][0]["finish_reason"]

    # -- clients that go --------------------------------------------------------------------------

    async def leaves_in_mid_stream(self) -> None:
        prompt = self.random.choice(self.prompts)
        async with self.call(prompt=prompt, stream=True, **LONG) as (_, _, reader):
            for _ in range(self.random.randrange(1, 9)):
                await reader.readline()

    async def leaves_before_the_first_token(self) -> None:
        async with self.call(prompt=self.random.choice(self.prompts), stream=True, **LONG):
            pass

    async def leaves_while_it_waits(self) -> None:
        _, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(request_of({"prompt": self.random.choice(self.prompts)} | LONG))
        await asyncio.sleep(self.random.random() / 20)
        writer.close()

    async def resets(self) -> None:
        """The connection breaks without a goodbye, with half a request sent or all of it."""
        _, writer = await asyncio.open_connection(self.host, self.port)
        now = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        sent = request_of({"prompt": "a b", "stream": self.random.random() < 0.5} | LONG)
        writer.write(sent[: self.random.randrange(len(sent))] if self.random.random() < 0.3 else sent)
        await asyncio.sleep(self.random.choice((0, 0.01, 0.05)))
        writer.transport.abort()


def request_of(fields: dict[str, Any]) -> bytes:
    """In HTTP/1.0, whose answers end where the connection ends."""
    content = json.dumps({"model": MODEL} | fields)
    head = f"POST /v1/completions HTTP/1.0\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{content}".encode()


async def joined(lines: asyncio.StreamReader, wait: float) -> list[tuple[str, str]]:
    """Text and finish reason of each choice of a stream, read with a pause after each line."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    done = False
    async for line in lines:
        assert not done or line == b"\n"
        done = done or line == b"data: [DONE]\n"
        if line != b"\n" and not done:
            for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                index = choice["index"]
                assert index not in reasons
                texts[index] = texts.get(index, "") + choice["text"]
                if choice["finish_reason"]:
                    reasons[index] = choice["finish_reason"]
        await asyncio.sleep(wait)
    assert done and reasons.keys() == texts.keys()
    return [(texts[index], reasons[index]) for index in sorted(texts)]


def test_two_thousand_calls_leave_nothing_behind() -> None:
    options = Options(limits=Limits(requests=4096, queue=4096))
    sizes = {"max_model_len": 120, "num_blocks": 160, "max_num_seqs": 16, "max_trace_steps": 1}
    loops: set[asyncio.AbstractEventLoop] = set()
    with served(options, **sizes) as site:
        site.handler.on_request = lambda *_: loops.add(asyncio.get_running_loop())
        clients = Clients(site, seed=11)
        objects = []
        for _ in range(ROUNDS):
            asyncio.run(clients.run(CALLS // ROUNDS))
            site.until_quiet(60)
            (loop,) = loops
            until(lambda loop=loop: strays(loop) == [])
            gc.collect()
            objects.append(len(gc.get_objects()))
        assert not site.live.engine.has_unfinished and site.live.failure is None
        assert site.live.engine.scheduler.requests == {}
    assert sum(clients.done.values()) == CALLS and len(clients.done) == 11
    # The first round fills what is bounded. A leak of one object in three calls would be seen.
    assert objects[-1] - objects[0] < (CALLS - CALLS // ROUNDS) / 3, objects


def strays(loop: asyncio.AbstractEventLoop) -> list[str]:
    """What a server's loop has under way, beside what uvicorn does all the time."""
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks(loop)]
    return [name for name in names if name not in ("Server.serve", "LifespanOn.main")]


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "it does not come to rest"
        time.sleep(0.01)
