"""The lab: `python app.py` loads a model and opens the page at http://127.0.0.1:7860.

Slow imports come after the options are checked, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from labkit.serving import cli
from labkit.serving.cli import StartError, check_address

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from labkit.page.gradio_page import Page
    from labkit.page.session import Lab
    from labkit.serving.async_engine import AsyncEngine

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before any import of gradio: nobody is told

STOPS = (signal.SIGINT, signal.SIGTERM)
TRACE_STEPS = 5_000  # the steps that the engine remembers: many times what the page draws


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and one line on stderr."""
    parser = cli.Parser(
        prog="app.py", description="A page on a real LLM engine: inject requests, watch it work."
    )
    cli.add_engine(parser, num_blocks=256)
    add = parser.add_argument
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Hugging Face Space says where to listen
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    add("--host", default=host, help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=cli.port, default=port, help="default: %(default)s")
    cli.add_proxies(parser)
    add(
        "--share",
        action=argparse.BooleanOptionalAction,
        default=on_colab(),
        help="also open a public link through gradio.live (default: on Colab only)",
    )
    add(
        "--api",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also speak OpenAI's API, under /v1 (default: yes)",
    )
    cli.add_key(parser, "the key that its clients must bring; the page, /health and /metrics stay open")
    group = parser.add_argument_group("for a class", "what visitors may do")
    cli.add_limits(group, requests=64, queue=512, whose="visitor")
    add = group.add_argument
    add(
        "--grace",
        type=cli.seconds,
        default=30.0,
        help="seconds after which the requests of a closed tab are cancelled (default: %(default)s)",
    )
    add(
        "--knobs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let visitors change the engine's settings (default: yes)",
    )
    add(
        "--clock",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let visitors pause, step, and set the speed, for everyone (default: yes)",
    )
    add(
        "--trace-file",
        metavar="FILE",
        help="also write every step there, as JSON Lines; a file that is there already gets a neighbour",
    )
    root = os.environ.get("GRADIO_ROOT_PATH")
    add("--root-path", default=root, metavar="/PATH", help="where a proxy shows the lab, if not at its root")
    cli.add_drain(parser, default=10.0)
    return parser.parse_args(arguments)


def on_colab() -> bool:
    """Whether this runs in Google Colab, where only a public link shows a page."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def build(engine: AsyncEngine | Lab) -> gr.Blocks:
    """The page on a running engine, to be launched or mounted into another app."""
    from labkit.page.gradio_page import build

    return build(engine)


def load(options: argparse.Namespace) -> AsyncEngine:
    """Load the model and start the engine. Raises `StartError` if the engine cannot start."""
    return cli.load(options, trace_steps=TRACE_STEPS)


def lab_of(live: AsyncEngine, options: argparse.Namespace) -> Lab:
    """The lab around an engine, with the limits that the options set."""
    from labkit.page.session import Lab

    limits = cli.limits_of(options)
    return Lab(
        live,
        limits=limits,
        grace=options.grace,
        knobs=options.knobs,
        clock=options.clock,
        make=cli.maker(options),
        trace_file=options.trace_file,
    )


def launch(engine: AsyncEngine | Lab, *, share: bool | None = None, **options: Any) -> Page:
    """Serve the page in the background, for instance from a notebook. `close()` of what it returns ends it.

    Args:
        engine: the engine to show; a `Lab` around one has limits for visitors, and more.
        share: whether to open a public link as well (None: on Colab only).
        options: further arguments of `labkit.page.gradio_page.serve` and of `gr.Blocks.launch`.
    """
    from labkit.page.gradio_page import serve

    return serve(engine, share=on_colab() if share is None else share, **options)


def api_of(lab: Lab, api_key: str | None) -> FastAPI:
    """OpenAI's API on the lab's engine, as an app. Each request gets a card on the page."""
    from labkit.serving.handler import Options
    from labkit.serving.routes import create_app

    def card(request_id: str, prompt: str, params: Any) -> None:
        lab.session.submissions.enter("", request_id, prompt, params.max_tokens, name="API")

    return create_app(lambda: lab.session.live, Options(limits=lab.limits, api_key=api_key), on_request=card)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the lab until Ctrl-C. Returns the exit status."""
    options = parse(arguments)
    try:
        check_address(options.host, options.port)
        print(f"Starting the lab with {options.model} ...", flush=True)
        live = load(options)
        with live:
            meta = live.engine.trace.meta
            print(
                f"Ready: {meta.num_blocks} pages of {meta.block_size} tokens, {meta.dtype} on {meta.device}"
            )
            serve(live, options)
    except StartError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


def serve(live: AsyncEngine, options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM; then let what is under way end, within bounds.

    Raises:
        StartError: if the page cannot be served, for instance because another program took the port.
    """
    from labkit.page.joining import address_of
    from labkit.serving.asgi import beside

    lab = lab_of(live, options)
    settings: dict[str, Any] = {
        "share": options.share,
        "server_name": options.host,
        "server_port": options.port,
        "root_path": options.root_path,
        "allowed_hosts": options.allowed_host,
        "proxy_headers": options.proxy_headers,
    }
    api = api_of(lab, options.api_key) if options.api else None
    if api:
        settings["front"] = functools.partial(beside, api)
    try:
        demo = launch(lab, quiet=True, **settings)
    except (OSError, ValueError) as error:  # gradio raises either
        raise StartError(" ".join(str(error).split())) from None
    for number in STOPS:  # a shell that starts the lab in the background makes it ignore Ctrl-C
        signal.signal(number, _stop)
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    local = f"http://{shown}:{options.port}"
    reached = address_of("", demo.served()) or local  # from other machines, as far as they can
    others = f", and for other machines at {reached}" if reached not in (local, demo.share_url) else ""
    print(f"The lab is at {local}{others}", flush=True)
    if options.api:
        print(f"OpenAI's API is at http://{shown}:{options.port}/v1", flush=True)
        if options.api_key:
            print("The key guards /v1 alone: the page, /health and /metrics are open to all who reach them.")
    if options.share:
        print(f"and, for everyone, at {demo.share_url}" if demo.share_url else "There is no public link.")
    if lab.trace_path:
        print(f"Every step is written to {lab.trace_path}")
    print(f"Its host has {reached}/?host={lab.host_key}", flush=True)
    print("Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        if api:
            api.state.handler.draining = True
        if under_way := lab.session.live.num_unfinished:
            left = f"Ending. Requests under way: {under_way}, which have {options.drain_seconds:g} s."
            print(left, "Ctrl-C ends them now.", flush=True)
        lab.drain(options.drain_seconds)
        demo.close(verbose=False)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """Begin to end. A second signal ends the process at once."""
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
