"""`python -m labkit.benchmark`: the command line of the measurements."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from labkit.benchmark.serving import OURS, DifferentTokens, measure, reference_model
from labkit.benchmark.workload import make_workload
from labkit.weights import load_model


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; 0, or 2 with one line that says what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m labkit.benchmark", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=32, help="seats")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="token budget of a step")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    args = parser.parse_args(arguments)
    try:
        for name in ("requests", "max_num_seqs", "max_num_batched_tokens", "repeats"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        loaded = load_model(args.model, dtype=args.dtype, device=args.device)
        report = measure(
            loaded,
            reference_model(loaded, args.model),
            make_workload(loaded.tokenizer, args.requests, seed=args.seed),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            repeats=args.repeats,
            systems=args.systems,
        )
        if args.json:
            args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, DifferentTokens) as error:
        print(f"labkit.benchmark: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
