"""What `transformers` answers with the same weights, and how answers are compared with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from labkit.analysis.workload import Job
from labkit.models.hub import TINY, find
from labkit.models.load import LoadedModel
from labkit.models.tiny import tiny_random
from labkit.trace.records import StepRecord

REFERENCE = "transformers"


class DifferentTokens(RuntimeError):
    """Two ways to compute the same answers gave different ones: no speed is worth a wrong answer."""


@dataclass
class Run:
    """How one system answered all jobs. Times are in seconds; those of tokens count from the common start."""

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


# -- transformers ---------------------------------------------------------------------------------


def reference_model(loaded: LoadedModel, model: Any) -> PreTrainedModel:
    """Return the same weights as a model of `transformers`, on the same device and in the same dtype."""
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


class TokenTimes(BaseStreamer):
    """Notes when each token of a `generate` comes out. The first entry of `times` is that of the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def run_reference(model: PreTrainedModel, jobs: Sequence[Job], bar: tqdm | None = None) -> Run:
    """Answer the jobs with `generate`, one after the other, as one would without an engine."""
    begin = time.perf_counter()
    tokens, times = [], []
    for job in jobs:
        streamer = TokenTimes()
        prompt = torch.tensor([job.prompt], device=model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job.max_tokens,
            do_sample=False,
            streamer=streamer,
        )
        tokens.append(out[0, len(job.prompt) :].tolist())
        times.append([t - begin for t in streamer.times[1:]])
        if bar is not None:
            bar.update()
    return Run(REFERENCE, time.perf_counter() - begin, tokens, times)


# -- are the answers the same? --------------------------------------------------------------------


def agreement(true: Run, other: Run) -> list[int | None]:
    """Return for each answer that both gave where its first different token is (None: all are equal).

    A run over the first few of the jobs is compared with the first few answers of a longer one.
    """
    return [_divergence(a, b) for a, b in zip(true.tokens, other.tokens, strict=False)]


def _divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    if list(a) == list(b):
        return None
    places = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(places, min(len(a), len(b)))  # or one ends where the other continues


def compare_tokens(runs: Sequence[Run], dtype: torch.dtype) -> str:
    """Say in one sentence how far the systems agree. In fp32, any difference raises `DifferentTokens`."""
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
