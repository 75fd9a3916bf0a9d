"""The API server as a program: `python -m labkit.server`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from labkit.serving import cli
from labkit.serving.connections import harden
from labkit.serving.guard import Guard
from labkit.serving.handler import Handler, Options
from labkit.serving.routes import create_app

_FLUSH_SECONDS = 5  # to send what is written, once the answers have ended


class _DrainingServer(uvicorn.Server):
    """Stops in stages: it refuses new calls, lets those under way end, and after a while aborts the rest.

    A second signal ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, handler: Handler, drain_seconds: float) -> None:
        super().__init__(config)
        self._handler, self._drain_seconds = handler, drain_seconds

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop. Uvicorn's own method would raise the signal again in the end, as after a failure."""
        self.should_exit = True
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.SIG_DFL)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        address = f"http://{self.config.host}:{self.config.port}/v1"
        print(f"Ready: model {self._handler.model_name!r} at {address}", flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        self._handler.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        while self._handler.busy and loop.time() < end:  # the port stays open, to tell new clients why
            await asyncio.sleep(0.05)
        await loop.run_in_executor(None, self._handler.engine().close)  # blocks until the step is over
        await super().shutdown(sockets)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and one line on stderr."""
    parser = cli.Parser(prog="labkit.server", description="OpenAI's API on an engine of our own.")
    cli.add_engine(parser, num_blocks=None)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=cli.port, default=8000, help="default: %(default)s")
    add("--served-model-name", help="the name that clients must give (default: that of --model)")
    cli.add_proxies(parser)
    cli.add_key(parser, "the key that clients must bring (default: none); /health and /metrics stay open")
    add(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose pages may call; repeatable",
    )
    add("--log-prompts", action="store_true", help="write prompts into the log")
    cli.add_limits(parser.add_argument_group("limits"), requests=1024, queue=1024, whose="client")
    longest = "the longest time that an answer may take (default: %(default)s)"
    add("--request-seconds", type=cli.seconds, default=600.0, help=longest)
    drain = "the time that answers under way have to end when the server stops (default: %(default)s)"
    add("--drain-seconds", type=cli.seconds, default=30.0, help=drain)
    return parser.parse_args(arguments)


def options_of(given: argparse.Namespace) -> Options:
    """What the command line allows the API to do."""
    return Options(
        limits=cli.limits_of(given),
        api_key=given.api_key,
        model_name=given.served_model_name,
        request_seconds=given.request_seconds,
        cors=given.cors,
        log_prompts=given.log_prompts,
    )


def guarded(given: argparse.Namespace) -> dict[str, Any]:
    """What the command line lets a `Guard` let in."""
    return {"host": given.host, "names": given.allowed_host, "origins": given.cors}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        cli.check_address(given.host, given.port)
        print(f"Loading {given.model} ...", flush=True)
        live = cli.load(given, trace_steps=1)
    except cli.StartError as error:
        print(f"labkit.server: {error}", file=sys.stderr)
        return 2
    with live:
        app = create_app(live, options_of(given))
        app.add_middleware(Guard, **guarded(given))
        config = uvicorn.Config(
            app,
            host=given.host,
            port=given.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        config.load()
        harden(config, proxy_headers=given.proxy_headers)
        _DrainingServer(config, app.state.handler, given.drain_seconds).run()
    return 0
