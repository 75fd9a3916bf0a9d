"""The news of the lab as one stream for all who watch: one text for each moment, the same for everybody.

A page that comes late, or falls behind, gets everything and then what is new, like all others. So nothing is
kept of anybody but the few texts that they have yet to read, and a text costs one write for each of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from labkit.page.snapshot import Known, News, as_json

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Reader = asyncio.Queue[bytes]  # what somebody has yet to read; an empty text ends it

PATH = "/labkit/stream"
SECONDS = 0.2  # between two moments that are told of
FEW, SECONDS_FOR_FEW = 8, 0.08
BEHIND = 50  # texts: whoever has more of them to read is let go, comes back and gets everything
HEARTBEAT = 15.0  # seconds of silence: whatever is between us and a browser may take longer ones for the end
BEAT = b"event: beat\ndata: 0\n\n"
AGAIN = b"retry: 1000\n"  # milliseconds until a browser that has lost us comes back
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),  # to a proxy
]


class Broadcast:
    """Tells everybody who watches what is new, as Server-Sent Events. Without anybody, it does nothing.

    Args:
        news: to tell. It is taken down on the event loop that serves the readers.
    """

    def __init__(self, news: News) -> None:
        self._news = news
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._readers: set[Reader] = set()
        self._newcomers: set[Reader] = set()  # who have heard nothing yet
        self._known = Known()  # what all readers have been told
        self._state: tuple[Any, ...] = ()  # of the clock, as they have been told
        self._told = 0.0  # when
        self._closed = False

    def before(self, app: App) -> App:
        """An ASGI app that serves the stream at `PATH`, and leaves everything else to another app."""

        async def front(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            if not self._closed and _is_for_us(scope):
                await self._serve(receive, send)
            else:
                await app(scope, receive, send)

        return front

    def close(self) -> None:
        """Let go of everybody, from any thread, and serve nobody any more."""
        self._closed = True
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._let_go)

    async def _serve(self, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        reader: Reader = asyncio.Queue(BEHIND)
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        self._newcomers.add(reader)
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick_on())
        leaving = asyncio.create_task(self._wait_for_the_end(reader, receive))
        try:
            while text := await reader.get():
                await send({"type": "http.response.body", "body": text, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()
            self._end(reader)

    async def _wait_for_the_end(self, reader: Reader, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end(reader)

    def _end(self, reader: Reader) -> None:
        """A reader has gone, or must."""
        self._readers.discard(reader)
        self._newcomers.discard(reader)
        while not reader.empty():
            reader.get_nowait()
        reader.put_nowait(b"")

    def _let_go(self) -> None:
        for reader in [*self._readers, *self._newcomers]:
            self._end(reader)

    async def _tick_on(self) -> None:
        try:
            while self._readers or self._newcomers:
                self._tick()
                await asyncio.sleep(SECONDS_FOR_FEW if len(self._readers) <= FEW else SECONDS)
        except Exception:
            logger.exception("the news could not be told")
            self._let_go()  # they come back, and begin anew
        finally:
            self._ticking = None

    def _tick(self) -> None:
        """Tell what is new since the last time; to those who have come since, everything."""
        moment = self._news.now()
        if not self._readers:
            self._known = Known()
        news = moment.since(self._known)
        self._known.hear(news)
        if self._is_new(news) and self._readers:
            self._tell_all(_event(news))
        elif time.monotonic() - self._told >= HEARTBEAT:
            self._tell_all(BEAT)
        if self._newcomers:
            everything = AGAIN + _event(moment.since(Known()))
            for reader in self._newcomers:
                reader.put_nowait(everything)
            self._readers |= self._newcomers
            self._newcomers.clear()

    def _is_new(self, news: dict[str, Any]) -> bool:
        cards, state = news["cards"], (news["live"], news["busy"], news["plan"]["key"])
        told, self._state = self._state, state
        grown = "steps" in news["pictures"] or bool(cards["items"] or cards["gone"])
        return grown or "lab" in news or state != told

    def _tell_all(self, text: bytes) -> None:
        self._told = time.monotonic()
        for reader in list(self._readers):
            try:
                reader.put_nowait(text)
            except asyncio.QueueFull:
                self._end(reader)


def _is_for_us(scope: MutableMapping[str, Any]) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return scope["path"].removeprefix(scope.get("root_path", "")) == PATH


def _event(news: dict[str, Any]) -> bytes:
    return f"data: {as_json(news)}\n\n".encode()
