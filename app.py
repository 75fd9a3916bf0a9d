"""The lab: `python app.py` loads a model and opens the page at http://127.0.0.1:7860.

Slow imports come after the options are checked, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from labkit.serving import cli
from labkit.serving.cli import StartError, check_address

if TYPE_CHECKING:
    import gradio as gr

    from labkit.page.gradio_page import Page
    from labkit.page.session import Lab
    from labkit.serving.async_engine import AsyncEngine

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before any import of gradio: nobody is told

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
        default=8.0,
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
        trace_file=options.trace_file,
    )


def launch(engine: AsyncEngine | Lab, *, share: bool | None = None, **options: Any) -> Page:
    """Serve the page in the background, for instance from a notebook. `close()` of what it returns ends it.

    Args:
        engine: the engine to show; a `Lab` around one has limits for visitors, and more.
        share: whether to open a public link as well (None: on Colab only).
        options: further arguments of `labkit.page.gradio_page.serve`.
    """
    from labkit.page.gradio_page import serve

    return serve(engine, share=on_colab() if share is None else share, **options)


def add_api(demo: Page, lab: Lab, api_key: str | None) -> None:
    """Speak OpenAI's API at the address of a page that is served. Each request gets a card on the page."""
    from labkit.serving.asgi import beside
    from labkit.serving.handler import Options
    from labkit.serving.routes import create_app

    def card(request_id: str, prompt: str, params: Any) -> None:
        lab.session.submissions.enter("", request_id, prompt, params.max_tokens, name="API")

    api = create_app(lambda: lab.session.live, Options(limits=lab.limits, api_key=api_key), on_request=card)
    demo.guard.app = beside(api, demo.guard.app)


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
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        StartError: if the page cannot be served, for instance because another program took the port.
    """
    try:
        lab = lab_of(live, options)
        demo = launch(
            lab,
            share=options.share,
            server_name=options.host,
            server_port=options.port,
            allowed_hosts=options.allowed_host,
            proxy_headers=options.proxy_headers,
            quiet=True,
        )
        if options.api:
            add_api(demo, lab, options.api_key)
    except (OSError, ValueError) as error:  # gradio raises either
        raise StartError(" ".join(str(error).split())) from None
    # A shell that starts the lab in the background makes it ignore Ctrl-C. Here it listens again.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    print(f"The lab is at http://{shown}:{options.port}", flush=True)
    if options.api:
        print(f"OpenAI's API is at http://{shown}:{options.port}/v1", flush=True)
        if options.api_key:
            print("The key guards /v1 alone: the page, /health and /metrics are open to all who reach them.")
    if options.share:
        print(f"and, for everyone, at {demo.share_url}" if demo.share_url else "There is no public link.")
    if lab.trace_path:
        print(f"Every step is written to {lab.trace_path}")
    print("Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        demo.close(verbose=False)


if __name__ == "__main__":
    sys.exit(main())
