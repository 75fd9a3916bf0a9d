"""What the scheduler, the block pool and the trace cost without a model: tokens are made up."""

from __future__ import annotations

import dataclasses
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
        self.count = 0  # requests so far
        self.steps = 0
        for _ in range(running + waiting):
            self.add()
        # Spread the ends, so that at every step from here on some requests end and as many are admitted.
        while len(self.scheduler.running) < running:
            self.step()
        for i, request in enumerate(self.scheduler.running):
            request.max_len = len(request.token_ids) + 1 + i % _ANSWER

    def add(self) -> None:
        """Queue one more request."""
        self.count += 1
        prompt = [self.count * 7919 % 49_152] * _PROMPT
        self.scheduler.add(Request(str(self.count), prompt, SamplingParams(max_tokens=_ANSWER)))

    def step(self) -> float:
        """Take a step, and queue a request for each that ended; returns the seconds of the step itself."""
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
        """A token for each request that has computed all of its tokens."""
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
    """The median cost of a step with so many requests running and waiting."""
    books = Books(running, waiting)
    gc.collect()
    gc.freeze()  # the collector must not walk the queue, which belongs to the workload
    try:
        medians = [statistics.median(books.step() for _ in range(steps)) for _ in range(repeats)]
    finally:
        gc.unfreeze()
    seconds = statistics.median(medians)
    return Cell(running, waiting, seconds * 1e6, seconds * 1e6 / running)


@dataclass
class TraceCost:
    """Bytes per request and step that a trace of so many steps takes, in memory and on disk."""

    running: int
    steps: int
    memory: float
    disk: float


def measure_trace(running: int, steps: int) -> TraceCost:
    """The cost of a trace of so many steps."""
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
    memory = kept - tracemalloc.get_traced_memory()[0]  # what dropping the trace frees
    tracemalloc.stop()
    return TraceCost(running, steps, memory / rows, disk / rows)


@dataclass
class BookkeepingReport:
    """What `report` found: the cost of a step at each size, and that of the trace."""

    cells: list[Cell]
    trace: TraceCost

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{'running':>8}{'waiting':>9}{'us/step':>10}{'us/request/step':>17}   ({BLOCKS:,} blocks)"]
        lines += [
            f"{c.running:8d}{c.waiting:9d}{c.step_us:10.0f}{c.per_request_us:17.2f}" for c in self.cells
        ]
        t = self.trace
        lines.append(
            f"A trace of {t.steps:,} steps of {t.running} requests takes, per request and step, "
            f"{t.memory:.0f} bytes in memory and {t.disk:.0f} on disk."
        )
        return "\n".join(lines)


def report(*, trace_steps: int = 100_000, steps: int = 200) -> BookkeepingReport:
    """Measure all sizes, then the trace."""
    sizes = [(running, waiting) for running in RUNNING for waiting in WAITING]
    cells = [measure_steps(*size, steps=steps) for size in tqdm(sizes, desc="bookkeeping", unit="size")]
    return BookkeepingReport(cells, measure_trace(RUNNING[0], trace_steps))
