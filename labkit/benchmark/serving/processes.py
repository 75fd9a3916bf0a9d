"""A server, and an engine without one, each in a process of its own.

So neither shares an interpreter with the client that measures it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import IO, Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from labkit.benchmark.engine.runs import check_answers, device_name, dtype_name, exactly
from labkit.benchmark.serving.arrivals import Arrival
from labkit.config import EngineConfig
from labkit.engine import Engine

_START = 900.0  # seconds until a server must answer; the first time it fetches the model
_STOP = 20.0  # seconds until it must be gone


@dataclass(frozen=True)
class ServerSizes:
    """How both are built, under the names of the server's options and of `EngineConfig`."""

    model: str
    device: str
    dtype: str
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def arguments(self) -> list[str]:
        """The sizes as the command line of the server."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in vars(self).items()]

    def config(self) -> EngineConfig:
        """The sizes as the configuration of an engine."""
        return EngineConfig(**vars(self), max_trace_steps=1)  # the server's own engine has the same


# -- with a server --------------------------------------------------------------------------------


class ServerProcess:
    """A server that runs: its process, its address, and the file that it writes to."""

    def __init__(self, command: Sequence[str], url: str, log: IO[bytes]) -> None:
        self.url, self._log = url, log
        here = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
        }  # it finds the packages that we find
        self.process = subprocess.Popen(command, env=here, stdout=log, stderr=log)

    def check(self, when: str, *, patience: float = 0.0) -> None:
        """Raise `RuntimeError`, which says `when`, if the process has ended or does so within `patience`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(patience)
            raise RuntimeError(f"the server ended with status {status} {when}; it said: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its log that is not about a request."""
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line.strip() for line in reversed(lines) if not line.startswith("{")), "nothing")

    def wait(self) -> None:
        """Until it takes requests. Raises `RuntimeError` if it does not."""
        end = time.monotonic() + _START
        while time.monotonic() < end:
            self.check("before it took requests")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the server did not answer within {_START:g} s; it said: {self.last_words()}")

    def stop(self) -> None:
        """End the process, by force if it does not end in time."""
        self.process.terminate()
        try:
            self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def server_process(sizes: ServerSizes, streams: int) -> Iterator[ServerProcess]:
    """Run `python -m labkit.server` on a free port, for so many streams; may raise as `wait` does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "labkit.server", "--host=127.0.0.1", f"--port={port}"]
    limits = [f"--max-requests={streams}", f"--max-queue={streams}", "--drain-seconds=1"]
    with tempfile.TemporaryFile("a+b") as log:
        server = ServerProcess([*command, *limits, *sizes.arguments()], f"http://127.0.0.1:{port}", log)
        try:
            server.wait()
            yield server
        finally:
            server.stop()


def numbers(url: str) -> dict[str, float]:
    """The numbers at a server's `/metrics`, without the prefix of their names; empty if there are none."""
    try:
        response = httpx.get(f"{url.rstrip('/')}/metrics", trust_env=False, timeout=30)
        families = list(text_string_to_metric_families(response.text)) if response.is_success else []
    except (httpx.HTTPError, ValueError):
        return {}
    samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
    return {sample.name.rpartition(":")[2]: sample.value for sample in samples}


# -- without --------------------------------------------------------------------------------------

_engine: Engine | None = None  # of the process


class EngineProcess:
    """An engine alone, in a process that lives as long as it does."""

    def __init__(self, sizes: ServerSizes) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._starting = self._pool.submit(_start, sizes)

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """Its dtype and device; raises what building the engine raised."""
        return _result(self._starting)

    def together(self, arrivals: Sequence[Arrival]) -> tuple[float, list[Answer]]:
        """Answer all requests at once; returns the seconds until the last is done, and the answers."""
        return _result(self._pool.submit(_together, list(arrivals)))

    def alone(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Answer the requests one after the other."""
        return [answers[0] for _, answers in (self.together([arrival]) for arrival in arrivals)]

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise RuntimeError("the process of the engine alone ended by itself: too little memory?") from None


@dataclass(frozen=True)
class Answer:
    """What the server and the engine alone must agree on."""

    text: str
    tokens: int


def _start(sizes: ServerSizes) -> dict[str, str]:
    global _engine
    with contextlib.redirect_stdout(io.StringIO()):  # what it chose and why
        _engine = Engine(sizes.config())
    model = _engine.model
    return {"dtype": dtype_name(model.dtype), "device": device_name(model.device)}


def _together(arrivals: list[Arrival]) -> tuple[float, list[Answer]]:
    engine = _engine
    if engine is None:
        raise RuntimeError("the engine of this process was not started")
    begin = time.perf_counter()
    ids = [engine.add_request(arrival.prompt, exactly(arrival.max_tokens)) for arrival in arrivals]
    engine.run()
    seconds = time.perf_counter() - begin
    outputs = [engine.outputs.pop(i) for i in ids]
    check_answers(outputs, "without a server")
    return seconds, [Answer(output.text, len(output.token_ids)) for output in outputs]
