"""Measure the engine: by default the three schedulers and `transformers` on one workload."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from labkit.benchmark import bookkeeping, equality
from labkit.benchmark.serving import OURS, measure, reference_model
from labkit.benchmark.workload import make_workload
from labkit.weights import load_model


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; 0, or 2 with one line that says what was wrong."""
    args = _parser().parse_args(arguments)
    try:
        for name in ("requests", "max_num_seqs", "max_num_batched_tokens", "repeats", "trace_steps"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"--json: there is no folder {args.json.parent}")
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
    what.add_argument("--bookkeeping", action="store_true", help="scheduler, pool and trace alone")
    what.add_argument("--equality", action="store_true", help="half precision against fp32")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=32, help="seats")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--seed", type=int, default=0, help="of the workload")
    parser.add_argument("--systems", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--trace-steps", type=int, default=100_000, help="with --bookkeeping")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    return parser


def _measure(args: argparse.Namespace) -> tuple[str, Any]:
    """What was measured, as text and as figures."""
    if args.bookkeeping:
        figures = bookkeeping.report(trace_steps=args.trace_steps)
        return bookkeeping.table(figures), figures

    def jobs_of(tokenizer: Any) -> list:
        return make_workload(tokenizer, args.requests, seed=args.seed)

    if args.equality:
        rows = equality.report(args.model, args.device, jobs_of)
        return equality.table(rows), equality.to_json(rows)
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    report = measure(
        loaded,
        reference_model(loaded, args.model),
        jobs_of(loaded.tokenizer),
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        repeats=args.repeats,
        systems=args.systems,
    )
    return str(report), report.to_json()


if __name__ == "__main__":
    sys.exit(main())
