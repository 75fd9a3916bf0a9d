"""Clients who send nothing, or read nothing, are let go, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import uvicorn

from labkit.serving.connections import Connections, _Seldom, harden, patient, raise_file_limit

PATIENCE = 30  # seconds until a test gives up; nothing is decided by it
PROTOCOLS = ["h11", "httptools"]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says who asks; at /endless, one megabyte after the other; and only what was sent whole is answered."""
    if scope["type"] != "http":
        return
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/endless" and message["type"] == "http.request":
        await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        if scope["state"]["connections"].number == 0:
            return
    await send({"type": "http.response.body", "body": f"{scope['client'][0]} {len(body)}".encode()})


@contextlib.contextmanager
def served(
    http: str = "h11", *, proxy_headers: bool = False, **bounds: Any
) -> Iterator[tuple[int, Connections]]:
    """The app on a hardened server: its port and its connections."""
    if http == "httptools":
        pytest.importorskip("httptools")
    config = uvicorn.Config(app, port=0, log_level="error", http=http, lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    connections = harden(config, proxy_headers=proxy_headers)
    for name, value in bounds.items():
        setattr(connections, name, value)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    server.lifespan.state["connections"] = connections
    try:
        yield server.servers[0].sockets[0].getsockname()[1], connections
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connect(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    client.sendall(sent)
    return client


def is_over(client: socket.socket) -> bool:
    """Wait until the server has closed a connection."""
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


HALF = {
    "nothing": b"",
    "half a head": b"POST / HTTP/1.1\r\nHost: x\r\n",
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc",
}


@pytest.mark.parametrize("http", PROTOCOLS)
@pytest.mark.parametrize("sent", HALF)
def test_who_stops_in_the_middle_is_let_go(http: str, sent: str) -> None:
    with served(http, silence=0.1) as (port, connections):
        assert is_over(connect(port, HALF[sent]))
        until(lambda: connections.number == 0)
        assert not connections.silent


def test_a_head_must_be_whole_in_time_however_it_drips() -> None:
    with served(silence=0.3) as (port, _):
        client = connect(port)
        with pytest.raises(OSError):
            while True:  # each byte comes well within the time
                client.sendall(b"X")
                time.sleep(0.02)


@pytest.mark.parametrize("http", PROTOCOLS)
def test_who_reads_nothing_is_let_go_and_little_is_kept_for_them(http: str) -> None:
    with served(http, stuck=0.2) as (port, connections):
        client = connect(port, b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: connections.number == 1)
        until(lambda: connections.number == 0)
        assert is_over(client)


def test_others_are_served_while_there_are_more_silent_connections_than_places() -> None:
    with served(most=4, silence=3600.0) as (port, connections):
        silent = [connect(port) for _ in range(12)]
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE).text == "127.0.0.1 0"
        assert all(is_over(client) for client in silent[:6])
        until(lambda: connections.number <= 4)
        assert len(connections.silent) <= connections.number


@pytest.mark.parametrize("proxy_headers", [False, True])
def test_a_client_cannot_make_up_its_address(proxy_headers: bool) -> None:
    with served(proxy_headers=proxy_headers) as (port, _):
        told = httpx.get(f"http://127.0.0.1:{port}/", headers={"X-Forwarded-For": "9.9.9.9"}).text
        assert told.startswith("9.9.9.9" if proxy_headers else "127.0.0.1")


def test_a_file_limit_is_raised_as_far_as_it_may_be() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        most = raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, before[1]) and most >= 256
        assert raise_file_limit() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Base(asyncio.Protocol):
    """What there is of uvicorn's protocol. Its timers never ring."""

    cycle = None

    def __init__(self) -> None:
        self.loop = SimpleNamespace(call_later=lambda *_: SimpleNamespace(cancel=lambda: None))

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.handle_websocket_upgrade()

    def handle_websocket_upgrade(self) -> None:
        pass


def test_an_upgraded_connection_is_another_protocols() -> None:
    connections = Connections(4)
    protocol = patient(Base, connections)()
    protocol.connection_made(Mock())
    assert (connections.number, len(connections.silent)) == (1, 1)
    protocol.data_received(b"upgrade")
    assert (connections.number, len(connections.silent), protocol._silence) == (0, 0, None)


def test_who_reads_slowly_is_kept_as_long_as_they_read() -> None:
    protocol, transport = patient(Base, Connections(4))(), Mock()
    protocol.connection_made(transport)
    transport.get_write_buffer_size.side_effect = [900, 600, 599, 599]
    protocol.pause_writing()
    for _ in range(2):
        protocol._look_for_progress()
        transport.abort.assert_not_called()
    protocol._look_for_progress()
    transport.abort.assert_called_once()


def test_a_complaint_about_too_many_files_is_made_seldom() -> None:
    seldom = _Seldom()
    flood = logging.LogRecord(
        "asyncio", 40, "", 0, "socket.accept() out of system resource\nsocket: ...", (), None
    )
    other = logging.LogRecord("asyncio", 40, "", 0, "something else", (), None)
    assert [seldom.filter(flood) for _ in range(3)] == [True, False, False] and seldom.filter(other)
