"""Refuses what a page of somebody else could make a visitor's browser send here.

A browser on this machine reaches a server on loopback for any page that it shows. Such a page can call it by
a name of its own that resolves to loopback (DNS rebinding): its `Host` gives it away. And it can post without
being asked for permission: `Sec-Fetch-Site`, or `Origin` where a browser does not send that, says that it is
foreign (https://www.w3.org/TR/fetch-metadata/). Programs send neither, and are let in.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from labkit.serving.errors import RequestError, error_object

_READS = ("GET", "HEAD", "OPTIONS")
_ELSEWHERE = ("COLAB_RELEASE_TAG", "JUPYTERHUB_SERVICE_PREFIX")  # where the browser is not on this machine


class Guard:
    """An ASGI app before another one.

    Args:
        app: the app that gets what is let in.
        host: the address that the server listens at. Only on loopback must requests name the server right.
        names: further names by which browsers reach the server, through a proxy for instance.
        origins: the foreign origins whose pages may post; "*" for all.
    """

    def __init__(
        self, app: ASGIApp, host: str, names: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        self.app = app
        self.names = {name.lower() for name in names}
        self._checks_host = is_loopback(host) and not any(map(os.environ.__contains__, _ELSEWHERE))
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse(error_object(error), error.status)(scope, receive, send)

    def _error(self, method: str, headers: Headers) -> RequestError | None:
        given = headers.get("host", "")
        host, port = _split(given)
        if self._checks_host and given and host not in self.names and not is_loopback(host):
            message = f"this server is not known as {given[:100]!r}: see --allowed-host"
            return RequestError(421, message, code="unknown_host")
        if method in _READS or self._is_own(headers, host, port):
            return None
        return RequestError(403, "pages from elsewhere may not post here", code="foreign_origin")

    def _is_own(self, headers: Headers, host: str, port: int | None) -> bool:
        """Whether a request comes from a page of this server, from one that may post, or from a program."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if "*" in self._origins or origin in self._origins or site in ("same-origin", "none"):
            return True
        if site is not None or origin is None:
            return site is None
        scheme, _, rest = origin.partition("://")
        name, its_port = _split(rest)
        if name in self.names:
            return True
        usual = {"http": 80, "https": 443}.get(scheme)
        return bool(name) and name == host and port in (None, its_port or usual)  # some proxies drop the port


def is_loopback(host: str) -> bool:
    """Whether a name or an address is that of this machine as only this machine sees it."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _split(host: str) -> tuple[str, int | None]:
    """The name in lower case and the port of what a header names; ("?", None) for what is neither."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", parts.port
    except ValueError:
        return "?", None
