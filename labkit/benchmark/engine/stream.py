"""A steady stream: so many requests that the seats stay full, compared with `transformers` one by one."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from labkit.analysis.reference import REFERENCE, compare_tokens, run_reference
from labkit.analysis.workload import Job
from labkit.benchmark.engine.peers import PeerRow, peer_row, run_ours
from labkit.benchmark.engine.runs import System, describe, dtype_name, short_jobs, take_turns
from labkit.benchmark.report import Report
from labkit.models.load import LoadedModel

REQUESTS = 128
REFERENCE_REQUESTS = 16  # one by one takes long, and more would change nothing


@dataclass
class StreamReport(Report):
    """What `stream` found."""

    same_tokens: str
    rows: list[PeerRow]

    def __str__(self) -> str:
        lines = [self.settings_line, self.same_tokens]
        lines.append(f"{'':24}{'tokens/s':>10}{'x transf.':>11}{'seconds':>9}{'requests':>10}{'equal':>8}")
        for row in self.rows:
            lines.append(
                f"{row.system:24}{row.tokens_per_second:10.1f}{row.gain:10.2f}x{row.seconds:9.1f}"
                f"{row.requests:10}{row.equal:8.0%}"
            )
        return "\n".join(lines)


def stream(
    load: Callable[..., LoadedModel],
    jobs: Sequence[Job],
    *,
    reference: Callable[[LoadedModel], PreTrainedModel],
    seats: int = 32,
    budget: int = 512,
    repeats: int = 3,
    progress: bool = True,
) -> StreamReport:
    """Time the stream in full precision and in int8, each in turn with `transformers` on its first requests.

    Raises:
        DifferentTokens: If, in fp32, the engine and `transformers` disagree on any token.
        ValueError: If there is no int8 for this model or device.
    """
    full = load()
    models = {dtype_name(full.dtype): full, "int8": load(quantization="int8")}
    few = jobs[:REFERENCE_REQUESTS]
    todo = [System(REFERENCE, functools.partial(run_reference, reference(full)), few)]
    for precision, loaded in models.items():
        name = f"labkit {precision}"
        todo.append(System(name, functools.partial(run_ours, name, loaded, seats, budget), jobs))
    exact = todo[1].name
    for system in todo:
        system.run(short_jobs(jobs), None)
    runs, _, same = take_turns(
        todo,
        repeats,
        check=lambda runs: compare_tokens([runs[exact], runs[REFERENCE]], full.dtype),
        progress=progress,
    )
    baseline = statistics.median(run.rate for run in runs[REFERENCE])
    rows = [peer_row(name, some, runs[exact][0], baseline) for name, some in runs.items()]
    more = {"seats": seats, "token budget": budget, "medians of": repeats}
    return StreamReport(describe(full, jobs, more), same, rows)
