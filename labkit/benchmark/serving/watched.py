"""What it costs to be watched: the workload on the lab, with no page open and with many that watch."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from labkit.analysis.reference import Run, compare_tokens
from labkit.analysis.workload import Job
from labkit.benchmark.engine.runs import System, describe, exactly, short_jobs, take_turns
from labkit.benchmark.report import Report
from labkit.benchmark.serving import watchers
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.outputs import RequestOutput
from labkit.page.gradio_page import serve
from labkit.page.session import Lab, Session
from labkit.page.sse import PATH
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord


@dataclass
class WatchedReport(Report):
    """What `watched` found: medians over the repeats. Figures of the watchers are those of each one."""

    same_tokens: str
    watchers: int
    tokens_per_second: dict[str, float]
    ratio: float  # of the throughput when watched to that when not
    frames_per_second: float  # that a watcher got
    bytes_per_frame: float
    client_cpu_seconds: float  # of all watchers together, in one run
    lost: int  # watchers that were dropped because they read too slowly
    all_seconds: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.settings_line, self.same_tokens]
        lines.append(f"{'':18}{'tokens/s':>10}{'seconds':>9}")
        for name, rate in self.tokens_per_second.items():
            lines.append(f"{name:18}{rate:10.1f}{statistics.median(self.all_seconds[name]):9.1f}")
        lines.append(f"Watched, the engine gives {self.ratio:.1%} of its tokens a second.")
        frames = f"{self.frames_per_second:.1f} frames a second of {self.bytes_per_frame:,.0f} bytes"
        lines.append(f"A watcher got {frames}; {self.lost} were dropped.")
        lines.append(
            "Their process shares the cores with the engine: the "
            f"{self.client_cpu_seconds:.2f} s of CPU that it took in a run are in the figure, too."
        )
        return "\n".join(lines)


def watched(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    *,
    count: int = watchers.WATCHERS,
    seats: int = 32,
    budget: int = 512,
    repeats: int = 3,
    progress: bool = True,
) -> WatchedReport:
    """Time the workload on the lab while its page is served, in turn without watchers and with `count`.

    Raises:
        DifferentTokens: If, in fp32, being watched changed any token.
        RuntimeError: If a request failed, or the watchers could not watch.
    """
    config = EngineConfig(model=loaded, max_num_seqs=seats, max_num_batched_tokens=max(seats, budget))
    seen: list[dict[str, Any]] = []

    def while_watched(name: str, some: Sequence[Job], bar: tqdm | None = None) -> Run:
        with _crowd(page.server_port, count) as figures:
            run = _answer(name, lab, some, bar)
        seen.append(figures)
        return run

    with contextlib.redirect_stdout(io.StringIO()):  # what the engine chose and why
        live = AsyncEngine(Engine(config))
    lab = Lab(live)
    with live, contextlib.ExitStack() as ending:
        page = serve(lab, share=False, quiet=True)
        ending.callback(page.close, verbose=False)
        alone, watching = "not watched", f"watched by {count}"
        todo = [
            System(alone, lambda some, bar: _answer(alone, lab, some, bar), jobs),
            System(watching, functools.partial(while_watched, watching), jobs),
        ]
        for system in todo:
            system.run(short_jobs(jobs), None)
        seen.clear()
        runs, _, same = take_turns(
            todo,
            repeats,
            check=lambda runs: compare_tokens(list(runs.values()), loaded.dtype),
            progress=progress,
        )
    rates = {name: statistics.median(run.rate for run in some) for name, some in runs.items()}
    frames = sum(sum(figures["frames"]) for figures in seen)
    return WatchedReport(
        describe(loaded, jobs, {"seats": seats, "medians of": repeats}),
        same,
        count,
        rates,
        rates[watching] / rates[alone],
        statistics.median(statistics.mean(f["frames"]) / f["seconds"] for f in seen),
        sum(figures["bytes"] for figures in seen) / max(1, frames),
        statistics.median(figures["cpu_seconds"] for figures in seen),
        max(figures["lost"] for figures in seen),
        {name: [run.seconds for run in some] for name, some in runs.items()},
    )


@contextlib.contextmanager
def _crowd(port: int, count: int) -> Iterator[dict[str, Any]]:
    """Run a process with so many watchers, all of them connected. Afterwards the dict has what they saw."""
    command = [sys.executable, "-I", watchers.__file__, str(port), PATH, str(count)]
    figures: dict[str, Any] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the watchers could not watch")
            yield figures
            figures |= json.loads(process.communicate()[0])
        finally:
            process.kill()


def _answer(name: str, lab: Lab, jobs: Sequence[Job], bar: tqdm | None) -> Run:
    """Answer all jobs at once with a fresh engine of the lab, as if a visitor had submitted them."""
    lab.change({}, running="cancel")
    gc.collect()
    session = lab.session
    session.live.pause()
    ids = [_submit(session, job) for job in jobs]
    outputs: dict[str, RequestOutput] = {}
    done = threading.Event()

    def hear(record: StepRecord) -> None:
        for finish in record.finished:
            outputs[finish.request_id] = session.live.output(finish.request_id)
        if bar is not None:
            bar.update(len(record.finished))
        if len(outputs) == len(ids):
            done.set()

    deafen = session.live.subscribe(hear)
    begin = time.perf_counter()
    session.live.resume()
    while not done.wait(1) and not session.live.failure:
        pass
    seconds = time.perf_counter() - begin
    deafen()
    for i in ids:
        error = outputs[i].error if i in outputs else session.live.failure
        if error:
            raise RuntimeError(f"request {i} failed: {error}")
    answers = [outputs[i] for i in ids]
    return Run(
        name,
        seconds,
        [output.token_ids for output in answers],
        [[t - begin for t in output.metrics.token_times] for output in answers],
    )


def _submit(session: Session, job: Job) -> str:
    words = session.decode(job.prompt)
    return session.submissions.submit("somebody", words, job.prompt, exactly(job.max_tokens))
