"""The command-line options that the lab and the API server share, and the engine that they describe.

Slow imports come after the options are checked, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

from labkit.config import KV_CACHE_DTYPES, EngineConfig

if TYPE_CHECKING:
    from labkit.engine import Engine
    from labkit.models.load import LoadedModel
    from labkit.serving.async_engine import AsyncEngine
    from labkit.serving.limits import Limits


class StartError(Exception):
    """The server cannot start. The message says why, in one sentence."""


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong option with one line on stderr and status 2."""

    def error(self, message: str) -> NoReturn:
        """End the program with one line, and not with the whole usage."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def positive(text: str) -> int:
    """An option's value as a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """An option's value as a number of seconds, up to an hour."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be a number of seconds between 0 and 3600, not {text!r}")
    return value


def gibibytes(text: str) -> float:
    """An option's value as a number of GiB, more than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**20:
        raise argparse.ArgumentTypeError(f"must be a number of GiB, more than 0, not {text!r}")
    return value


def port(text: str) -> int:
    """An option's value as a TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number between 1 and 65535, not {text!r}")
    return int(text)


def key(text: str) -> str:
    """An option's value as a key. An empty one is a mistake, of a script for instance, and not no key."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "must not be empty: leave it out, and LABKIT_API_KEY too, for no key"
        )
    return text


def add_key(parser: argparse.ArgumentParser, words: str) -> None:
    """Add the option for the API's key, which the environment may give as well."""
    default = os.environ.get("LABKIT_API_KEY")
    parser.add_argument("--api-key", type=key, default=default, help=words)


def add_proxies(parser: argparse.ArgumentParser) -> None:
    """Add the options for a server that browsers reach through a proxy."""
    add = parser.add_argument
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which browsers reach this server, through a proxy; repeatable",
    )
    add(
        "--proxy-headers",
        action="store_true",
        help="believe a proxy on this machine when it names the address of a client (default: no)",
    )


def add_engine(parser: argparse.ArgumentParser, *, num_blocks: int | None) -> None:
    """Add the options that describe an engine.

    Args:
        parser: the parser that gets them.
        num_blocks: the default of `--num-blocks`; None stands for what memory holds.
    """
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="short name, Hub id or folder (default: %(default)s)")
    add("--device", default="auto", help='"auto", "cpu", "cuda", ... (default: %(default)s)')
    add("--dtype", default="auto", help='"auto", "float32", "float16", "bfloat16" (default: %(default)s)')
    add("--quantization", choices=("int8",), help="compute in 8 bits (default: no)")
    few = "" if num_blocks is None else "; few enough to see them fill"
    usual = "what memory holds" if num_blocks is None else "%(default)s"
    add(
        "--num-blocks",
        type=positive,
        default=num_blocks,
        help=f"blocks of the KV cache{few} (default: {usual})",
    )
    add(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        help="the dtype of the KV cache (default: that of the model, as auto says too)",
    )
    add("--block-size", type=positive, default=16, help="tokens in a block (default: %(default)s)")
    add(
        "--kv-offloading-size",
        type=gibibytes,
        help="GiB of host memory that keep evicted blocks for prompts with the same start (default: none)",
    )
    add("--kv-offloading-dir", help="a folder on whose disk they are kept instead (default: none)")
    add("--max-num-seqs", type=positive, default=32, help="requests that run at once (default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=positive,
        default=512,
        help="token budget of a step (default: %(default)s)",
    )
    add(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        help="processes that share the model, each with a part of every layer (default: %(default)s)",
    )
    add(
        "--disaggregated",
        action="store_true",
        help="compute prompts in a second process, so that no answer waits for one (default: no)",
    )
    add(
        "--max-step-seconds",
        type=seconds,
        help="the time that a step should take at most; the token budget follows (default: no bound)",
    )
    add(
        "--speculative",
        choices=("ngram", "draft"),
        help="what drafts tokens for a step to check: the text so far, or a smaller model (default: nothing)",
    )
    add("--draft-model", help="the model that drafts, named as --model is (default: the same in 8 bits)")
    add(
        "--num-speculative-tokens",
        type=positive,
        default=8,
        help="the most drafts of a request in a step (default: %(default)s)",
    )
    add(
        "--scheduler",
        choices=("continuous", "static", "naive"),
        default="continuous",
        help="default: %(default)s",
    )
    add(
        "--generation-config",
        choices=("auto", "labkit"),
        default="auto",
        help="whose defaults hold where a request does not say how to sample: those of the model, if it has "
        "any, or of labkit (default: %(default)s)",
    )


def add_limits(group: argparse._ArgumentGroup, *, requests: int, queue: int, whose: str) -> None:
    """Add the options that bound the requests of one sender and of all.

    Args:
        group: the group of options that gets them.
        requests: the default for one sender.
        queue: the default for all of them.
        whose: the word for a sender, such as "client".
    """
    add = group.add_argument
    add(
        "--max-requests",
        type=positive,
        default=requests,
        help=f"requests of one {whose} at a time (default: %(default)s)",
    )
    add("--max-queue", type=positive, default=queue, help=f"requests of all {whose}s (default: %(default)s)")
    add("--max-prompt-tokens", type=positive, help="tokens of a prompt (default: what the engine holds)")
    add("--max-answer-tokens", type=positive, help="tokens of an answer (default: what the engine holds)")


def add_drain(parser: argparse.ArgumentParser, *, default: float) -> None:
    """Add the option that bounds the time that a stop may take."""
    words = "the time that answers under way have to end when the server stops (default: %(default)s)"
    parser.add_argument("--drain-seconds", type=seconds, default=default, help=words)


def limits_of(options: argparse.Namespace) -> Limits:
    """The values of the options that `add_limits` added."""
    from labkit.serving.limits import Limits

    return Limits(
        requests=options.max_requests,
        queue=options.max_queue,
        prompt_tokens=options.max_prompt_tokens,
        answer_tokens=options.max_answer_tokens,
    )


def check_address(host: str, port: int) -> None:
    """Raise `StartError` unless a server can listen there. Saves loading a model in vain."""
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


def engine_config(options: argparse.Namespace, **own: Any) -> EngineConfig:
    """Return the settings that options stand for: each option of a field's name is that field, but for `own`.

    Raises:
        ValueError: as `EngineConfig` does.
    """
    names = {entry.name for entry in fields(EngineConfig)}
    return EngineConfig(**{name: value for name, value in vars(options).items() if name in names} | own)


def maker(options: argparse.Namespace) -> Callable[[EngineConfig], Engine]:
    """Return what makes an engine of the kind that the options ask for, from settings that may have changed.

    A model that is loaded already is loaded again where another process needs it, too.
    """
    from labkit.disaggregated import DisaggregatedEngine
    from labkit.engine import Engine

    def apart(config: EngineConfig) -> Engine:
        named = {name: getattr(options, name) for name in ("model", "device", "dtype", "quantization")}
        return DisaggregatedEngine(replace(config, **named))

    return apart if options.disaggregated else Engine


def load(options: argparse.Namespace, *, trace_steps: int) -> AsyncEngine:
    """Load the model and start the engine.

    Args:
        options: the options that `add_engine` added.
        trace_steps: the number of steps that the trace keeps.

    Raises:
        StartError: if the engine cannot start.
    """
    from labkit.models.errors import is_out_of_memory
    from labkit.serving.async_engine import AsyncEngine

    def build() -> Engine:
        own = {"draft_model": _draft_model(options), "max_trace_steps": trace_steps}
        return maker(options)(engine_config(options, **own))

    try:
        return AsyncEngine.build(build)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise StartError("too little memory: lower --num-blocks, or take a smaller --model") from None
    except ValueError as error:
        raise StartError(" ".join(str(error).split())) from None


def _draft_model(options: argparse.Namespace) -> LoadedModel | str | None:
    """The model that drafts, loaded once for all engines to come. The engine refuses what cannot work."""
    if options.speculative != "draft" or (options.quantization and not options.draft_model):
        return options.draft_model
    from labkit.models.load import load_model

    if options.draft_model is None:
        return load_model(options.model, device=options.device, quantization="int8")
    return load_model(options.draft_model, dtype=options.dtype, device=options.device)
