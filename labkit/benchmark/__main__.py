"""Measure the engine: by default the three schedulers and `transformers` on one workload."""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
from pathlib import Path
from typing import Any

from labkit.analysis.reference import reference_model
from labkit.analysis.shapes import SEATS, SHAPES, config_of, random_model, random_reference
from labkit.analysis.workload import Job, make_noise, make_workload
from labkit.benchmark.engine import bookkeeping, equality, forecast
from labkit.benchmark.engine.ladder import SLOW_SECONDS, climb
from labkit.benchmark.engine.ladder_report import LadderReport, figure
from labkit.benchmark.engine.rungs import NAMES, rungs_for
from labkit.benchmark.engine.schedulers import OURS, measure
from labkit.benchmark.engine.speculative import SEATS as SPECULATION_SEATS
from labkit.benchmark.engine.speculative import speculate
from labkit.benchmark.engine.stream import REQUESTS, stream
from labkit.benchmark.serving import load_report
from labkit.benchmark.serving.load_sweep import Plan, measure_load
from labkit.benchmark.serving.watchers import WATCHERS
from labkit.models.devices import resolve_device
from labkit.models.load import load_model

_LOAD = ("rates", "rate_seconds", "streams", "slo_ttft", "slo_itl", "url", "url_model")  # with --serve
_FROM = "mixed prefill, decode"  # where the ladder begins on shapes: those below differ by policy alone


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; 0, or 2 with one line that says what was wrong."""
    args = _parser().parse_args(arguments)
    try:
        _check(args)
        text, figures = _measure(args)
        print(text)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"labkit.benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m labkit.benchmark", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ladder", action="store_true", help="from no cache to int8, one thing more each time")
    what.add_argument("--stream", action="store_true", help="more requests than seats, in fp32 and int8")
    what.add_argument("--speculation", action="store_true", help="n-gram drafts against none, copy and chat")
    what.add_argument("--bookkeeping", action="store_true", help="scheduler, pool and trace alone")
    what.add_argument("--capacity", action="store_true", help="predict settings from others, and measure")
    what.add_argument("--equality", action="store_true", help="half precision and int8 against fp32")
    what.add_argument("--serve", action="store_true", help="a server over HTTP, as the load on it rises")
    what.add_argument(
        "--watched",
        type=int,
        nargs="?",
        const=WATCHERS,
        metavar="N",
        help=f"the lab with nobody there, and with N pages that watch ({WATCHERS})",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, help="32; 128 with --stream, two to a seat with --shapes")
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        nargs="+",
        help="seats: 32; several with --shapes (1 8 32 128) and --speculation (1 8 32)",
    )
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    parser.add_argument("--systems", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--trace-steps", type=int, default=100_000, help="with --bookkeeping")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.html", help="with --ladder, --serve, --capacity: draw it as well"
    )
    serve = parser.add_argument_group("with --serve")
    _add_load(serve)
    ladder = parser.add_argument_group("with --ladder")
    ladder.add_argument("--peers", action="store_true", help="transformers in batches, and other seats")
    ladder.add_argument("--rungs", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    ladder.add_argument(
        "--shapes", nargs="*", metavar="SHAPE", help=f"random weights; of {', '.join(SHAPES)} (none: all)"
    )
    ladder.add_argument("--no-memory", action="store_true", help="do without the peak memory of each rung")
    ladder.add_argument(
        "--slow-seconds",
        type=float,
        default=SLOW_SECONDS,
        help="what answers one at a time runs on as many requests as take about so long",
    )
    return parser


def _add_load(serve: argparse._ArgumentGroup) -> None:
    add, usual = serve.add_argument, Plan()
    add(
        "--rates", type=float, nargs="+", metavar="R", help="requests/s (parts of what a closed loop reaches)"
    )
    add("--rate-seconds", type=float, metavar="S", help=f"of each rate ({usual.seconds:g})")
    add("--streams", type=int, metavar="N", help=f"short requests at once; 0: none ({usual.streams})")
    add("--slo-ttft", type=float, metavar="S", help="until the first token, for goodput (10x unloaded)")
    add("--slo-itl", type=float, metavar="S", help="per token after it, for goodput (5x unloaded)")
    add("--url", help="another server that speaks OpenAI's API: it gets the same arrivals")
    add("--url-model", metavar="NAME", help="its model there (the first that it names)")


def _check(args: argparse.Namespace) -> None:
    """Raise `ValueError` for arguments that cannot be served, before anything is loaded."""
    for name in ("requests", "max_num_batched_tokens", "repeats", "trace_steps", "slow_seconds", "watched"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if any(seats < 1 for seats in args.max_num_seqs or ()):
        raise ValueError("--max-num-seqs must be at least 1")
    if args.max_num_seqs and len(args.max_num_seqs) > 1 and args.shapes is None and not args.speculation:
        raise ValueError("--max-num-seqs takes several numbers only with --shapes or --speculation")
    for name in ("peers", "rungs", "shapes", "no_memory"):
        if getattr(args, name) not in (None, False) and not args.ladder:
            raise ValueError(f"--{name.replace('_', '-')} goes with --ladder")
    for name in _LOAD:
        if getattr(args, name) is not None and not args.serve:
            raise ValueError(f"--{name.replace('_', '-')} goes with --serve")
    if args.url_model and not args.url:
        raise ValueError("--url-model goes with --url")
    if args.figure and not (args.ladder or args.serve or args.capacity):
        raise ValueError("--figure goes with --ladder, --serve or --capacity")
    if args.figure and args.shapes is not None:
        raise ValueError("--figure draws one ladder, and --shapes makes several")
    for shape in args.shapes or ():
        config_of(shape)
    for name in ("json", "figure"):
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {file.parent}")


def _measure(args: argparse.Namespace) -> tuple[str, Any]:
    """What was measured, as text and as figures."""
    if args.bookkeeping:
        figures = bookkeeping.report(trace_steps=args.trace_steps)
        return bookkeeping.table(figures), figures
    seats = args.max_num_seqs or (list(SEATS) if args.shapes is not None else [32])
    if args.serve:
        under_load = measure_load(_plan(args, seats[0]))
        if args.figure:
            load_report.figure(under_load).write_html(args.figure)
        return str(under_load), under_load.to_json()
    if args.shapes is not None:
        reports = [_ladder_of(args, shape, some) for shape in args.shapes or SHAPES for some in seats]
        return "\n\n".join(map(str, reports)), [report.to_json() for report in reports]

    def jobs_of(tokenizer: Any) -> list[Job]:
        return make_workload(tokenizer, args.requests or (REQUESTS if args.stream else 32), seed=args.seed)

    if args.equality:
        precisions = equality.report(args.model, args.device, jobs_of)
        return str(precisions), precisions.to_json()
    load = functools.partial(load_model, args.model, dtype=args.dtype, device=args.device)
    loaded = load()
    if args.watched:
        from labkit.benchmark.serving.watched import (
            watched,  # and with it gradio, which nothing else here needs
        )

        sizes = {"seats": seats[0], "budget": args.max_num_batched_tokens, "repeats": args.repeats}
        watching = watched(loaded, jobs_of(loaded.tokenizer), count=args.watched, **sizes)
        return str(watching), watching.to_json()
    if args.speculation:
        sizes = {"budget": args.max_num_batched_tokens, "repeats": args.repeats}
        speculating = speculate(loaded, seats=args.max_num_seqs or SPECULATION_SEATS, **sizes)
        return str(speculating), speculating.to_json()
    if args.capacity:
        cases = forecast.cases_of(loaded.tokenizer, args.seed)
        predicted = forecast.forecast(loaded, cases, repeats=args.repeats)
        if args.figure:
            forecast.figure(predicted).write_html(args.figure)
        return str(predicted), predicted.to_json()
    reference = functools.partial(reference_model, model=args.model)
    jobs = jobs_of(loaded.tokenizer)
    if args.ladder:
        del loaded  # each rung loads its own
        ladder = _climb(args, functools.partial(load, say=None), jobs, reference, seats[0])
        if args.figure:
            figure(ladder).write_html(args.figure)
        return str(ladder), ladder.to_json()
    if args.stream:
        sizes = {"seats": seats[0], "budget": args.max_num_batched_tokens, "repeats": args.repeats}
        streamed = stream(functools.partial(load, say=None), jobs, reference=reference, **sizes)
        return str(streamed), streamed.to_json()
    report = measure(
        loaded,
        reference(loaded),
        jobs,
        max_num_seqs=seats[0],
        max_num_batched_tokens=args.max_num_batched_tokens,
        repeats=args.repeats,
        systems=args.systems,
    )
    return str(report), report.to_json()


def _plan(args: argparse.Namespace, seats: int) -> Plan:
    """What --serve measures. Raises `ValueError` for what cannot be."""
    given = {name: getattr(args, name) for name in _LOAD if name != "rate_seconds"}
    given |= {"batch": args.requests, "seconds": args.rate_seconds}
    same = {name: getattr(args, name) for name in ("model", "device", "dtype", "repeats", "seed")}
    return Plan(
        **same,
        seats=seats,
        budget=args.max_num_batched_tokens,
        **{name: value for name, value in given.items() if value is not None},
    )


def _ladder_of(args: argparse.Namespace, shape: str, seats: int) -> LadderReport:
    """The ladder on random weights."""
    jobs = make_noise(config_of(shape).vocab_size, args.requests or max(8, 2 * seats), seed=args.seed)
    load = functools.partial(random_model, shape, dtype=args.dtype, device=args.device)
    return _climb(args, load, jobs, functools.partial(random_reference, shape), seats)


def _climb(args: argparse.Namespace, load: Any, jobs: list[Job], reference: Any, seats: int) -> LadderReport:
    rungs = rungs_for(resolve_device(args.device).type, args.rungs)
    if args.shapes is not None and args.rungs is None:
        rungs = rungs[[rung.name for rung in rungs].index(_FROM) :]
    return climb(
        load,
        jobs,
        rungs,
        reference=reference,
        peers=args.peers,
        seats=seats,
        budget=args.max_num_batched_tokens,
        repeats=args.repeats,
        slow_seconds=args.slow_seconds,
        memory=not args.no_memory,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers it started end, too
    sys.exit(main())
