"""The lab: `python app.py` loads a model and opens the page at http://127.0.0.1:7860.

What takes seconds to import is imported after the options are checked, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import gradio as gr

    from labkit.laboratory import Lab
    from labkit.live import LiveEngine

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before anybody imports it: the lab calls nobody

TRACE_STEPS = 5_000  # that the engine remembers: many times what the page draws
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch's words, in lower case


class StartError(Exception):
    """Why the lab cannot start, in one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and not the whole usage."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Ends the program with status 2 and one line on stderr for one that cannot be."""
    parser = _Parser(
        prog="app.py", description="A page on a real LLM engine: inject requests, watch it work."
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="short name, Hub id or folder (default: %(default)s)")
    add("--device", default="auto", help='"auto", "cpu", "cuda", ... (default: %(default)s)')
    add("--dtype", default="auto", help='"auto", "float32", "float16", "bfloat16" (default: %(default)s)')
    add("--quantization", choices=("int8",), help="compute in 8 bits (default: no)")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Hugging Face Space says where to listen
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    add("--host", default=host, help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=_port, default=port, help="default: %(default)s")
    add(
        "--share",
        action=argparse.BooleanOptionalAction,
        default=on_colab(),
        help="also open a public link through gradio.live (default: on Colab only)",
    )
    add(
        "--num-blocks",
        type=_positive,
        default=256,
        help="pages of the KV cache; few enough to see them fill (default: %(default)s)",
    )
    add("--block-size", type=_positive, default=16, help="tokens to a page (default: %(default)s)")
    add("--max-num-seqs", type=_positive, default=32, help="requests that run at once (default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=_positive,
        default=512,
        help="token budget of a step (default: %(default)s)",
    )
    add(
        "--scheduler",
        choices=("continuous", "static", "naive"),
        default="continuous",
        help="default: %(default)s",
    )
    group = parser.add_argument_group("for a class", "what visitors may do")
    add = group.add_argument
    add("--max-requests", type=_positive, default=64, help="of one visitor at a time (default: %(default)s)")
    add("--max-queue", type=_positive, default=512, help="requests of all visitors (default: %(default)s)")
    add("--max-prompt-tokens", type=_positive, help="tokens of a prompt (default: what the engine holds)")
    add("--max-answer-tokens", type=_positive, help="tokens of an answer (default: what the engine holds)")
    add(
        "--grace",
        type=_seconds,
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
        "--trace-file",
        metavar="FILE",
        help="also write every step there, as JSON Lines",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be a number of seconds between 0 and 3600, not {text!r}")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number between 1 and 65535, not {text!r}")
    return int(text)


def on_colab() -> bool:
    """Whether this runs in Google Colab, where a page can be seen through a public link only."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def check_address(host: str, port: int) -> None:
    """Raise `StartError` unless a server can listen there: better now than after loading a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartError(
            f"cannot listen at {host}, port {port}: {(error.strerror or str(error)).lower()}; "
            "choose another with --port or --host"
        ) from None


def build(engine: LiveEngine | Lab) -> gr.Blocks:
    """The page on a running engine, to launch it or to mount it into another app."""
    from labkit.page import build

    return build(engine)


def load(options: argparse.Namespace) -> LiveEngine:
    """Load the model and set the engine going. Raises `StartError` if that cannot be done."""
    import torch

    from labkit.config import EngineConfig
    from labkit.engine import Engine
    from labkit.live import LiveEngine

    try:
        config = EngineConfig(
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            quantization=options.quantization,
            block_size=options.block_size,
            num_blocks=options.num_blocks,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            scheduler=options.scheduler,
            max_trace_steps=TRACE_STEPS,
        )
        return LiveEngine(Engine(config))
    except (MemoryError, RuntimeError) as error:
        # On a CPU, and on some accelerators, torch says it in the words of a plain RuntimeError.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        raise StartError("too little memory: lower --num-blocks, or take a smaller --model") from None
    except ValueError as error:
        raise StartError(" ".join(str(error).split())) from None


def lab_of(live: LiveEngine, options: argparse.Namespace) -> Lab:
    """The lab round an engine, with the limits that the options set."""
    from labkit.laboratory import Lab
    from labkit.limits import Limits

    limits = Limits(
        requests=options.max_requests,
        queue=options.max_queue,
        prompt_tokens=options.max_prompt_tokens,
        answer_tokens=options.max_answer_tokens,
    )
    return Lab(live, limits=limits, grace=options.grace, knobs=options.knobs, trace_file=options.trace_file)


def launch(engine: LiveEngine | Lab, *, share: bool | None = None, **options: Any) -> gr.Blocks:
    """Serve the page in the background, from a notebook for instance; `close()` what it returns to end.

    Args:
        engine: to show; a `Lab` round one has limits for visitors, and more.
        share: also open a public link (None: on Colab only).
        options: for `gr.Blocks.launch`.
    """
    from labkit.page import serve

    return serve(engine, share=on_colab() if share is None else share, **options)


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


def serve(live: LiveEngine, options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        StartError: if that cannot be done, for instance because the port was taken meanwhile.
    """
    try:
        lab = lab_of(live, options)
        demo = launch(
            lab, share=options.share, server_name=options.host, server_port=options.port, quiet=True
        )
    except (OSError, ValueError) as error:  # gradio raises either
        raise StartError(" ".join(str(error).split())) from None
    # A shell that starts the lab in the background has it ignore Ctrl-C: take it back.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    shown = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    print(f"The lab is at http://{shown}:{options.port}", flush=True)
    if options.share:
        print(f"and, for everyone, at {demo.share_url}" if demo.share_url else "No public link could be had.")
    print("Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        demo.close(verbose=False)


if __name__ == "__main__":
    sys.exit(main())
