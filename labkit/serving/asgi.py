"""The API's raw ASGI: a limit for bodies, one app beside another, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")

EVENT_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}  # proxies hand on each event as it comes


class ClientGone(Exception):
    """The client has closed the connection."""


class BodyLimit:
    """Refuses a body over a size while it arrives, so that it never lies in memory as a whole.

    Many large ones at once are refused as well, because one client could send them all.

    Args:
        app: the app that gets the bodies.
        limit: the bytes of one body.
        together: the bytes of all that arrive at once. The first `SMALL` of each do not count, so that small
            bodies are always let in.
    """

    SMALL = 64 * 2**10

    def __init__(self, app: ASGIApp, limit: int, together: int = 64 * 2**20) -> None:
        self.app, self.limit, self.together = app, limit, together
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = held = 0

        def hold(more: int) -> None:
            nonlocal held
            held += more
            self._held += more

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise HTTPException(413, f"the body is too large: the limit is {self.limit:,} bytes")
            hold(max(0, size - self.SMALL) - held)
            if held and self._held > self.together:
                raise HTTPException(503, "too many large bodies at once: try again in a moment")
            return message

        async def send_and_let_go(message: Message) -> None:
            hold(-held)  # it has been read
            await send(message)

        try:
            await self.app(scope, receive_limited, send_and_let_go)
        finally:
            hold(-held)


def beside(api: ASGIApp, app: ASGIApp) -> ASGIApp:
    """An ASGI app that serves the API's paths and leaves all others to another app."""

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and (path.startswith("/v1/") or path in ("/health", "/metrics")):
            await api({**scope, "path": path, "root_path": ""}, receive, send)
        else:
            await app(scope, receive, send)

    return front


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away. Raises `ClientGone` then."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    leaving, doing = asyncio.ensure_future(leave()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        with contextlib.suppress(BaseException):
            await doing


async def patiently(source: AsyncGenerator[T, None], seconds: float) -> AsyncGenerator[T | None, None]:
    """The items of a source, and None each time that the first has not come for so many seconds."""
    first = asyncio.ensure_future(anext(source))
    try:
        while not (await asyncio.wait({first}, timeout=seconds))[0]:
            yield None
        yield first.result()
        async for item in source:
            yield item
    except StopAsyncIteration:  # of `first`: there is none
        pass
    finally:
        if not first.done():
            first.cancel()
            await asyncio.wait({first})  # the source cannot be closed while it runs
        await source.aclose()


class EventStream(StreamingResponse):
    """Server-sent events that end when the client goes away, even while nothing is sent.

    Its `background` task runs at the end in any case, also if nothing was ever sent.
    """

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGone, OSError):
            pass
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            if self.background:
                await self.background()
