"""Watchers of the page's stream, without a browser and without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from labkit.page.snapshot import ClientState
from labkit.page.sse import AGAIN, BEAT, PATH, Broadcast
from tests.waiting import PATIENCE


class Watcher:
    """A person with the stream open, as a server sees them."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.start: dict[str, Any] = {}
        self.over = False
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.start = message
        elif message.get("more_body"):
            self.texts.append(message["body"])
        else:
            self.over = True

    @property
    def updates(self) -> list[dict[str, Any]]:
        texts = [text.removeprefix(AGAIN) for text in self.texts if text != BEAT]
        assert all(text.startswith(b"data: ") and text.endswith(b"\n\n") for text in texts)
        return [json.loads(text[6:]) for text in texts]


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), PATIENCE)


async def nobody(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("it was handed on")


@asynccontextmanager
async def watching(told: Broadcast, count: int = 1) -> Any:
    """Watchers who have all been told everything once."""
    watchers = [Watcher() for _ in range(count)]
    front, scope = told.before(nobody), {"type": "http", "method": "GET", "path": PATH}
    doing = [asyncio.create_task(front(scope, watcher.receive, watcher.send)) for watcher in watchers]
    await until(lambda: all(watcher.texts for watcher in watchers))
    yield watchers[0] if count == 1 else watchers
    for watcher in watchers:
        watcher.reading.set()
        watcher.gone.set()
    await asyncio.wait_for(asyncio.gather(*doing), PATIENCE)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def learn(client: ClientState, update: dict[str, Any]) -> None:
    """Know what an update tells, as `live_feed.js` and `cards.js` do."""
    pictures, cards = update["pictures"], update["cards"]
    client.feed, client.step, client.plan = pictures["feed"], pictures["step"], update["plan"]["key"]
    client.cards = cards["since"]
    client.settings = update.get("lab", {}).get("version", client.settings)
    unfinished = {} if cards["reset"] else dict(client.unfinished)
    for item in cards["items"]:
        unfinished[item["id"]] = item["length"]
        if item["reason"]:
            del unfinished[item["id"]]
    for name in cards["gone"]:
        unfinished.pop(name, None)
    client.unfinished = unfinished
