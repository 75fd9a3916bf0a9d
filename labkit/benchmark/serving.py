"""The three schedulers and `transformers`, on the same weights, the same jobs and in the same run.

Correctness comes first: in fp32 all of them must give the same tokens, or there is no table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from labkit.benchmark.workload import Job
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.request import SamplingParams
from labkit.tiny import tiny_random
from labkit.weights import TINY, LoadedModel, find

REFERENCE = "transformers"
OURS = ("naive", "static", "continuous")


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


@dataclass
class Row:
    """A line of the table: medians over the repeats."""

    system: str
    tokens_per_second: float
    speedup: float
    seconds: float
    steps: int | None
    tokens_per_step: float | None
    kv_usage: float | None
    ttft_median: float
    ttft_p95: float
    itl_median: float
    itl_p95: float

    def cells(self) -> list[str]:
        inside = ["-"] * 3
        if self.steps:
            inside = [str(self.steps), f"{self.tokens_per_step:.1f}", f"{self.kv_usage:.0%}"]
        return [
            self.system,
            f"{self.tokens_per_second:.1f}",
            f"{self.speedup:.2f}x",
            f"{self.seconds:.1f}",
            *inside,
            f"{self.ttft_median:.2f}",
            f"{self.ttft_p95:.2f}",
            f"{self.itl_median * 1e3:.1f}",
            f"{self.itl_p95 * 1e3:.1f}",
        ]


@dataclass
class Report:
    settings: dict[str, Any]
    rows: list[Row]
    same_tokens: str
    all_seconds: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = ("", "tokens/s", "speed-up", "seconds", "steps", "tok/step", "KV usage")
        head += ("TTFT s", "p95", "ITL ms", "p95")
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return "\n".join(
            (settings, self.same_tokens, _line(head), *(_line(row.cells()) for row in self.rows))
        )


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:12}" + "".join(f"{cell:>9}" for cell in cells[1:])


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


class _Clock(BaseStreamer):
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
        clock = _Clock()
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


def run_engine(config: EngineConfig, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
    """All jobs at once through a fresh engine."""
    engine = Engine(config)
    begin = time.perf_counter()
    ids = [
        engine.add_request(job.prompt, SamplingParams(max_tokens=job.max_tokens, ignore_eos=True))
        for job in jobs
    ]
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
    )


def measure(
    loaded: LoadedModel,
    reference: PreTrainedModel | None,
    jobs: Sequence[Job],
    *,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
    repeats: int = 3,
    systems: Sequence[str] = OURS,
    progress: bool = True,
) -> Report:
    """Warm up, check, then time each system `repeats` times, in turn, so that a slow minute hits all alike.

    Raises:
        DifferentTokens: if, in fp32, two systems disagree on any token.
    """

    def once(system: str, some: Sequence[Job], bar: tqdm | None = None) -> Run:
        if system == REFERENCE:
            return run_reference(reference, some, bar)
        config = EngineConfig(
            model=loaded,
            scheduler=system,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_seqs, max_num_batched_tokens),
        )
        return run_engine(config, some, bar)

    names = [*([REFERENCE] if reference is not None else []), *systems]
    short = [Job(job.prompt[:32], 4) for job in jobs[:4]]
    for name in names:
        once(name, short)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    same = ""
    total = len(names) * repeats * len(jobs)
    with tqdm(total=total, unit="answer", disable=not progress) as bar:
        for repeat in range(repeats):
            for name in names:
                bar.set_description(f"{name} {repeat + 1}/{repeats}")
                runs[name].append(once(name, jobs, bar))
            if repeat == 0:
                same = compare_tokens([runs[name][0] for name in names], loaded.dtype)
    baseline = statistics.median(run.seconds for run in runs[names[0]])
    settings = {
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device_name(loaded.device),
        "requests": len(jobs),
        "prompt tokens": sum(len(job.prompt) for job in jobs),
        "output tokens": sum(job.max_tokens for job in jobs),
        "seats": max_num_seqs,
        "token budget": max(max_num_seqs, max_num_batched_tokens),
        "medians of": repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return Report(
        settings,
        [_row(runs[name], baseline) for name in names],
        same,
        {name: [run.seconds for run in runs[name]] for name in names},
    )


def compare_tokens(runs: Sequence[Run], dtype: torch.dtype) -> str:
    """One sentence on how far the systems agree; in fp32 anything but "all the same" is an error."""
    first = runs[0]
    for run in runs[1:]:
        pairs = list(zip(first.tokens, run.tokens, strict=True))
        differ = [i for i, (a, b) in enumerate(pairs) if a != b]
        if not differ:
            continue
        if dtype == torch.float32:
            raise DifferentTokens(
                f"{run.system} and {first.system} disagree on {len(differ)} of {len(pairs)} answers "
                f"(first: number {differ[0]}); no speed is reported"
            )
        same = len(pairs) - len(differ)
        return f"In {dtype}, {run.system} and {first.system} give {same} of {len(pairs)} equal answers."
    return f"All {len(runs)} systems gave the same {sum(map(len, first.tokens))} tokens."


def _row(runs: Sequence[Run], baseline: float) -> Row:
    seconds = statistics.median(run.seconds for run in runs)
    run = min(runs, key=lambda run: abs(run.seconds - seconds))  # the repeat that is the median
    generated = sum(map(len, run.tokens))
    ttft = [times[0] for times in run.token_times]
    gaps = [b - a for times in run.token_times for a, b in itertools.pairwise(times)]
    return Row(
        run.system,
        generated / seconds,
        baseline / seconds,
        seconds,
        run.steps,
        run.computed / run.steps if run.steps and run.computed else None,
        run.kv_usage,
        statistics.median(ttft),
        percentile(ttft, 95),
        statistics.median(gaps),
        percentile(gaps, 95),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
