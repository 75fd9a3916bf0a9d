"""From no cache to 8 bits, one thing more on each rung, on one workload and in one run.

In fp32 every rung but the last must give the same tokens, or there is no table. A rung's speed is held
against the rung below, against the first, against `transformers`, and against the floor under its steps.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from labkit.analysis.reference import (
    REFERENCE,
    Run,
    System,
    agreement,
    compare_tokens,
    describe,
    middle,
    reason,
    run_engine,
    run_reference,
    short_jobs,
    take_turns,
    versions,
)
from labkit.analysis.roofline import Ceiling, Shape, measure_ceiling
from labkit.analysis.workload import Job
from labkit.benchmark.engine.ladder_report import LadderReport, RungRow
from labkit.benchmark.engine.meter import Meter, peak_memory
from labkit.benchmark.engine.peers import PeerRow, peer_row, peer_systems
from labkit.benchmark.engine.rungs import Rung, Sizes
from labkit.models.load import LoadedModel

SLOW_SECONDS = 60.0  # what answers one at a time runs on as many of the first jobs as take about so long
_FEWEST = 4  # but on no fewer than that

Load = Callable[..., LoadedModel]  # called with the switches of a rung's weights


@dataclass
class Standing:
    """A rung, ready to run."""

    rung: Rung
    loaded: LoadedModel
    sizes: Sizes
    bookkeeping_share: float | None = None

    def __call__(self, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
        """Answer the jobs; the first time also meter the steps, which on a GPU costs a little."""
        meter = Meter() if self.bookkeeping_share is None else None
        run = self.run(jobs, bar, meter)
        if meter is not None:
            self.bookkeeping_share = meter.bookkeeping_share
        return run

    def run(self, jobs: Sequence[Job], bar: tqdm | None = None, meter: Meter | None = None) -> Run:
        run = run_engine(self.sizes.config(self.rung, self.loaded), jobs, bar, meter=meter)
        run.system = self.rung.name
        return run


def climb(
    load: Load,
    jobs: Sequence[Job],
    rungs: Sequence[Rung],
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
    """Measure the rungs, `transformers` and, if asked, its other ways and ours with fewer seats.

    Args:
        load: makes the model, by the switches of a rung's weights; picklable if `memory` is wanted.
        reference: the same weights as `transformers` runs them.
        slow_seconds: what answers one request at a time, and would take longer than this, runs on the first
            few of the jobs; the table says on how many.
        memory: run each rung once more in a process of its own, for its peak memory.

    Raises:
        DifferentTokens: if, in fp32, two exact rungs disagree on any token.
        ValueError: if no rung can be run.
    """
    sizes = Sizes.of(jobs, seats, budget)
    models: dict[str, LoadedModel] = {}
    standing: dict[str, Standing] = {}
    failed: dict[str, str] = {}
    for rung in rungs:
        key = repr(rung.weights)
        try:
            if key not in models:
                models[key] = load(**rung.weights)
            standing[rung.name] = Standing(rung, models[key], sizes)
            standing[rung.name].run(short_jobs(jobs))
        except ValueError as error:  # what it needs is not to be had here
            standing.pop(rung.name, None)
            failed[rung.name] = reason(error)
    if not standing:
        raise ValueError(f"no rung can be run: {'; '.join(failed.values())}")
    top = next(reversed(standing.values()))
    first = next(iter(standing.values())).loaded
    shapes = {name: Shape.of(one.loaded) for name, one in standing.items()}
    measure = functools.partial(ceiling, first.device, first.dtype, int8=top.loaded.quantization == "int8")
    measured = measure()

    systems = []
    model = reference(first) if reference else None
    if model is not None:
        run_reference(model, short_jobs(jobs))
        one_by_one = functools.partial(run_reference, model)
        systems.append(_system(REFERENCE, one_by_one, jobs, slow_seconds, one_by_one))
    for one in standing.values():
        if one.rung.alone:
            systems.append(_system(one.rung.name, one, jobs, slow_seconds, one.run))
        else:
            systems.append(System(one.rung.name, one, jobs))
    if peers:
        fewest = min((system.jobs for system in systems), key=len)
        ours = _ours(standing.values())
        systems += peer_systems(model, ours, jobs, seats=seats, budget=sizes.budget, few=fewest)
        for system in systems:
            if system.optional:
                _warm_up(system, jobs, failed)

    exact = {name for name, one in standing.items() if one.rung.exact}
    same = ""

    def check(runs: dict[str, Run]) -> None:
        nonlocal same
        of_rungs = [run for name, run in runs.items() if name in exact]
        same = compare_tokens(of_rungs, first.dtype) if of_rungs else "No rung is exact."

    todo = [system for system in systems if system.name not in failed]
    runs, broken = take_turns(todo, repeats, check=check, progress=progress)
    failed |= broken
    measured = measured.best(measure())
    peak: dict[str, int | None] = {}
    if memory:
        peak = {name: _memory_of(load, one, _jobs_of(todo, name)) for name, one in standing.items()}
    baseline = statistics.median(run.rate for run in runs[REFERENCE]) if REFERENCE in runs else None
    true = max((runs[name][0] for name in exact or standing), key=lambda run: len(run.tokens))
    rows: list[RungRow] = []
    for rung in rungs:
        if rung.name in failed:
            rows.append(RungRow(rung.name, rung.adds, failed[rung.name]))
            continue
        one = standing[rung.name]
        row = _row(rung, runs[rung.name], shapes[rung.name], measured, one, true)
        row.peak_memory = peak.get(rung.name)
        _gains(row, [other for other in rows if not other.failure], baseline)
        rows.append(row)
    others: list[PeerRow] = []
    for system in systems:
        if system.name in standing:
            continue
        if system.name in failed:
            others.append(PeerRow(system.name, failed[system.name]))
        else:
            others.append(peer_row(system.name, runs[system.name], true, baseline))
    settings = {
        **describe(first, jobs),
        "seats": seats,
        "token budget": sizes.budget,
        "pages": f"{sizes.num_blocks} of 16 tokens",
        "medians of": repeats,
        **versions(),
    }
    return LadderReport(settings, same, len(jobs), measured, rows, others)


def _system(
    name: str,
    run: Callable[..., Run],
    jobs: Sequence[Job],
    slow: float,
    trial: Callable[..., Run],
) -> System:
    """Something that answers one request at a time, with as many of the first jobs as take so many seconds.

    How long they take is judged by a trial with two of them.
    """
    tried = trial(jobs[:2])
    left, count = slow, 0
    while count < len(jobs):
        left -= jobs[count].max_tokens / tried.rate
        if left < 0 and count >= _FEWEST:
            break
        count += 1
    return System(name, run, jobs[:count])


def _ours(standing: Iterable[Standing]) -> dict[str, LoadedModel]:
    """The model of the highest rung of each precision, by its name."""
    found: dict[str, LoadedModel] = {}
    for one in standing:
        found[one.loaded.quantization or str(one.loaded.dtype).removeprefix("torch.")] = one.loaded
    return found


def _warm_up(system: System, jobs: Sequence[Job], failed: dict[str, str]) -> None:
    try:
        system.run(short_jobs(jobs), None)
    except Exception as error:
        failed[system.name] = reason(error)


def _jobs_of(systems: Sequence[System], name: str) -> Sequence[Job]:
    return next(system.jobs for system in systems if system.name == name)


def _row(
    rung: Rung, runs: Sequence[Run], shape: Shape, ceiling: Ceiling, one: Standing, true: Run
) -> RungRow:
    """Medians, and what the arithmetic says of the steps that took the median time."""
    run = middle(runs)
    works = [work for record in run.records if (work := shape.work(record)).bytes]
    moved, operations = sum(work.bytes for work in works), sum(work.operations for work in works)
    seconds = statistics.median(run.seconds for run in runs)
    kind = one.loaded.quantization or str(one.loaded.dtype).removeprefix("torch.")
    places = agreement(true, run)
    diverged = [place for place in places if place is not None]
    return RungRow(
        rung.name,
        rung.adds,
        requests=len(run.tokens),
        tokens_per_second=statistics.median(run.rate for run in runs),
        seconds=seconds,
        all_seconds=[run.seconds for run in runs],
        steps=len(works),
        bytes_per_step=moved / len(works),
        operations_per_step=operations / len(works),
        bytes_per_second=moved / seconds,
        operations_per_second=operations / seconds,
        floor_share=ceiling.floor(works, kind) / seconds,
        bookkeeping_share=one.bookkeeping_share,
        equal=1 - len(diverged) / len(places),
        first_divergence=statistics.median(diverged) if diverged else None,
    )


def _gains(row: RungRow, below: Sequence[RungRow], baseline: float | None) -> None:
    rate = row.tokens_per_second
    if below:
        row.gain_before = rate / below[-1].tokens_per_second
        row.gain_first = rate / below[0].tokens_per_second
    if baseline:
        row.gain_reference = rate / baseline


def _memory_of(load: Load, one: Standing, jobs: Sequence[Job]) -> int | None:
    """The most that a process holds which does nothing but this rung, in bytes (None: it failed)."""
    arguments = (load, one.rung, one.sizes, list(jobs), torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run_alone, *arguments).result()
        except (BrokenProcessPool, OSError, RuntimeError, ValueError):
            return None


def _run_alone(load: Load, rung: Rung, sizes: Sizes, jobs: Sequence[Job], threads: int) -> int | None:
    torch.set_num_threads(threads)
    loaded = load(**rung.weights)
    Standing(rung, loaded, sizes).run(jobs)
    return peak_memory(loaded.device)
