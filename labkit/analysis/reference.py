"""What the ways to answer have in common: how each is run, in turn, and how their answers are compared."""

from __future__ import annotations

import contextlib
import gc
import io
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from labkit.analysis.workload import Job
from labkit.benchmark.engine.meter import Meter
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.hub import TINY, find
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_random
from labkit.sampling_params import SamplingParams
from labkit.trace.records import StepRecord

REFERENCE = "transformers"


class DifferentTokens(RuntimeError):
    """Two ways to compute the same answers gave different ones: no speed is worth a wrong answer."""


@dataclass
class Run:
    """One system's way through all jobs. Times in seconds; per-token times count from the common start."""

    system: str
    seconds: float
    tokens: list[list[int]]
    token_times: list[list[float]]
    steps: int | None = None
    computed: int | None = None
    kv_usage: float | None = None
    records: Sequence[StepRecord] = ()

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


@dataclass
class System:
    """Something to be measured: `run(jobs, bar)` answers all jobs and tells the bar of each answer.

    One that is `optional` may fail: then it has a reason in place of figures.
    """

    name: str
    run: Callable[[Sequence[Job], tqdm | None], Run]
    jobs: Sequence[Job]
    optional: bool = False


def reference_model(loaded: LoadedModel, model: Any) -> PreTrainedModel:
    """The same weights as `transformers` runs them, on the same device and in the same dtype."""
    if loaded.name == TINY:
        config, tensors, _ = tiny_random()
        reference = LlamaForCausalLM(config)
        reference.load_state_dict(tensors)
        reference = reference.to(loaded.dtype)
    else:
        reference = AutoModelForCausalLM.from_pretrained(find(model, say=None), dtype=loaded.dtype)
    reference = reference.to(loaded.device).eval()
    reference.generation_config = transformers.GenerationConfig(do_sample=False)  # and no end of sequence
    return reference


class Clock(BaseStreamer):
    """Notes when each token of a `generate` comes out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def run_reference(model: PreTrainedModel, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
    """`generate`, one request at a time: what one would otherwise write."""
    begin = time.perf_counter()
    tokens, times = [], []
    for job in jobs:
        clock = Clock()
        prompt = torch.tensor([job.prompt], device=model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job.max_tokens,
            do_sample=False,
            streamer=clock,
        )
        tokens.append(out[0, len(job.prompt) :].tolist())
        times.append([t - begin for t in clock.times[1:]])  # the first is the prompt
        if bar is not None:
            bar.update()
    return Run(REFERENCE, time.perf_counter() - begin, tokens, times)


def run_engine(
    config: EngineConfig, jobs: Sequence[Job], bar: tqdm | None = None, *, meter: Meter | None = None
) -> Run:
    """All jobs at once through a fresh engine, watched by a meter if there is one."""
    gc.collect()  # an engine that is done with may still hold its pool
    with contextlib.redirect_stdout(io.StringIO()):  # what it chose and why; the same at every repeat
        engine = Engine(config)
    begin = time.perf_counter()
    ids = [
        engine.add_request(job.prompt, SamplingParams(max_tokens=job.max_tokens, ignore_eos=True))
        for job in jobs
    ]
    with meter.watching(engine) if meter else contextlib.nullcontext():
        while engine.has_unfinished:
            record = engine.step()
            if bar is not None:
                bar.update(len(record.finished))
    seconds = time.perf_counter() - begin
    outputs = [engine.outputs[i] for i in ids]
    for output in outputs:
        if output.error:
            raise RuntimeError(
                f"request {output.request_id} of the {config.scheduler} run failed: {output.error}"
            )
    records = engine.trace.records
    return Run(
        config.scheduler,
        seconds,
        [output.token_ids for output in outputs],
        [[t - begin for t in output.metrics.token_times] for output in outputs],
        len(records),
        sum(record.total_tokens for record in records),
        statistics.mean(1 - record.free_blocks / engine.pool.num_blocks for record in records),
        records,
    )


def take_turns(
    systems: Sequence[System],
    repeats: int,
    *,
    check: Callable[[dict[str, Run]], None],
    progress: bool = True,
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Run each system `repeats` times, in turn, so that a slow minute hits all alike.

    Args:
        check: looks at the runs of each round, and raises if they are not to be reported.

    Returns:
        The runs of each system, and why those failed that were allowed to.
    """
    runs: dict[str, list[Run]] = {system.name: [] for system in systems}
    failed: dict[str, str] = {}
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
            check({name: some[repeat] for name, some in runs.items()})
    return runs, failed


def reason(error: BaseException) -> str:
    """An error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}".removesuffix(": ")


def short_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Some to warm up with."""
    return [Job(job.prompt[:32], 4) for job in jobs[:4]]


def describe(loaded: LoadedModel, jobs: Sequence[Job]) -> dict[str, Any]:
    """The model and the workload, for the settings of a report."""
    return {
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device_name(loaded.device),
        "requests": len(jobs),
        "prompt tokens": sum(len(job.prompt) for job in jobs),
        "output tokens": sum(job.max_tokens for job in jobs),
    }


def versions() -> dict[str, str]:
    """Of what the figures hang on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def agreement(true: Run, other: Run) -> list[int | None]:
    """For each answer that both gave, the place of the first token that differs (None: all are equal).

    A run over the first few of the jobs is held against those of a longer one.
    """
    return [_divergence(a, b) for a, b in zip(true.tokens, other.tokens, strict=False)]


def _divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    if list(a) == list(b):
        return None
    places = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(places, min(len(a), len(b)))  # or one ends where the other goes on


def compare_tokens(runs: Sequence[Run], dtype: torch.dtype) -> str:
    """One sentence on how far the systems agree; in fp32 anything but "all the same" is an error."""
    first = max(runs, key=lambda run: len(run.tokens))  # some may have run on the first few jobs only
    for run in runs:
        places = agreement(first, run)
        differ = [i for i, place in enumerate(places) if place is not None]
        if not differ:
            continue
        if dtype == torch.float32:
            raise DifferentTokens(
                f"{run.system} and {first.system} disagree on {len(differ)} of {len(places)} answers "
                f"(first: number {differ[0]}); no speed is reported"
            )
        same = len(places) - len(differ)
        return f"In {dtype}, {run.system} and {first.system} give {same} of {len(places)} equal answers."
    return f"All {len(runs)} systems gave the same {sum(map(len, first.tokens))} tokens."


def middle(runs: Sequence[Run]) -> Run:
    """The repeat that took the median time, or is nearest to it."""
    seconds = statistics.median(run.seconds for run in runs)
    return min(runs, key=lambda run: abs(run.seconds - seconds))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} ({capability}, {torch.get_num_threads()} threads)"
