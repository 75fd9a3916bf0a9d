"""This engine and others on the same requests, in turn, each in a process of its own.

Every engine answers the same jobs with the same number of threads, and greedily, so that in fp32 the tokens
can be compared. What another engine is good at is left on: vLLM compiles, llama.cpp has a slot for each seat.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from labkit.analysis.reference import Run, agreement, compare_tokens
from labkit.analysis.workload import Job
from labkit.benchmark.engine.runs import System, reason, short_jobs, take_turns
from labkit.benchmark.peer_engines.processes import (
    Answering,
    Sizes,
    busy_core,
    cpu_seconds_of,
    llama_server,
    memory_of,
    worker,
)
from labkit.benchmark.peer_engines.table import Row, TableReport

PEERS = ("transformers", "vllm", "llamacpp")
PRECISIONS = ("float32", "bfloat16", "int8")
SEATS = (1, 8, 32)
FEW = 6  # requests that a single seat answers
_BUSY = ", busy"


@dataclass
class Entry:
    """An engine that has started, with so many seats: a line of the table, before it is measured."""

    engine: str
    precision: str
    seats: int
    answering: Answering
    adaptive: bool = True
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The engine, its precision and its seats, in words."""
        fixed = "" if self.adaptive else ", fixed threads"
        return f"{self.engine} {self.precision}, {self.seats} seat{'s' * (self.seats > 1)}{fixed}"

    def run(self, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
        """Answer all jobs, and note the processor seconds that it took."""
        before = cpu_seconds_of(self.answering.process)
        run = self._answer(jobs, bar)
        self.cpu_seconds.append(cpu_seconds_of(self.answering.process) - before)
        return run

    def run_busy(self, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
        """Answer all jobs beside a process that keeps a core busy."""
        with busy_core():
            return self._answer(jobs, bar)

    def _answer(self, jobs: Sequence[Job], bar: tqdm | None) -> Run:
        run = self.answering.answer(jobs, seats=self.seats, adaptive=self.adaptive)
        run.system = self.name
        if bar is not None:
            bar.update(len(jobs))
        return run


def read_peers(given: Sequence[str]) -> dict[str, list[str]]:
    """Read `--peer` as it was given: "transformers", "vllm=PYTHON" and "llamacpp=BINARY,GGUF".

    Raises:
        ValueError: For another name, or for another number of paths than it takes.
    """
    wanted = {"transformers": 0, "vllm": 1, "llamacpp": 2}
    peers: dict[str, list[str]] = {}
    for one in given:
        name, _, where = one.partition("=")
        paths = where.split(",") if where else []
        if name not in wanted:
            raise ValueError(f"--peer must be one of {', '.join(PEERS)}, not {name!r}")
        if len(paths) != wanted[name] or not all(paths):
            raise ValueError(f"--peer takes transformers, vllm=PYTHON or llamacpp=BINARY,GGUF, not {one!r}")
        peers[name] = paths
    return peers


def compare(
    jobs: Sequence[Job],
    peers: Mapping[str, Sequence[str]],
    sizes: Sizes,
    *,
    seats: Sequence[int] = SEATS,
    precisions: Sequence[str] = PRECISIONS,
    repeats: int = 3,
    busy: bool = False,
    progress: bool = True,
) -> TableReport:
    """Start all engines, warm them up, and measure them in turn.

    Args:
        jobs: The workload; a single seat answers the first `FEW`.
        peers: The paths of each other engine, as `read_peers` returns them.
        sizes: What the engines are built for.
        seats: The numbers of requests at once.
        precisions: What this engine computes in, and the others where they can.
        repeats: The number of runs of each; the median counts.
        busy: Whether each run is repeated beside a process that keeps a core busy, and this engine also
            measured with a fixed number of threads.
        progress: Whether a progress bar is shown.

    Raises:
        DifferentTokens: If this engine and `transformers` disagree on any token in fp32.
    """
    with ExitStack() as stack:
        entries, failed, versions = _start(stack, peers, sizes, seats, precisions, fixed=busy)
        for entry in list(entries):
            try:
                entry.run(short_jobs(jobs))
                entry.cpu_seconds.clear()
            except Exception as error:
                failed[entry.name] = reason(error)
                entries.remove(entry)
        if not entries:
            raise ValueError(f"no engine can be run: {'; '.join(failed.values())}")
        todo = [
            System(entry.name + suffix, run, jobs if entry.seats > 1 else jobs[:FEW], optional=True)
            for entry in entries
            for suffix, run in (("", entry.run), *([(_BUSY, entry.run_busy)] if busy else []))
        ]
        exact = [
            entry.name
            for entry in entries
            if entry.precision == "float32" and entry.engine in ("labkit", "transformers")
        ]

        def check(runs: dict[str, Run]) -> str:
            same = [runs[name] for name in exact if name in runs]
            return compare_tokens(same, torch.float32) if len(same) > 1 else "Nothing was compared."

        runs, broken, said = take_turns(todo, repeats, check=check, progress=progress)
        rows = _rows(entries, runs, exact)
    settings = {
        "model": sizes.model,
        "threads": sizes.threads,
        "requests": len(jobs),
        "prompt tokens": sum(len(job.prompt) for job in jobs),
        "output tokens": sum(job.max_tokens for job in jobs),
        "medians of": repeats,
        **versions,
    }
    return TableReport(settings, said, rows, failed | broken)


def _start(
    stack: ExitStack,
    peers: Mapping[str, Sequence[str]],
    sizes: Sizes,
    seats: Sequence[int],
    precisions: Sequence[str],
    *,
    fixed: bool,
) -> tuple[list[Entry], dict[str, str], dict[str, str]]:
    """Start the processes; returns the entries, why others did not start, and the versions of all."""
    entries: list[Entry] = []
    failed: dict[str, str] = {}
    versions: dict[str, str] = {}

    def start(
        name: str, precision: str, of: Callable[[], AbstractContextManager[Answering]], numbers: Sequence[int]
    ) -> None:
        try:
            answering = stack.enter_context(of())
        except (OSError, RuntimeError) as error:
            failed[f"{name} {precision}"] = reason(error)
            return
        versions.update(answering.versions)
        entries.extend(Entry(name, precision, number, answering) for number in numbers)
        if fixed and name == "labkit":
            entries.extend(Entry(name, precision, number, answering, adaptive=False) for number in numbers)

    for precision in precisions:
        if "transformers" in peers and precision != "int8":
            of = functools.partial(worker, "transformers", sys.executable, sizes, precision)
            start("transformers", precision, of, [1])
        of = functools.partial(worker, "labkit", sys.executable, sizes, precision)
        start("labkit", precision, of, seats)
        if "vllm" in peers and precision != "int8":
            of = functools.partial(worker, "vllm", peers["vllm"][0], sizes, precision)
            start("vllm", precision, of, seats)
    for number in seats if "llamacpp" in peers else ():
        one = Sizes(**vars(sizes) | {"seats": number})
        start("llamacpp", "gguf", functools.partial(llama_server, *peers["llamacpp"], one), [number])
    return entries, failed, versions


def _rows(entries: Sequence[Entry], runs: Mapping[str, list[Run]], exact: Sequence[str]) -> list[Row]:
    """The lines of the table; speed is compared with `transformers` in fp32 where it was measured."""
    rates = {name: statistics.median(run.rate for run in some) for name, some in runs.items() if some}
    baseline = rates.get("transformers float32, 1 seat")
    known = [runs[name][0] for name in exact if name in rates]
    true = max(known, key=lambda run: len(run.tokens)) if known else None
    rows = []
    for entry in entries:
        if entry.name not in rates:
            continue
        rate, some = rates[entry.name], runs[entry.name]
        places = agreement(true, some[0]) if true else []
        with contextlib.suppress(ProcessLookupError):
            memory = memory_of(entry.answering.process)
        rows.append(
            Row(
                entry.engine,
                entry.precision,
                entry.seats,
                entry.name,
                entry.adaptive,
                requests=len(some[0].tokens),
                tokens_per_second=rate,
                gain=rate / baseline if baseline else None,
                cpu_seconds_per_token=statistics.median(entry.cpu_seconds) / sum(map(len, some[0].tokens)),
                memory=memory,
                equal=sum(place is None for place in places) if places else None,
                busy=rates.get(entry.name + _BUSY),
            )
        )
    return rows
