"""From no cache to 8 bits, one thing more in each ablation, on one workload and in one run.

In fp32 all ablations but the last must give the same tokens, or there is no table. The speed of each is
compared with the one below, with the first, with `transformers`, and with the roofline of its steps.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from labkit.analysis.device_probe import measure_ceiling
from labkit.analysis.devices import Ceiling
from labkit.analysis.reference import REFERENCE, Run, agreement, compare_tokens, run_reference
from labkit.analysis.roofline import Shape
from labkit.analysis.workload import Job
from labkit.benchmark.engine.ablations import Ablation, Sizes
from labkit.benchmark.engine.ladder_report import AblationRow, LadderReport
from labkit.benchmark.engine.meter import Meter, peak_memory
from labkit.benchmark.engine.peers import PeerRow, peer_row, peer_systems
from labkit.benchmark.engine.runs import (
    System,
    describe,
    dtype_name,
    middle,
    reason,
    run_engine,
    short_jobs,
    take_turns,
)
from labkit.models.load import LoadedModel

SLOW_SECONDS = 60.0  # systems that answer one at a time get as many of the first jobs as take about so long
_FEWEST = 4  # but no fewer jobs than that

Load = Callable[..., LoadedModel]  # called with the switches of an ablation's weights


@dataclass
class Contender:
    """An ablation, ready to run."""

    ablation: Ablation
    loaded: LoadedModel
    sizes: Sizes
    bookkeeping_share: float | None = None

    @property
    def precision(self) -> str:
        """What it multiplies in: "int8", or the dtype."""
        return self.loaded.quantization or dtype_name(self.loaded.dtype)

    def __call__(self, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
        """Answer the jobs. The first time the steps are metered too, which costs a little on a GPU."""
        if self.bookkeeping_share is not None:
            return self.run(jobs, bar)
        meter = Meter()
        run = self.run(jobs, bar, meter)
        self.bookkeeping_share = meter.bookkeeping_share
        return run

    def run(self, jobs: Sequence[Job], bar: tqdm | None = None, meter: Meter | None = None) -> Run:
        """Answer the jobs, with a meter or without."""
        config = self.sizes.config(self.ablation, self.loaded)
        run = run_engine(config, jobs, bar, watching=meter.watching if meter else contextlib.nullcontext)
        run.system = self.ablation.name
        return run


def climb(
    load: Load,
    jobs: Sequence[Job],
    ablations: Sequence[Ablation],
    *,
    reference: Callable[[LoadedModel], PreTrainedModel] | None,
    peers: bool = False,
    seats: int = 32,
    budget: int = 512,
    repeats: int = 3,
    slow_seconds: float = SLOW_SECONDS,
    memory: bool = True,
    progress: bool = True,
    ceiling: Callable[..., Ceiling] = measure_ceiling,
) -> LadderReport:
    """Measure the ablations, `transformers` and, if asked, its other ways and ours with fewer seats.

    Args:
        load: A function that makes the model, by the switches of an ablation's weights. It must be picklable
            if `memory` is asked for.
        jobs: The workload.
        ablations: The ablations, from the bottom up.
        reference: A function that gives the same weights as `transformers` runs them; None leaves it out.
        peers: Whether the other ways are measured.
        seats, budget: The sizes of the engine.
        repeats: The number of runs of each system; the median counts.
        slow_seconds: The time that a system which answers one request at a time may take. If it would take
            longer, it runs on the first few of the jobs, and the table says on how many.
        memory: Whether each ablation runs once more in a process of its own, which measures its peak memory.
        progress: Whether a progress bar is shown.
        ceiling: A function that measures what the device can do.

    Raises:
        DifferentTokens: If, in fp32, two exact ablations disagree on any token.
        ValueError: If no ablation can run.
    """
    sizes = Sizes.of(jobs, seats, budget)
    contenders, failed = _contenders(load, jobs, ablations, sizes)
    first, top = (list(contenders.values())[place].loaded for place in (0, -1))
    shapes = {name: Shape.of(one.loaded) for name, one in contenders.items()}
    measure = functools.partial(ceiling, first.device, first.dtype, int8=top.quantization == "int8")
    before = measure()
    systems = _systems(contenders, reference(first) if reference else None, jobs, slow_seconds, peers, sizes)
    for system in systems:
        if system.optional:
            _warm_up(system, jobs, failed)
    exact = {name for name, one in contenders.items() if one.ablation.exact}

    def check(runs: dict[str, Run]) -> str:
        of_exact = [run for name, run in runs.items() if name in exact]
        return compare_tokens(of_exact, first.dtype) if of_exact else "No rung is exact."

    todo = [system for system in systems if system.name not in failed]
    runs, broken, same = take_turns(todo, repeats, check=check, progress=progress)
    failed |= broken
    measured = before.best(measure())
    baseline = statistics.median(run.rate for run in runs[REFERENCE]) if REFERENCE in runs else None
    true = max((runs[name][0] for name in exact or contenders), key=lambda run: len(run.tokens))
    jobs_of = {system.name: system.jobs for system in todo}
    rows: list[AblationRow] = []
    for ablation in ablations:
        name = ablation.name
        if name in failed:
            rows.append(AblationRow(name, ablation.adds, failed[name]))
            continue
        row = _row(contenders[name], runs[name], shapes[name], measured, true)
        row.peak_memory = _memory_of(load, contenders[name], jobs_of[name]) if memory else None
        _gains(row, [other for other in rows if not other.failure], baseline)
        rows.append(row)
    others = [
        PeerRow(system.name, failed[system.name])
        if system.name in failed
        else peer_row(system.name, runs[system.name], true, baseline)
        for system in systems
        if system.name not in contenders
    ]
    more = {
        "seats": seats,
        "token budget": sizes.budget,
        "blocks": f"{sizes.num_blocks} of 16 tokens",
        "medians of": repeats,
    }
    return LadderReport(describe(first, jobs, more), same, len(jobs), measured, rows, others)


# -- what is measured -----------------------------------------------------------------------------


def _contenders(
    load: Load, jobs: Sequence[Job], ablations: Sequence[Ablation], sizes: Sizes
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The ablations that can run here, warmed up, and why the others cannot."""
    models: dict[str, LoadedModel] = {}
    contenders: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    for ablation in ablations:
        key = repr(ablation.weights)
        try:
            if key not in models:
                models[key] = load(**ablation.weights)
            contender = Contender(ablation, models[key], sizes)
            contender.run(short_jobs(jobs))
        except ValueError as error:  # this device or model lacks what it needs
            failed[ablation.name] = reason(error)
        else:
            contenders[ablation.name] = contender
    if not contenders:
        raise ValueError(f"no rung can be run: {'; '.join(failed.values())}")
    return contenders, failed


def _systems(
    contenders: dict[str, Contender],
    model: PreTrainedModel | None,
    jobs: Sequence[Job],
    slow_seconds: float,
    peers: bool,
    sizes: Sizes,
) -> list[System]:
    """All that is measured in turn: `transformers`, the ablations, and the peers."""
    systems = []
    if model is not None:
        run_reference(model, short_jobs(jobs))
        one_by_one = functools.partial(run_reference, model)
        systems.append(System(REFERENCE, one_by_one, _affordable(one_by_one, jobs, slow_seconds)))
    for name, one in contenders.items():
        some = _affordable(one.run, jobs, slow_seconds) if one.ablation.alone else jobs
        systems.append(System(name, one, some))
    if peers:
        fewest = min((system.jobs for system in systems), key=len)
        ours = {one.precision: one.loaded for one in contenders.values()}  # of each, the highest ablation's
        systems += peer_systems(model, ours, jobs, seats=sizes.seats, budget=sizes.budget, few=fewest)
    return systems


def _affordable(trial: Callable[..., Run], jobs: Sequence[Job], seconds: float) -> Sequence[Job]:
    """As many of the first jobs as take so many seconds one at a time, judged by a trial with two of them."""
    rate = trial(jobs[:2]).rate
    left, count = seconds, 0
    while count < len(jobs):
        left -= jobs[count].max_tokens / rate
        if left < 0 and count >= _FEWEST:
            break
        count += 1
    return jobs[:count]


def _warm_up(system: System, jobs: Sequence[Job], failed: dict[str, str]) -> None:
    try:
        system.run(short_jobs(jobs), None)
    except Exception as error:
        failed[system.name] = reason(error)


# -- the lines of the table -----------------------------------------------------------------------


def _row(one: Contender, runs: Sequence[Run], shape: Shape, ceiling: Ceiling, true: Run) -> AblationRow:
    """Medians, and the arithmetic of the steps that took the median time."""
    run = middle(runs)
    works = [work for record in run.records if (work := shape.work(record)).bytes]
    moved, operations = sum(work.bytes for work in works), sum(work.operations for work in works)
    seconds = statistics.median(run.seconds for run in runs)
    places = agreement(true, run)
    diverged = [place for place in places if place is not None]
    return AblationRow(
        one.ablation.name,
        one.ablation.adds,
        requests=len(run.tokens),
        tokens_per_second=statistics.median(run.rate for run in runs),
        seconds=seconds,
        all_seconds=[run.seconds for run in runs],
        steps=len(works),
        bytes_per_step=moved / len(works),
        operations_per_step=operations / len(works),
        bytes_per_second=moved / seconds,
        operations_per_second=operations / seconds,
        roofline_share=ceiling.least_seconds(works, one.precision) / seconds,
        bookkeeping_share=one.bookkeeping_share,
        equal=1 - len(diverged) / len(places),
        first_divergence=statistics.median(diverged) if diverged else None,
    )


def _gains(row: AblationRow, below: Sequence[AblationRow], baseline: float | None) -> None:
    rate = row.tokens_per_second
    if below:
        row.gain_before = rate / below[-1].tokens_per_second
        row.gain_first = rate / below[0].tokens_per_second
    if baseline:
        row.gain_reference = rate / baseline


def _memory_of(load: Load, one: Contender, jobs: Sequence[Job]) -> int | None:
    """The most bytes that a process holds which does nothing but run this ablation; None if it failed."""
    arguments = (load, one.ablation, one.sizes, list(jobs), torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run_alone, *arguments).result()
        except (BrokenProcessPool, OSError, RuntimeError, ValueError):
            return None


def _run_alone(load: Load, ablation: Ablation, sizes: Sizes, jobs: Sequence[Job], threads: int) -> int | None:
    torch.set_num_threads(threads)
    loaded = load(**ablation.weights)
    Contender(ablation, loaded, sizes).run(jobs)
    return peak_memory(loaded.device)
