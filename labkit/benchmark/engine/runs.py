"""How each system is run: all jobs at once through an engine, and several systems in turn."""

from __future__ import annotations

import contextlib
import gc
import io
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from tqdm.auto import tqdm

from labkit.analysis.reference import Run
from labkit.analysis.workload import Job
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams
from labkit.trace.memory_use import kv_usage

# -- one system -----------------------------------------------------------------------------------


def run_engine(
    config: EngineConfig,
    jobs: Sequence[Job],
    bar: tqdm | None = None,
    *,
    watching: Callable[[Engine], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Run:
    """Answer all jobs at once with a fresh engine.

    Args:
        config: The engine's configuration.
        jobs: The prompts, and how many tokens to answer with.
        bar: A progress bar that counts answers.
        watching: A function that gives a context around the engine's steps, for instance `Meter.watching`.

    Raises:
        RuntimeError: If a request failed.
    """
    gc.collect()  # an engine that is no longer used may still hold its pool
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the same at every repeat
        engine = Engine(config)
    begin = time.perf_counter()
    ids = [engine.add_request(job.prompt, exactly(job.max_tokens)) for job in jobs]
    with watching(engine):
        while engine.has_unfinished:
            record = engine.step()
            if bar is not None:
                bar.update(len(record.finished))
    seconds = time.perf_counter() - begin
    outputs = [engine.outputs[i] for i in ids]
    check_answers(outputs, f"of the {config.scheduler} run")
    records = engine.trace.records
    return Run(
        config.scheduler,
        seconds,
        [output.token_ids for output in outputs],
        [[t - begin for t in output.metrics.token_times] for output in outputs],
        len(records),
        sum(record.total_tokens for record in records),
        statistics.mean(kv_usage(record.free_blocks, engine.pool.num_blocks) for record in records),
        records,
    )


def exactly(max_tokens: int) -> SamplingParams:
    """Sampling parameters for a greedy answer of exactly so many tokens."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def check_answers(outputs: Iterable[RequestOutput], where: str) -> None:
    """Raise `RuntimeError` if a request failed; `where` says which run it belongs to."""
    for output in outputs:
        if output.error:
            raise RuntimeError(f"request {output.request_id} {where} failed: {output.error}")


# -- several in turn ------------------------------------------------------------------------------


@dataclass
class System:
    """Something to measure: `run(jobs, bar)` answers all jobs and tells the bar of each answer.

    A system that is `optional` may fail. Then the report has a reason in place of figures.
    """

    name: str
    run: Callable[[Sequence[Job], tqdm | None], Run]
    jobs: Sequence[Job]
    optional: bool = False


class Turns(NamedTuple):
    """The runs of each system, why those failed that are optional, and what the last check said."""

    runs: dict[str, list[Run]]
    failed: dict[str, str]
    same_tokens: str


def take_turns(
    systems: Sequence[System],
    repeats: int,
    *,
    check: Callable[[dict[str, Run]], str],
    progress: bool = True,
) -> Turns:
    """Run each system `repeats` times, in turn, so that a slow minute hits all alike.

    Args:
        systems: What is measured.
        repeats: The number of rounds.
        check: A function that looks at the runs of each round. It says in a sentence how far their tokens
            agree, and raises an error if they must not be reported.
        progress: Whether a progress bar is shown.
    """
    runs: dict[str, list[Run]] = {system.name: [] for system in systems}
    failed: dict[str, str] = {}
    said = ""
    total = repeats * sum(len(system.jobs) for system in systems)
    with tqdm(total=total, unit="answer", disable=not progress) as bar:
        for repeat in range(repeats):
            for system in systems:
                if system.name in failed:
                    bar.update(len(system.jobs))
                    continue
                bar.set_description(f"{system.name} {repeat + 1}/{repeats}")
                try:
                    runs[system.name].append(system.run(system.jobs, bar))
                except Exception as error:
                    if not system.optional:
                        raise
                    failed[system.name] = reason(error)
                    runs.pop(system.name)
            said = check({name: some[repeat] for name, some in runs.items()})
    return Turns(runs, failed, said)


def reason(error: BaseException) -> str:
    """An error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}".removesuffix(": ")


def short_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The beginnings of some jobs, to warm up with."""
    return [Job(job.prompt[:32], 4) for job in jobs[:4]]


def middle(runs: Sequence[Run]) -> Run:
    """The repeat whose time is nearest to the median."""
    seconds = statistics.median(run.seconds for run in runs)
    return min(runs, key=lambda run: abs(run.seconds - seconds))


# -- the settings of a report ---------------------------------------------------------------------


def describe(loaded: LoadedModel, jobs: Sequence[Job], more: dict[str, Any]) -> dict[str, Any]:
    """The model, the workload, `more`, and the versions of what the figures depend on."""
    return {
        "model": loaded.name,
        "dtype": dtype_name(loaded.dtype),
        "device": device_name(loaded.device),
        "requests": len(jobs),
        "prompt tokens": sum(len(job.prompt) for job in jobs),
        "output tokens": sum(job.max_tokens for job in jobs),
        **more,
        **versions(),
    }


def versions() -> dict[str, str]:
    """The versions of torch, transformers and Python."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as in "float32"."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} ({capability}, {torch.get_num_threads()} threads)"
