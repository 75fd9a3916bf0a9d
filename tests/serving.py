"""A server of the API in this process, for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.schedulers.audit import check_pool
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.handler import Options, Server
from labkit.serving.server import create_app

MODEL = "tiny-random"


@dataclass
class Served:
    """Where it listens, and what is behind it."""

    url: str
    live: AsyncEngine
    server: Server

    def quiet(self) -> bool:
        """Whether nothing is left over: no request, no page with an owner, no client counted."""
        pool = self.live.engine.pool
        check_pool(pool)
        return not (self.live.num_unfinished or pool.tables or self.server._clients)

    def until_quiet(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.quiet():
            if time.monotonic() > end:
                raise AssertionError(
                    f"left over: {self.live.num_unfinished} requests, {self.server._clients}"
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
            yield Served(f"http://127.0.0.1:{port}", live, app.state.server)
        finally:
            server.should_exit = True
            thread.join(10)
