"""A server of the API in this process, for tests, and what tests send it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams
from labkit.schedulers.audit import check_pool
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.handler import Handler, Options
from labkit.serving.routes import create_app

MODEL = "tiny-random"
HELLO = "hello world, these are some words"
TALK = [{"role": "user", "content": "say something"}]


@dataclass
class Served:
    """Where it listens, and what is behind it."""

    url: str
    live: AsyncEngine
    handler: Handler

    def quiet(self) -> bool:
        """Whether nothing is left over: no request, no block with an owner, no client counted."""
        pool = self.live.engine.pool
        check_pool(pool)
        return not (self.live.num_unfinished or pool.tables or self.handler._under_way)

    def until_quiet(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.quiet():
            if time.monotonic() > end:
                raise AssertionError(
                    f"left over: {self.live.num_unfinished} requests, {self.handler._under_way}"
                )
            time.sleep(0.01)


@contextlib.contextmanager
def served(options: Options | None = None, **config: Any) -> Iterator[Served]:
    sizes = {"num_blocks": 256, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    sizes["max_model_len"] = 200
    with AsyncEngine(Engine(EngineConfig(**({"model": MODEL} | sizes | config)))) as live:
        app = create_app(live, options)
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", access_log=False, timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield Served(f"http://127.0.0.1:{port}", live, app.state.handler)
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    """A server for all tests of a module."""
    with served() as site:
        yield site


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test nothing is left of its calls."""
    yield
    if "site" in request.fixturenames:
        request.getfixturevalue("site").until_quiet()


@pytest.fixture
def client(site: Served) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0)


def ask(**fields: Any) -> dict[str, Any]:
    """A body of a completion."""
    return {"model": MODEL, "prompt": HELLO, "temperature": 0} | fields


def post(site: Served, body: Any, path: str = "completions", **options: Any) -> httpx.Response:
    return httpx.post(f"{site.url}/v1/{path}", json=body, timeout=30, **options)


def solo(site: Served, prompt: str | list[int], **params: Any) -> RequestOutput:
    """What the engine itself answers."""
    *_, output = site.live.stream(site.live.submit(prompt, SamplingParams(**params)))
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
