"""How long a connection may keep the server waiting, and how many there may be.

An ASGI app sees a request once its head is there, so what a client does before, and whether it reads what it
is sent, is seen here: in the protocol that uvicorn makes for each connection. A client that sends nothing
while it is to send, or reads nothing while it is to read, is let go after a while. Where there are as many
connections as the process may have files, the one that has been silent the longest makes room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import uvicorn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

SILENCE = 30.0  # seconds without a byte of a request that is not complete
STUCK = 60.0  # seconds in which a client reads nothing of what it is sent
FILES = 65_536  # that the process may have open, where the system lets it choose
OTHERS = 96  # files that are no connections: the model's, the engine's, and those that are being accepted


def raise_file_limit() -> int:
    """Let the process open as many files as it may, and return their number."""
    if resource is None:
        return FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return FILES if soft == resource.RLIM_INFINITY else soft


class _Seldom(logging.Filter):
    """Lets one complaint of asyncio's about too many files through in a minute: it makes thousands."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if "socket.accept() out of system resource" not in record.getMessage():
            return True
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 60
        return True


_SELDOM = _Seldom()


class Connections:
    """The connections of one server, the longest silent first, and the times that they are given.

    Args:
        most: the number of connections at most.
        silence: see `SILENCE`.
        stuck: see `STUCK`.
    """

    def __init__(self, most: int, *, silence: float = SILENCE, stuck: float = STUCK) -> None:
        self.most, self.silence, self.stuck = most, silence, stuck
        self.number = 0
        self.silent: dict[asyncio.Transport, None] = {}

    def make_room(self) -> None:
        """Let go of the connection that has been silent the longest, if there are too many."""
        if self.number > self.most and self.silent:
            oldest = next(iter(self.silent))
            del self.silent[oldest]
            oldest.abort()


def patient(base: type[asyncio.Protocol], connections: Connections) -> type[asyncio.Protocol]:
    """A protocol of uvicorn that lets go of clients who keep it waiting.

    Args:
        base: uvicorn's own, which has the request that it is in as `cycle`.
        connections: the connections that it counts among.
    """

    class Patient(base):  # type: ignore[valid-type, misc]
        _silence: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None
        _unsent = 0  # bytes, when it was looked at last
        _is_ours = True  # until it is upgraded, and becomes another protocol's

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connections.number += 1
            self._listen()
            connections.make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self._let_go()
            super().connection_lost(exc)

        def handle_websocket_upgrade(self, *event: Any) -> None:
            self._let_go()
            super().handle_websocket_upgrade(*event)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._listen()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._listen()

        def _listen(self) -> None:
            """Wait for the client if it is its turn: for its next bytes, or for the whole of a head."""
            in_body = self.cycle is not None and not self.cycle.response_complete
            if not self._is_ours or (self._silence and not in_body):
                return
            self._stop_listening()
            if not in_body or self.cycle.more_body:
                self._silence = self.loop.call_later(connections.silence, self.transport.abort)
                connections.silent[self.transport] = None

        def _stop_listening(self) -> None:
            if self._silence:
                self._silence.cancel()
                self._silence = None
            connections.silent.pop(self.transport, None)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unsent = self.transport.get_write_buffer_size()
            self._stuck = self.loop.call_later(connections.stuck, self._look_for_progress)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stuck:
                self._stuck.cancel()

        def _look_for_progress(self) -> None:
            if (unsent := self.transport.get_write_buffer_size()) >= self._unsent:
                self.transport.abort()
            else:
                self._unsent = unsent
                self._stuck = self.loop.call_later(connections.stuck, self._look_for_progress)

        def _let_go(self) -> None:
            if self._is_ours:
                self._is_ours = False
                connections.number -= 1
                self._stop_listening()
                if self._stuck:
                    self._stuck.cancel()

    return Patient


def harden(config: uvicorn.Config, *, proxy_headers: bool) -> Connections:
    """Make a server patient, and have it believe proxies only if asked to. It may have been started.

    Uvicorn reads both settings anew for each connection.

    Args:
        config: the server's configuration, which has been loaded.
        proxy_headers: whether a proxy on this machine is believed when it names the address of a client.
    """
    logging.getLogger("asyncio").addFilter(_SELDOM)
    connections = Connections(max(8, raise_file_limit() - OTHERS))
    config.http_protocol_class = patient(config.http_protocol_class, connections)
    if not proxy_headers and isinstance(config.loaded_app, ProxyHeadersMiddleware):
        config.loaded_app = config.loaded_app.app
    return connections
