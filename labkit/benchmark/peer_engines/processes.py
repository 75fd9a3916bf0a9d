"""The engines that are compared, each in processes of its own, with the same number of threads."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from labkit.analysis.reference import Run
from labkit.analysis.workload import Job
from labkit.benchmark.engine.meter import peak_resident
from labkit.benchmark.serving.processes import ServerProcess

_WORKER = Path(__file__).with_name("worker.py")
_LOOK = 0.5  # seconds between looks at whether a process is still there
_STOP = 20.0  # seconds until a process must be gone
_SPACE_GIB = "1"  # of the KV cache of vLLM, which would take 4 otherwise


class Answering(Protocol):
    """An engine that has started, and whose processes live on between its runs."""

    versions: dict[str, str]
    process: psutil.Process

    def answer(self, jobs: Sequence[Job], *, seats: int, adaptive: bool) -> Run:
        """Answer all jobs, so many at once; `adaptive` is for an engine that has `adaptive_threads`."""
        ...


@dataclass(frozen=True)
class Sizes:
    """What all engines are built for.

    Attributes:
        model: The model, as `load_model` takes it.
        folder: The folder of its weights, for engines that know only folders.
        threads: The number of threads that each computes with.
        seats: The most requests at once.
        budget: The token budget of a step.
        longest: The longest prompt and answer together, in tokens.
    """

    model: str
    folder: str
    threads: int
    seats: int
    budget: int
    longest: int


def memory_of(process: psutil.Process) -> int:
    """The most bytes that a process and its children have held, summed over them."""
    return sum(peak_resident(each.pid) or 0 for each in _family(process))


def cpu_seconds_of(process: psutil.Process) -> float:
    """The processor seconds that a process and its children have used so far."""
    used = 0.0
    for each in _family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            used += times.user + times.system
    return used


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


# -- engines that Python runs ---------------------------------------------------------------------


class Worker:
    """`worker.py` in a process of its own; raises `RuntimeError`, which says why, if it does not start."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self.process = psutil.Process(self._popen.pid)
        try:
            self.versions: dict[str, str] = self._read()["versions"]
        except BaseException:
            self.close()
            raise

    def answer(self, jobs: Sequence[Job], *, seats: int, adaptive: bool) -> Run:
        """Answer all jobs; raises `RuntimeError` with what the worker said if it cannot."""
        asked = {"jobs": [(job.prompt, job.max_tokens) for job in jobs], "seats": seats, "adaptive": adaptive}
        if self._popen.stdin is None or self._popen.poll() is not None:
            raise RuntimeError("its process has ended")
        print(json.dumps(asked), file=self._popen.stdin, flush=True)
        answered = self._read()
        if "error" in answered:
            raise RuntimeError(answered["error"])
        return Run("", answered["seconds"], answered["tokens"], answered["times"])

    def close(self) -> None:
        """End the process and its children, by force if they do not end in time."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):  # all of them: children may outlive their parent
                os.killpg(self._popen.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_STOP)
        self._popen.communicate()  # which closes the pipes
        self._log.close()

    def _read(self) -> dict[str, Any]:
        pipe = self._popen.stdout
        while pipe and not select.select([pipe], [], [], _LOOK)[0]:
            if self._popen.poll() is not None:  # its children may hold the pipe open, and say nothing
                pipe = None
        if line := pipe.readline() if pipe else "":
            return json.loads(line)
        self._log.seek(0)
        words = [word for word in self._log.read().decode(errors="replace").splitlines() if word.strip()]
        raise RuntimeError(f"it ended by itself; it said: {words[-1].strip() if words else 'nothing'}")


@contextlib.contextmanager
def worker(name: str, python: str, sizes: Sizes, precision: str) -> Iterator[Worker]:
    """Run an engine of `worker.ENGINES` by a Python that has it."""
    settings = vars(sizes) | {"precision": precision}
    environment = os.environ | {"OMP_NUM_THREADS": str(sizes.threads)}
    if name == "vllm":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        bound = ",".join(map(str, cores[: sizes.threads]))
        environment |= {"VLLM_CPU_KVCACHE_SPACE": _SPACE_GIB, "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": bound} if bound else {}
    else:
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = Worker([python, str(_WORKER), name, json.dumps(settings)], environment)
    try:
        yield started
    finally:
        started.close()


# -- llama.cpp ------------------------------------------------------------------------------------


class LlamaServer:
    """A server of llama.cpp that runs, and a client that keeps so many requests in flight."""

    def __init__(self, server: ServerProcess, binary: str) -> None:
        self._server = server
        self.process = psutil.Process(server.process.pid)
        told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=False)
        lines = (told.stdout + told.stderr).splitlines()
        version = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("version")), "")
        self.versions = {"llama.cpp": version or "unknown"}

    def answer(self, jobs: Sequence[Job], *, seats: int, adaptive: bool) -> Run:
        """Answer all jobs; raises `httpx.HTTPError` or `RuntimeError` if one fails."""
        tokens: list[list[int]] = [[] for _ in jobs]
        left = deque(range(len(jobs)))

        def client(http: httpx.Client) -> None:
            while True:
                try:
                    index = left.popleft()
                except IndexError:
                    return
                asked = {"prompt": jobs[index].prompt, "n_predict": jobs[index].max_tokens}
                asked |= {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
                response = http.post("/completion", json=asked)
                response.raise_for_status()
                tokens[index] = response.json()["tokens"]

        limits = httpx.Limits(max_connections=seats, max_keepalive_connections=seats)
        with (
            httpx.Client(base_url=self._server.url, timeout=None, limits=limits, trust_env=False) as http,
            ThreadPoolExecutor(seats) as pool,
        ):
            begin = time.perf_counter()
            for done in [pool.submit(client, http) for _ in range(seats)]:
                done.result()
            seconds = time.perf_counter() - begin
        for job, answer in zip(jobs, tokens, strict=True):
            if len(answer) != job.max_tokens:
                raise RuntimeError(f"an answer has {len(answer)} tokens, not {job.max_tokens}")
        return Run("", seconds, tokens, [])


@contextlib.contextmanager
def llama_server(binary: str, gguf: str, sizes: Sizes) -> Iterator[LlamaServer]:
    """Run a server of llama.cpp on a free port, with a slot of full length for each seat."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [binary, "--model", gguf, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(sizes.seats), "--ctx-size", str(sizes.seats * sizes.longest)]
    command += ["--threads", str(sizes.threads), "--threads-batch", str(sizes.threads)]
    with tempfile.TemporaryFile("a+b") as log:
        server = ServerProcess(command, f"http://127.0.0.1:{port}", log)
        try:
            server.wait()
            yield LlamaServer(server, binary)
        finally:
            server.stop()


# -- a neighbour ----------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Run one process that keeps a core busy, for as long as the context lasts."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()
