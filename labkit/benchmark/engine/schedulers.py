"""The three schedulers and `transformers`, on the same weights, the same jobs and in the same run.

Correctness comes first: in fp32 all of them must give the same tokens, or there is no table.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from labkit.analysis.reference import REFERENCE, Run, compare_tokens, run_reference
from labkit.analysis.workload import Job
from labkit.benchmark.engine.runs import System, describe, middle, run_engine, short_jobs, take_turns
from labkit.benchmark.report import Report, table_line
from labkit.config import EngineConfig
from labkit.models.load import LoadedModel
from labkit.trace import latency
from labkit.trace.latency import Spread

OURS = ("naive", "static", "continuous")

_HEAD = (
    *("", "tokens/s", "speed-up", "seconds", "steps", "tok/step", "KV usage"),
    *("TTFT s", "p95", "ITL ms", "p95"),
)
_WIDTHS = (12,) + (9,) * (len(_HEAD) - 1)


@dataclass
class SchedulerRow:
    """A line of the table: medians over the repeats. TTFT and ITL (token by token) are of one repeat."""

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
        """The line, as text."""
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
class SchedulerReport(Report):
    """What `measure` found."""

    rows: list[SchedulerRow]
    same_tokens: str
    all_seconds: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [table_line(cells, _WIDTHS) for cells in (_HEAD, *(row.cells() for row in self.rows))]
        return "\n".join((self.settings_line, self.same_tokens, *lines))


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
) -> SchedulerReport:
    """Warm up, check, then time each system `repeats` times, in turn.

    Raises:
        DifferentTokens: If, in fp32, two systems disagree on any token.
    """
    budget = max(max_num_seqs, max_num_batched_tokens)

    def once(system: str, some: Sequence[Job], bar: tqdm | None = None) -> Run:
        if system == REFERENCE:
            return run_reference(reference, some, bar)
        config = EngineConfig(
            model=loaded, scheduler=system, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        return run_engine(config, some, bar)

    names = [*([REFERENCE] if reference is not None else []), *systems]
    for name in names:
        once(name, short_jobs(jobs))
    todo = [System(name, functools.partial(once, name), jobs) for name in names]
    runs, _, same = take_turns(
        todo,
        repeats,
        check=lambda runs: compare_tokens(list(runs.values()), loaded.dtype),
        progress=progress,
    )
    baseline = statistics.median(run.rate for run in runs[names[0]])
    more = {"seats": max_num_seqs, "token budget": budget, "medians of": repeats}
    return SchedulerReport(
        describe(loaded, jobs, more),
        [row_of(runs[name], baseline) for name in names],
        same,
        {name: [run.seconds for run in runs[name]] for name in names},
    )


def row_of(runs: Sequence[Run], baseline: float) -> SchedulerRow:
    """The line of a system; `baseline` is what speed is compared with, in output tokens per second."""
    seconds = statistics.median(run.seconds for run in runs)
    run = middle(runs)
    rate = sum(map(len, run.tokens)) / seconds
    ttft, itl = spreads_of(run)
    if ttft is None or itl is None:
        raise ValueError(f"{run.system} gave no answer of two tokens: there is no latency to report")
    return SchedulerRow(
        run.system,
        rate,
        rate / baseline,
        seconds,
        run.steps,
        run.computed / run.steps if run.steps and run.computed else None,
        run.kv_usage,
        ttft.median,
        ttft.p95,
        itl.median,
        itl.p95,
    )


def spreads_of(run: Run) -> tuple[Spread | None, Spread | None]:
    """TTFT from the common start, and ITL token by token, over all answers of a run."""
    first = [times[0] for times in run.token_times if times]
    return Spread.of(first), Spread.of([gap for times in run.token_times for gap in latency.itl(times)])
