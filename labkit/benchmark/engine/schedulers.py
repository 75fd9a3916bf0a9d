"""The three schedulers and `transformers`, on the same weights, the same jobs and in the same run.

Correctness comes first: in fp32 all of them must give the same tokens, or there is no table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from labkit.analysis.reference import (
    REFERENCE,
    Run,
    System,
    compare_tokens,
    describe,
    middle,
    run_engine,
    run_reference,
    short_jobs,
    take_turns,
    versions,
)
from labkit.analysis.workload import Job
from labkit.config import EngineConfig
from labkit.models.load import LoadedModel

OURS = ("naive", "static", "continuous")


@dataclass
class Row:
    """A line of the table: medians over the repeats."""

    system: str
    tokens_per_second: float
    speedup: float
    seconds: float
    steps: int | None
    tokens_per_step: float | None
    kv_usage: float | None
    ttft_median: float
    ttft_p95: float
    itl_median: float
    itl_p95: float

    def cells(self) -> list[str]:
        inside = ["-"] * 3
        if self.steps:
            inside = [str(self.steps), f"{self.tokens_per_step:.1f}", f"{self.kv_usage:.0%}"]
        return [
            self.system,
            f"{self.tokens_per_second:.1f}",
            f"{self.speedup:.2f}x",
            f"{self.seconds:.1f}",
            *inside,
            f"{self.ttft_median:.2f}",
            f"{self.ttft_p95:.2f}",
            f"{self.itl_median * 1e3:.1f}",
            f"{self.itl_p95 * 1e3:.1f}",
        ]


@dataclass
class Report:
    settings: dict[str, Any]
    rows: list[Row]
    same_tokens: str
    all_seconds: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = ("", "tokens/s", "speed-up", "seconds", "steps", "tok/step", "KV usage")
        head += ("TTFT s", "p95", "ITL ms", "p95")
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return "\n".join(
            (settings, self.same_tokens, _line(head), *(_line(row.cells()) for row in self.rows))
        )


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:12}" + "".join(f"{cell:>9}" for cell in cells[1:])


def measure(
    loaded: LoadedModel,
    reference: PreTrainedModel | None,
    jobs: Sequence[Job],
    *,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
    repeats: int = 3,
    systems: Sequence[str] = OURS,
    progress: bool = True,
) -> Report:
    """Warm up, check, then time each system `repeats` times, in turn, so that a slow minute hits all alike.

    Raises:
        DifferentTokens: if, in fp32, two systems disagree on any token.
    """

    def once(system: str, some: Sequence[Job], bar: tqdm | None = None) -> Run:
        if system == REFERENCE:
            return run_reference(reference, some, bar)
        config = EngineConfig(
            model=loaded,
            scheduler=system,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_seqs, max_num_batched_tokens),
        )
        return run_engine(config, some, bar)

    names = [*([REFERENCE] if reference is not None else []), *systems]
    for name in names:
        once(name, short_jobs(jobs))
    same = ""

    def check(runs: dict[str, Run]) -> None:
        nonlocal same
        same = compare_tokens(list(runs.values()), loaded.dtype)

    todo = [System(name, functools.partial(once, name), jobs) for name in names]
    runs, _ = take_turns(todo, repeats, check=check, progress=progress)
    baseline = statistics.median(run.rate for run in runs[names[0]])
    settings = {
        **describe(loaded, jobs),
        "seats": max_num_seqs,
        "token budget": max(max_num_seqs, max_num_batched_tokens),
        "medians of": repeats,
        **versions(),
    }
    return Report(
        settings,
        [row_of(runs[name], baseline) for name in names],
        same,
        {name: [run.seconds for run in runs[name]] for name in names},
    )


def row_of(runs: Sequence[Run], baseline: float) -> Row:
    """Medians; `baseline` is what the speed-up is measured against, in output tokens per second."""
    seconds = statistics.median(run.seconds for run in runs)
    run = middle(runs)
    rate = sum(map(len, run.tokens)) / seconds
    ttft = [times[0] for times in run.token_times]
    gaps = [b - a for times in run.token_times for a, b in itertools.pairwise(times)]
    return Row(
        run.system,
        rate,
        rate / baseline,
        seconds,
        run.steps,
        run.computed / run.steps if run.steps and run.computed else None,
        run.kv_usage,
        statistics.median(ttft),
        percentile(ttft, 95),
        statistics.median(gaps),
        percentile(gaps, 95),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
