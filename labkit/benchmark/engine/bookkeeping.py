"""What the scheduler, the pool and the trace cost by themselves, with made-up tokens in place of a model."""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan, StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.sampling_params import SamplingParams
from labkit.trace.records import TraceMeta
from labkit.trace.trace import Trace

RUNNING = (32, 256, 1024)
WAITING = (100, 10_000, 100_000)
BLOCKS, BLOCK_SIZE = 100_000, 16
_PROMPT, _ANSWER = 48, 64


class Books:
    """A scheduler kept at full seats, with a queue of a given length behind it."""

    def __init__(self, running: int, waiting: int, *, blocks: int = BLOCKS) -> None:
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        limits = dict(max_num_seqs=running, max_num_batched_tokens=running + 2048)
        self.scheduler = Scheduler(self.pool, **limits)
        self.trace = Trace(TraceMeta(blocks, BLOCK_SIZE, **limits))
        self.count = 0
        self.steps = 0
        for _ in range(running + waiting):
            self.add()
        # Spread the ends: from here on some requests end, and as many are admitted, at every step.
        while len(self.scheduler.running) < running:
            self.step()
        for i, request in enumerate(self.scheduler.running):
            request.max_len = len(request.token_ids) + 1 + i % _ANSWER

    def add(self) -> None:
        self.count += 1
        prompt = [self.count * 7919 % 49_152] * _PROMPT
        self.scheduler.add(Request(str(self.count), prompt, SamplingParams(max_tokens=_ANSWER)))

    def step(self) -> float:
        """One step, and one arrival for each end; returns the seconds of the step itself."""
        begin = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        result = StepResult(self.made_up(plan))
        made = time.perf_counter()
        self.scheduler.commit(plan, result)
        record = record_step(self.steps, plan, result, self.scheduler, time=made, seconds=made - begin)
        self.trace.append(record)
        end = time.perf_counter()
        self.steps += 1
        for _ in record.finished:
            self.add()
        return end - made + planned - begin

    def made_up(self, plan: StepPlan) -> list[tuple[int, ...]]:
        token = self.steps * 31 % 49_152
        return [
            (token,) if start + n == len(request.token_ids) else ()
            for request, start, n in zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ]


@dataclass
class Cell:
    """Medians over the steps of one size, in microseconds."""

    running: int
    waiting: int
    step_us: float
    per_request_us: float


def measure_steps(running: int, waiting: int, *, steps: int = 200, repeats: int = 3) -> Cell:
    """Median cost of a step with so many requests running and waiting."""
    books = Books(running, waiting)
    gc.collect()
    gc.freeze()  # the queue is the workload's, not the step's: keep the collector from walking it
    try:
        medians = [statistics.median(books.step() for _ in range(steps)) for _ in range(repeats)]
    finally:
        gc.unfreeze()
    seconds = statistics.median(medians)
    return Cell(running, waiting, seconds * 1e6, seconds * 1e6 / running)


def measure_trace(running: int, steps: int) -> dict[str, Any]:
    """Bytes per request and step that a trace of so many steps takes, in memory and on disk."""
    books = Books(running, 100)
    rows = 0
    tracemalloc.start()
    for _ in range(steps):
        books.step()
        rows += len(books.trace[-1].requests)
    disk = sum(len(line) + 1 for line in books.trace.lines())
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    books.trace = Trace(books.trace.meta)
    gc.collect()
    memory = kept - tracemalloc.get_traced_memory()[0]  # what letting go of the trace gives back
    tracemalloc.stop()
    return {"running": running, "steps": steps, "memory": memory / rows, "disk": disk / rows}


def report(*, trace_steps: int = 100_000, steps: int = 200) -> dict[str, Any]:
    """All sizes, then the trace."""
    sizes = [(running, waiting) for running in RUNNING for waiting in WAITING]
    cells = [vars(measure_steps(*size, steps=steps)) for size in tqdm(sizes, desc="bookkeeping", unit="size")]
    return {"cells": cells, "trace": measure_trace(RUNNING[0], trace_steps)}


def table(figures: dict[str, Any]) -> str:
    """The figures of `report` as text."""
    lines = [f"{'running':>8}{'waiting':>9}{'us/step':>10}{'us/request/step':>17}   ({BLOCKS:,} blocks)"]
    lines += [
        f"{c['running']:8d}{c['waiting']:9d}{c['step_us']:10.0f}{c['per_request_us']:17.2f}"
        for c in figures["cells"]
    ]
    t = figures["trace"]
    lines.append(
        f"A trace of {t['steps']:,} steps of {t['running']} requests takes, per request and step, "
        f"{t['memory']:.0f} bytes in memory and {t['disk']:.0f} on disk."
    )
    return "\n".join(lines)
