"""Fit a clock on some settings, predict others with it, and measure these in the same run.

What is predicted was not fitted: other seats, another budget, other lengths, requests that come one by one.
Fitting and measuring take turns, so that a slow minute hits both.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from tqdm.auto import tqdm

from labkit.analysis.capacity import Demand, FittedClock, Settings, draw_demands, fit, replay
from labkit.analysis.workload import Job, make_workload
from labkit.benchmark.engine.runs import check_answers, device_name, dtype_name, exactly, versions
from labkit.benchmark.report import Report
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.trace import latency
from labkit.trace.records import StepRecord
from labkit.views import style

TERMS = ("step", "tokens", "keys")
LOAD = 0.7  # the rate of the open loop, as a share of what the clock says can be served
REPLAYED = 10_000  # requests with which the replay itself is timed


@dataclass(frozen=True)
class Case:
    """A way to run the engine, and what it is given.

    Attributes:
        fitted: Whether the clock is fitted to it.
        arrivals: The time at which each job arrives, in seconds; empty: all are there at the start.
    """

    name: str
    seats: int
    budget: int
    jobs: Sequence[Job]
    fitted: bool = False
    arrivals: Sequence[float] = ()

    @property
    def demands(self) -> list[Demand]:
        """The jobs, as a replay takes them."""
        arrivals = self.arrivals or [0.0] * len(self.jobs)
        return [
            Demand(at, len(job.prompt), job.max_tokens) for at, job in zip(arrivals, self.jobs, strict=True)
        ]


@dataclass(frozen=True)
class Served:
    """What a run of a case gave: output tokens per second, TTFT and ITL (token by token) in seconds."""

    rate: float
    ttft: list[float]
    itl: list[float]
    records: Sequence[StepRecord]
    num_blocks: int


def serve(loaded: LoadedModel, case: Case) -> Served:
    """Run the engine on a case. Each request is added at the first step boundary after its time."""
    gc.collect()  # an engine that is no longer used may still hold its pool
    engine = Engine(EngineConfig(model=loaded, max_num_seqs=case.seats, max_num_batched_tokens=case.budget))
    todo = collections.deque(zip(case.demands, case.jobs, strict=True))
    arrivals: dict[str, float] = {}
    begin = time.perf_counter()
    while todo or engine.has_unfinished:
        now = time.perf_counter() - begin
        while todo and todo[0][0].at <= now:
            demand, job = todo.popleft()
            arrivals[engine.add_request(job.prompt, exactly(job.max_tokens))] = begin + demand.at
        if engine.has_unfinished:
            engine.step()
        else:
            time.sleep(todo[0][0].at - now)
    outputs = [engine.outputs[request_id] for request_id in arrivals]
    check_answers(outputs, f"of the case {case.name!r}")
    times = [output.metrics.token_times for output in outputs]
    seconds = max(some[-1] for some in times) - min(arrivals.values())
    return Served(
        sum(map(len, times)) / seconds,
        [latency.ttft(at, some) or 0.0 for at, some in zip(arrivals.values(), times, strict=True)],
        [gap for some in times for gap in latency.itl(some)],
        engine.trace.records,
        engine.pool.num_blocks,
    )


@dataclass
class ForecastRow:
    """A case, measured (medians over the repeats) and predicted. TTFT and ITL are medians, in seconds."""

    case: str
    fitted: bool
    requests: int
    seats: int
    budget: int
    rate: float
    predicted_rate: float
    ttft: float
    predicted_ttft: float
    itl: float
    predicted_itl: float
    all_rates: list[float]
    all_ttfts: list[float]

    @property
    def rate_error(self) -> float:
        """The relative error of the predicted throughput."""
        return self.predicted_rate / self.rate - 1

    @property
    def ttft_error(self) -> float:
        """The relative error of the predicted median TTFT."""
        return self.predicted_ttft / self.ttft - 1


@dataclass
class ForecastReport(Report):
    """What `forecast` found."""

    clock: FittedClock
    rows: list[ForecastRow]
    replay: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            self.settings_line,
            f"The clock: {self.clock}.",
            f"{'':34}{'tokens/s':>10}{'predicted':>11}{'':>6}{'TTFT s':>9}{'predicted':>11}{'':>6}"
            f"{'ITL ms':>9}{'predicted':>11}",
        ]
        for fitted, title in ((True, "fitted on"), (False, "predicted")):
            lines.append(f"{title}:")
            lines += [
                f"  {row.case:32}{row.rate:10.1f}{row.predicted_rate:11.1f}{row.rate_error:+6.0%}"
                f"{row.ttft:9.2f}{row.predicted_ttft:11.2f}{row.ttft_error:+6.0%}"
                f"{row.itl * 1e3:9.1f}{row.predicted_itl * 1e3:11.1f}"
                for row in self.rows
                if row.fitted == fitted
            ]
        told = self.replay
        lines.append(
            f"The replay of {told['requests']:,} requests, {told['tokens']:,} tokens and {told['steps']:,} "
            f"steps took {told['seconds']:.1f} s on one core."
        )
        return "\n".join(lines)


def cases_of(tokenizer: Any, seed: int = 0, scale: float = 1.0) -> list[Case]:
    """Two cases to fit, and three to predict. The arrivals of the last are drawn once the first two have run.

    Args:
        tokenizer: The tokenizer of the model.
        seed: The seed of the workloads.
        scale: A factor for the number of requests.
    """

    def jobs(count: int, offset: int, **lengths: tuple[int, int]) -> list[Job]:
        return make_workload(tokenizer, max(2, round(count * scale)), seed=seed + offset, **lengths)

    long = {"prompt_tokens": (256, 640), "output_tokens": (8, 32)}
    return [
        Case("32 seats, budget 512", 32, 512, jobs(24, 0), fitted=True),
        Case("4 seats, budget 64", 4, 64, jobs(8, 1), fitted=True),
        Case("8 seats, budget 256", 8, 256, jobs(16, 2)),
        Case("16 seats, long prompts", 16, 512, jobs(10, 3, **long)),
        Case(f"32 seats, arriving at {LOAD:.0%}", 32, 512, jobs(24, 4)),
    ]


def forecast(
    loaded: LoadedModel,
    cases: Sequence[Case],
    *,
    repeats: int = 3,
    replayed: int = REPLAYED,
    progress: bool = True,
) -> ForecastReport:
    """Run all cases in turn, fit the clock to those that are for it, and predict all.

    The last case is the open loop: its requests come at random moments, at `LOAD` of the throughput that
    the clock of the first round predicts for a backlog of them.

    Args:
        loaded: The model.
        cases: The cases; at least one must be for fitting.
        repeats: The number of runs of each.
        replayed: The number of requests with which the replay itself is timed.
        progress: Whether a progress bar is shown.
    """
    warm = make_workload(loaded.tokenizer, 4, prompt_tokens=(16, 64), output_tokens=(4, 8))
    serve(loaded, Case("warm-up", 4, 64, warm))
    cases = list(cases)
    served: list[list[Served]] = [[] for _ in cases]
    with tqdm(total=repeats * len(cases), unit="run", disable=not progress) as bar:
        for repeat in range(repeats):
            for i, case in enumerate(cases):
                if repeat == 0 and i == len(cases) - 1:
                    case = cases[i] = _arriving(case, _fit(cases, served), served[0][0].num_blocks)
                bar.set_description(f"{case.name} {repeat + 1}/{repeats}")
                served[i].append(serve(loaded, case))
                bar.update()
    clock = _fit(cases, served)
    return ForecastReport(
        {
            "model": loaded.name,
            "dtype": dtype_name(loaded.dtype),
            "device": device_name(loaded.device),
            "medians of": repeats,
            **versions(),
        },
        clock,
        [_row(case, runs, clock) for case, runs in zip(cases, served, strict=True)],
        _speed(clock, replayed),
    )


def _fit(cases: Sequence[Case], served: Sequence[Sequence[Served]]) -> FittedClock:
    records = [
        record
        for case, runs in zip(cases, served, strict=True)
        for run in runs
        if case.fitted
        for record in run.records
    ]
    return fit(records, TERMS)


def _settings(case: Case, num_blocks: int) -> Settings:
    return Settings(num_blocks, max_num_seqs=case.seats, max_num_batched_tokens=case.budget)


def _arriving(case: Case, clock: FittedClock, num_blocks: int) -> Case:
    backlog = replay(case.demands, clock, _settings(case, num_blocks))
    rate = LOAD * len(case.jobs) / backlog.seconds
    drawn = draw_demands(len(case.jobs), rate=rate)
    return dataclasses.replace(case, arrivals=[demand.at for demand in drawn])


def _row(case: Case, runs: Sequence[Served], clock: FittedClock) -> ForecastRow:
    predicted = replay(case.demands, clock, _settings(case, runs[0].num_blocks))
    rates = [run.rate for run in runs]
    ttfts = [statistics.median(run.ttft) for run in runs]
    return ForecastRow(
        case.name,
        case.fitted,
        len(case.jobs),
        case.seats,
        case.budget,
        statistics.median(rates),
        predicted.tokens_per_second,
        statistics.median(ttfts),
        statistics.median(predicted.ttft),
        statistics.median(statistics.median(run.itl) for run in runs),
        predicted.percentile("itl", 50),
        rates,
        ttfts,
    )


def _speed(clock: FittedClock, requests: int) -> dict[str, float]:
    """How long a replay at full seats takes."""
    demands = draw_demands(requests, prompt_tokens=(64, 512), answer_tokens=(32, 256))
    settings = Settings(4096, max_num_seqs=64, max_num_batched_tokens=1024)
    begin = time.perf_counter()
    told = replay(demands, clock, settings)
    seconds = time.perf_counter() - begin
    return {"requests": requests, "tokens": told.num_tokens, "steps": told.steps, "seconds": seconds}


# -- the picture ----------------------------------------------------------------------------------


def figure(report: ForecastReport) -> go.Figure:
    """Measured beside predicted, for each case. Its text twin is `str(report)`."""
    drawn = make_subplots(1, 2, subplot_titles=("output tokens per second", "median TTFT, in seconds"))
    names = [style.escape(row.case + (" (fitted)" if row.fitted else "")) for row in report.rows]
    measures = (("rate", "predicted_rate", "all_rates"), ("ttft", "predicted_ttft", "all_ttfts"))
    for column, (measured, predicted, spread) in enumerate(measures, 1):
        values = [getattr(row, measured) for row in report.rows]
        runs = [getattr(row, spread) for row in report.rows]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [max(some) - value for some, value in zip(runs, values, strict=True)],
            "arrayminus": [value - min(some) for some, value in zip(runs, values, strict=True)],
        }
        guess = [getattr(row, predicted) for row in report.rows]
        pattern = {"shape": "/", "size": 6, "solidity": 0.3, "fgcolor": style.PALETTE[1]}
        marker = {"color": style.PALETTE[1], "pattern": {**pattern, "bgcolor": style.PAPER}}
        common = {"x": names, "showlegend": column == 1}
        drawn.add_trace(
            go.Bar(y=values, name="measured", error_y=bars, marker={"color": style.PALETTE[0]}, **common),
            row=1,
            col=column,
        )
        drawn.add_trace(go.Bar(y=guess, name="predicted", marker=marker, **common), row=1, col=column)
    drawn.layout.template = style.TEMPLATE
    settings = report.settings
    title = f"Predicted and measured: {settings['model']}, {settings['dtype']}, {settings['device']}"
    drawn.update_layout(
        title_text=style.escape(title), height=460, margin={"t": 90, "b": 120}, barmode="group"
    )
    drawn.update_yaxes(showgrid=True, gridcolor=style.FREE, rangemode="tozero")
    return drawn
