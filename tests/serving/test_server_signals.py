"""The server as a process of its own: told to stop in mid-stream, told twice, and killed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.api_server import MODEL, free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds until a test gives up; nothing is decided by it
# With one seat, minutes of work: it never ends while a test looks on.
LONG = {"max_tokens": 1900, "n": 64, "temperature": 1, "ignore_eos": True}


@contextlib.contextmanager
def server(port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The process, once it listens."""
    command = [sys.executable, "-m", "labkit.server", "--model", MODEL, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        try:
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert lines == [
                f"Loading {MODEL} ...\n",
                f"Ready: model '{MODEL}' at http://127.0.0.1:{port}/v1\n",
            ]
            yield process
        finally:
            process.kill()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "a b", "temperature": 0} | fields


@contextlib.contextmanager
def streaming(port: int, **fields: Any) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun to write."""
    with httpx.stream(
        "POST", f"http://127.0.0.1:{port}/v1/completions", json=body(stream=True, **fields), timeout=PATIENCE
    ) as stream:
        assert stream.status_code == 200
        lines = (line for line in stream.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        yield lines


def until_draining(port: int) -> None:
    """Wait until the server tells new clients that it stops."""
    while True:
        answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE)
        if answer.status_code == 503:
            assert answer.json()["status"] == "draining"
            return


def test_told_to_stop_it_ends_what_it_has_begun_and_takes_nothing_new() -> None:
    port = free_port()
    with server(port, "--drain-seconds", "3600") as process, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # its stream cannot end before it is read
        slow.connect(("127.0.0.1", port))
        slow.settimeout(PATIENCE)
        content = json.dumps(
            body(stream=True, n=4, temperature=1, max_tokens=1000, ignore_eos=True, logprobs=5)
        )
        head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        received = slow.recv(1024)
        assert received.startswith(b"HTTP/1.1 200")

        with streaming(port, max_tokens=500, ignore_eos=True) as lines:
            process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"

        until_draining(port)
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body(), timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["Retry-After"] and process.poll() is None
        while piece := slow.recv(65536):
            received += piece
        assert received.endswith(b"data: [DONE]\n\n") and b'"error"' not in received
        assert received.count(b'"finish_reason":"length"') == 4

        assert process.wait(PATIENCE) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def test_what_does_not_end_in_time_ends_with_an_error() -> None:
    port = free_port()
    with server(port, "--drain-seconds", "0.5", "--max-num-seqs", "1") as process:
        with streaming(port, **LONG) as lines:
            process.send_signal(signal.SIGTERM)
            *_, last, done = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("aborted", "server_error")
        assert done == "data: [DONE]"
        assert process.wait(PATIENCE) == 0


def test_told_twice_it_ends_at_once() -> None:
    port = free_port()
    with (
        server(port, "--drain-seconds", "3600", "--max-num-seqs", "1") as process,
        streaming(port, **LONG) as lines,
    ):
        process.send_signal(signal.SIGTERM)
        until_draining(port)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            list(lines)


def test_killed_in_mid_stream_it_can_start_again_at_the_same_port() -> None:
    port = free_port()
    with server(port, "--max-num-seqs", "1") as process, streaming(port, **LONG) as lines:
        process.kill()
        with pytest.raises(httpx.TransportError):  # and not an answer that looks complete
            list(lines)
    with server(port) as process:
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body(), timeout=PATIENCE)
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)  # with nothing under way it ends by itself
        assert process.wait(PATIENCE) == 0
