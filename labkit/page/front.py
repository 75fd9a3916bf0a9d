"""What stands before gradio on a page that is served: it sees who is heard from, and takes no files."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from labkit.page.upload import MAX_BYTES
from labkit.page.visitors import Visitors

MAX_BODY = MAX_BYTES * 4 // 3 + 64 * 2**10  # the largest trace in base64, and some words round it
_LINE = "/gradio_api/heartbeat/"  # gradio's own: a page keeps it open, with the name of its tab behind it
_FILES = (
    "/gradio_api/upload",
    "/gradio_api/deep_link",
)  # they write to the disk, and nothing here needs them


class Front:
    """An ASGI app before gradio's.

    Args:
        app: gradio's app.
        visitors: those who are told whose page has an open line.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors) -> None:
        self.app, self.visitors = app, visitors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        _, line, tab = path.rpartition(_LINE)
        if line and tab:
            with self.visitors.line(tab):
                await self.app(scope, receive, send)
        elif path.rstrip("/").endswith(_FILES) or ("/gradio_api/" in path and _is_form(scope)):
            refusal = PlainTextResponse("This page takes no files here.", 404)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _is_form(scope: Scope) -> bool:
    """Whether a request could hold files: gradio writes each to its disk for a while."""
    return any(name == b"content-type" and b"multipart/" in value.lower() for name, value in scope["headers"])
