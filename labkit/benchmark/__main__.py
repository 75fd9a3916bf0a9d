"""Measure the engine: by default the three schedulers and `transformers` on one workload."""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from labkit.analysis.devices import GPUS
from labkit.analysis.reference import reference_model
from labkit.analysis.shapes import SEATS, SHAPES, config_of, random_model, random_reference
from labkit.analysis.workload import Job, make_noise, make_workload
from labkit.benchmark.engine import bookkeeping, equality, forecast, ladder_report
from labkit.benchmark.engine.ablations import NAMES, ablations_for
from labkit.benchmark.engine.ladder import SLOW_SECONDS, climb
from labkit.benchmark.engine.schedulers import OURS, measure
from labkit.benchmark.engine.speculative import SEATS as SPECULATION_SEATS
from labkit.benchmark.engine.speculative import speculate
from labkit.benchmark.engine.stream import REQUESTS, stream
from labkit.benchmark.gpu import kernel_table, predict
from labkit.benchmark.gpu.check import gpu_check
from labkit.benchmark.peer_engines.compare import PRECISIONS, compare, read_peers
from labkit.benchmark.peer_engines.compare import SEATS as PEER_SEATS
from labkit.benchmark.peer_engines.processes import Sizes
from labkit.benchmark.serving import load_report
from labkit.benchmark.serving.load_sweep import LoadPlan, measure_load
from labkit.benchmark.serving.watchers import WATCHERS
from labkit.models.devices import resolve_device
from labkit.models.hub import find
from labkit.models.load import LoadedModel, load_model

_FROM = "mixed prefill, decode"  # where the ladder begins on shapes: those below differ by policy alone


class Result(Protocol):
    """What a measurement returns: a table as text, and its figures."""

    def to_json(self) -> Any: ...


# -- the measurements -----------------------------------------------------------------------------


def _schedulers(args: Namespace) -> Result:
    loaded = _load(args)
    return measure(
        loaded,
        reference_model(loaded, args.model),
        _jobs(args, loaded.tokenizer),
        max_num_seqs=_seats(args),
        max_num_batched_tokens=args.max_num_batched_tokens,
        repeats=args.repeats,
        systems=args.systems,
    )


def _ladder(args: Namespace) -> Result:
    if args.shapes is not None:
        seats = args.max_num_seqs or SEATS
        return _Several([_ladder_of(args, shape, some) for shape in args.shapes or SHAPES for some in seats])
    tokenizer = _load(args).tokenizer  # each ablation loads its own model
    load = functools.partial(load_model, args.model, dtype=args.dtype, device=args.device, say=None)
    reference = functools.partial(reference_model, model=args.model)
    return _climb(args, load, _jobs(args, tokenizer), reference, _seats(args))


def _ladder_of(args: Namespace, shape: str, seats: int) -> Result:
    """The ladder on random weights."""
    jobs = make_noise(config_of(shape).vocab_size, args.requests or max(8, 2 * seats), seed=args.seed)
    load = functools.partial(random_model, shape, dtype=args.dtype, device=args.device)
    return _climb(args, load, jobs, functools.partial(random_reference, shape), seats)


def _climb(args: Namespace, load: Any, jobs: list[Job], reference: Any, seats: int) -> Result:
    ablations = ablations_for(resolve_device(args.device).type, args.rungs)
    if args.shapes is not None and args.rungs is None:
        ablations = ablations[[ablation.name for ablation in ablations].index(_FROM) :]
    return climb(
        load,
        jobs,
        ablations,
        reference=reference,
        peers=args.peers,
        seats=seats,
        budget=args.max_num_batched_tokens,
        repeats=args.repeats,
        slow_seconds=args.slow_seconds,
        memory=not args.no_memory,
    )


class _Several(list[Any]):
    """Several reports, one after the other."""

    def to_json(self) -> list[Any]:
        return [report.to_json() for report in self]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))


def _stream(args: Namespace) -> Result:
    load = functools.partial(load_model, args.model, dtype=args.dtype, device=args.device, say=None)
    jobs = _jobs(args, _load(args).tokenizer, REQUESTS)
    reference = functools.partial(reference_model, model=args.model)
    return stream(load, jobs, reference=reference, seats=_seats(args), **_how(args))


def _speculation(args: Namespace) -> Result:
    return speculate(_load(args), seats=args.max_num_seqs or SPECULATION_SEATS, **_how(args))


def _bookkeeping(args: Namespace) -> Result:
    return bookkeeping.report(trace_steps=args.trace_steps)


def _capacity(args: Namespace) -> Result:
    loaded = _load(args)
    return forecast.forecast(loaded, forecast.cases_of(loaded.tokenizer, args.seed), repeats=args.repeats)


def _equality(args: Namespace) -> Result:
    return equality.report(args.model, args.device, functools.partial(_jobs, args))


def _serve(args: Namespace) -> Result:
    given = {name: getattr(args, name) for name in _ONLY_WITH["serve"] if name != "rate_seconds"}
    given |= {"batch": args.requests, "seconds": args.rate_seconds}
    same = {name: getattr(args, name) for name in ("model", "device", "dtype", "repeats", "seed")}
    return measure_load(
        LoadPlan(
            **same,
            seats=_seats(args),
            budget=args.max_num_batched_tokens,
            **{name: value for name, value in given.items() if value is not None},
        )
    )


def _watched(args: Namespace) -> Result:
    from labkit.benchmark.serving.watched import watched  # and with it gradio, which nothing else here needs

    loaded = _load(args)
    jobs = _jobs(args, loaded.tokenizer)
    return watched(loaded, jobs, count=args.watched, seats=_seats(args), **_how(args))


def _peer(args: Namespace) -> Result:
    peers = read_peers(args.peer)
    jobs = _jobs(args, _load(args).tokenizer)
    seats = args.max_num_seqs or PEER_SEATS
    sizes = Sizes(
        model=args.model,
        folder=str(find(args.model, say=None)) if "vllm" in peers else "",
        threads=torch.get_num_threads(),
        seats=max(seats),
        budget=args.max_num_batched_tokens,
        longest=max(len(job.prompt) + job.max_tokens for job in jobs),
    )
    given = {"seats": seats, "precisions": args.precisions or PRECISIONS, "busy": args.busy}
    return compare(jobs, peers, sizes, repeats=args.repeats, **given)


def _kernels(args: Namespace) -> Result:
    return kernel_table.kernel_report()


def _predict(args: Namespace) -> Result:
    return predict.predict(args.predict)


class _Text(str):
    """A report that is text alone."""

    def to_json(self) -> str:
        return str(self)


def _gpu_check(args: Namespace) -> Result:
    return _Text(gpu_check(args.device, say=lambda part: print(part, file=sys.stderr, flush=True)))


def _load(args: Namespace) -> LoadedModel:
    return load_model(args.model, dtype=args.dtype, device=args.device)


def _jobs(args: Namespace, tokenizer: Any, usual: int = 32) -> list[Job]:
    return make_workload(tokenizer, args.requests or usual, seed=args.seed)


def _seats(args: Namespace) -> int:
    return args.max_num_seqs[0] if args.max_num_seqs else 32


def _how(args: Namespace) -> dict[str, int]:
    return {"budget": args.max_num_batched_tokens, "repeats": args.repeats}


@dataclass(frozen=True)
class Subcommand:
    """A measurement.

    Attributes:
        name: The option that asks for it.
        help: What it measures.
        run: The function that does, from the parsed arguments.
        figure: A function that draws what `run` returned.
        option: How the option is parsed.
    """

    name: str
    help: str
    run: Callable[[Namespace], Result]
    figure: Callable[[Any], Any] | None = None
    option: dict[str, Any] = field(default_factory=lambda: {"action": "store_true"})


SUBCOMMANDS = (
    Subcommand("ladder", "from no cache to int8, one thing more each time", _ladder, ladder_report.figure),
    Subcommand("stream", "more requests than seats, in fp32 and int8", _stream),
    Subcommand("speculation", "n-gram drafts against none, copy and chat", _speculation),
    Subcommand("bookkeeping", "scheduler, pool and trace alone", _bookkeeping),
    Subcommand("capacity", "predict settings from others, and measure", _capacity, forecast.figure),
    Subcommand("equality", "half precision and int8 against fp32", _equality),
    Subcommand("serve", "a server over HTTP, as the load on it rises", _serve, load_report.figure),
    Subcommand(
        "watched",
        f"the lab with nobody there, and with N pages that watch ({WATCHERS})",
        _watched,
        option={"type": int, "nargs": "?", "const": WATCHERS, "metavar": "N"},
    ),
    Subcommand(
        "peer",
        "beside transformers, vllm=PYTHON or llamacpp=BINARY,GGUF (may be given several times)",
        _peer,
        option={"action": "append", "metavar": "ENGINE"},
    ),
    Subcommand("kernels", "the kernels in Triton, compiled for GPUs that are not here", _kernels),
    Subcommand(
        "predict",
        f"what decode steps would take on a GPU (T4; of {', '.join(GPUS)}), and why",
        _predict,
        option={"nargs": "?", "const": "T4", "metavar": "GPU"},
    ),
    Subcommand("gpu_check", "all that only a GPU can tell, in six minutes and one block of text", _gpu_check),
)
_DEFAULT = Subcommand("", "the three schedulers and transformers", _schedulers)
_ONLY_WITH = {  # options that go with one measurement
    "ladder": ("peers", "rungs", "shapes", "no_memory"),
    "peer": ("busy", "precisions"),
    "serve": ("rates", "rate_seconds", "streams", "slo_ttft", "slo_itl", "url", "url_model"),
}


# -- the command line -----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; returns 0, or 2 after one line that says what was wrong."""
    args = _parser().parse_args(arguments)
    asked = next((one for one in SUBCOMMANDS if getattr(args, one.name) not in (None, False)), _DEFAULT)
    try:
        _check(args, asked)
        result = asked.run(args)
        if args.figure and asked.figure:
            asked.figure(result).write_html(args.figure)
        print(result)
        if args.json:
            args.json.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"labkit.benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m labkit.benchmark", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    for one in SUBCOMMANDS:
        what.add_argument(_option(one.name), help=one.help, **one.option)
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--requests", type=int, help="32; 128 with --stream, two to a seat with --shapes")
    add(
        "--max-num-seqs",
        type=int,
        nargs="+",
        help="seats: 32; several with --shapes (1 8 32 128), --speculation and --peer (1 8 32)",
    )
    add("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    add("--repeats", type=int, default=3, help="runs of each system; the median counts")
    add("--seed", type=int, default=0, help="of the workload")
    add("--systems", nargs="+", choices=OURS, default=list(OURS))
    add("--trace-steps", type=int, default=100_000, help="with --bookkeeping")
    add("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    add("--figure", type=Path, metavar="FILE.html", help=f"with {_drawn(', ')}: draw it as well")
    _add_load(parser.add_argument_group("with --serve"))
    _add_ladder(parser.add_argument_group("with --ladder"))
    _add_peer(parser.add_argument_group("with --peer"))
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    add, usual = group.add_argument, LoadPlan()
    add(
        "--rates", type=float, nargs="+", metavar="R", help="requests/s (parts of what a closed loop reaches)"
    )
    add("--rate-seconds", type=float, metavar="S", help=f"of each rate ({usual.seconds:g})")
    add("--streams", type=int, metavar="N", help=f"short requests at once; 0: none ({usual.streams})")
    add("--slo-ttft", type=float, metavar="S", help="until the first token, for goodput (10x unloaded)")
    add("--slo-itl", type=float, metavar="S", help="per token after it, for goodput (5x unloaded)")
    add("--url", help="another server that speaks OpenAI's API: it gets the same arrivals")
    add("--url-model", metavar="NAME", help="its model there (the first that it names)")


def _add_ladder(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--peers", action="store_true", help="transformers in batches, and other seats")
    add("--rungs", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--shapes", nargs="*", metavar="SHAPE", help=f"random weights; of {', '.join(SHAPES)} (none: all)")
    add("--no-memory", action="store_true", help="do without the peak memory of each rung")
    add(
        "--slow-seconds",
        type=float,
        default=SLOW_SECONDS,
        help="what answers one at a time runs on as many requests as take about so long",
    )


def _add_peer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--busy", action="store_true", help="each of them also beside a process that keeps a core busy")
    add("--precisions", nargs="+", choices=PRECISIONS, help=f"of this engine ({' '.join(PRECISIONS)})")


def _drawn(last: str) -> str:
    """The options whose results can be drawn."""
    *names, end = (_option(one.name) for one in SUBCOMMANDS if one.figure)
    return ", ".join(names) + last + end


def _check(args: Namespace, asked: Subcommand) -> None:
    """Raise `ValueError` for arguments that cannot be served, before anything is loaded."""
    for name in ("requests", "max_num_batched_tokens", "repeats", "trace_steps", "slow_seconds", "watched"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise ValueError(f"{_option(name)} must be at least 1")
    if any(seats < 1 for seats in args.max_num_seqs or ()):
        raise ValueError("--max-num-seqs must be at least 1")
    several = args.shapes is not None or args.speculation or args.peer
    if args.max_num_seqs and len(args.max_num_seqs) > 1 and not several:
        raise ValueError("--max-num-seqs takes several numbers only with --shapes, --speculation or --peer")
    for only, names in _ONLY_WITH.items():
        for name in names:
            if getattr(args, name) not in (None, False) and asked.name != only:
                raise ValueError(f"{_option(name)} goes with --{only}")
    if args.url_model and not args.url:
        raise ValueError("--url-model goes with --url")
    if args.figure and not asked.figure:
        raise ValueError(f"--figure goes with {_drawn(' or ')}")
    if args.figure and args.shapes is not None:
        raise ValueError("--figure draws one ladder, and --shapes makes several")
    for shape in args.shapes or ():
        config_of(shape)
    read_peers(args.peer or ())
    for name in ("json", "figure"):
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {file.parent}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers it started end, too
    sys.exit(main())
