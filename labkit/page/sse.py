"""One stream of snapshots for all who watch: one text for each moment, the same for everybody.

A page that comes late, or falls behind, gets everything and then what is new, like all others. So a reader
costs no more memory than the few texts that they have yet to read, and a text costs one write for each
reader.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from labkit.page.snapshot import ClientState, Snapshotter

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Reader = asyncio.Queue[bytes]  # the texts that somebody has yet to read; an empty one ends the stream

PATH = "/labkit/stream"
SECONDS = 0.2  # between two snapshots
FEW, SECONDS_FOR_FEW = 8, 0.08
BEHIND = 50  # texts: a reader with more of them to read is let go, comes back and gets everything
PIECE = 64 * 2**10  # bytes of a text that are handed to a connection at once
HEARTBEAT = 15.0  # seconds of silence: a proxy may take a longer silence for the end
BEAT = b"event: beat\ndata: 0\n\n"
AGAIN = b"retry: 1000\n"  # milliseconds until a browser that has lost us comes back
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),  # to a proxy
]


class Broadcast:
    """Tells everybody who watches what is new, as Server-Sent Events. While nobody watches, it does nothing.

    Args:
        snapshotter: the source of what is told; it is asked on the event loop that serves the readers.
    """

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._readers: set[Reader] = set()
        self._newcomers: set[Reader] = set()  # readers who have been told nothing yet
        self._client = ClientState()  # what all other readers have been told
        self._state: tuple[Any, ...] = ()  # the state of the clock that they were told last
        self._told = 0.0  # when they were told something last
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
        """Let go of all readers, from any thread, and serve nobody any more."""
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
                for start in range(0, len(text), PIECE):  # a reader who does not read has no more pending
                    piece = text[start : start + PIECE]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()
            self._end(reader)

    async def _wait_for_the_end(self, reader: Reader, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._end(reader)

    def _end(self, reader: Reader) -> None:
        """End the stream of a reader who has gone, or has to."""
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
            logger.exception("a snapshot could not be told")
            self._let_go()  # they come back, and begin anew
        finally:
            self._ticking = None

    def _tick(self) -> None:
        """Tell what is new since the last time; to those who have come since, everything."""
        snapshot = self._snapshotter.take()
        if not self._readers:
            self._client = ClientState()
        update = snapshot.tell(self._client)
        text = b""
        if self._is_new(update) and self._readers:
            text = event(update)
        elif time.monotonic() - self._told >= HEARTBEAT:
            text = BEAT
        if text:
            self._told = time.monotonic()
            for reader in list(self._readers):
                try:
                    reader.put_nowait(text)
                except asyncio.QueueFull:
                    self._end(reader)
        if self._newcomers:
            everything = AGAIN + event(snapshot.tell(ClientState()))
            for reader in self._newcomers:
                reader.put_nowait(everything)
            self._readers |= self._newcomers
            self._newcomers.clear()

    def _is_new(self, update: dict[str, Any]) -> bool:
        cards, state = update["cards"], (update["live"], update["busy"], update["plan"]["key"])
        told, self._state = self._state, state
        grown = "steps" in update["pictures"] or bool(cards["items"] or cards["gone"])
        return grown or "lab" in update or state != told


def _is_for_us(scope: MutableMapping[str, Any]) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return scope["path"].removeprefix(scope.get("root_path", "")) == PATH


def event(update: dict[str, Any]) -> bytes:
    """What is new, as the text of one event."""
    return f"data: {json.dumps(update, separators=(',', ':'))}\n\n".encode()
