"""How far half precision is from fp32, on the same weights and text.

Greedy tokens in half precision may differ from those in fp32 wherever the two likeliest are close, so
equality of tokens is no fair question there. Teacher forcing is: both see fp32's own answer, and the logits
at each place are compared. How often the likeliest token changes, and how close the top two were where it
did, says whether the difference is rounding or a mistake. What a precision costs in the end, int8 among
them, is said by its perplexity on a text that none of the models has written (`perplexity.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from labkit.analysis.workload import Job, prose
from labkit.benchmark.engine import perplexity
from labkit.config import EngineConfig
from labkit.core.model import Transformer
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.models.teacher_forcing import teacher_forced
from labkit.sampling_params import SamplingParams

DTYPES = ("bfloat16", "float16")
# The mean error of a logit, as a share of the logits' standard deviation. A mistake in the model's code is
# an error near 1; rounding to 8 bits of mantissa (bf16) or 11 (fp16) through 30 layers is far below.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.01}


@dataclass
class Closeness:
    """One dtype against fp32. Gaps are between the two likeliest logits, in fp32."""

    dtype: str
    positions: int
    mean_error: float  # of a logit, as a share of the logits' standard deviation
    max_error: float  # the largest, likewise
    top1_agreement: float
    gap_where_different: float | None  # the median
    gap_everywhere: float
    answers: int
    diverged: int  # greedy answers that leave fp32's somewhere
    first_divergence: float | None  # the median place, in tokens

    @property
    def within(self) -> bool:
        return self.mean_error <= TOLERANCE[self.dtype]


def answers(model: LoadedModel, jobs: Sequence[Job]) -> list[list[int]]:
    """Greedy answers to all jobs, computed together."""
    engine = Engine(EngineConfig(model=model))
    ids = [
        engine.add_request(job.prompt, SamplingParams(max_tokens=job.max_tokens, ignore_eos=True))
        for job in jobs
    ]
    while engine.has_unfinished:
        engine.step()
    for output in engine.outputs.values():
        if output.error:
            raise RuntimeError(f"request {output.request_id} failed in {model.dtype}: {output.error}")
    return [engine.outputs[i].token_ids for i in ids]


def compare(full: LoadedModel, half: LoadedModel, jobs: Sequence[Job]) -> Closeness:
    """Hold a half-precision model against the fp32 one."""
    true_answers, half_answers = answers(full, jobs), answers(half, jobs)
    errors, largest, same, gaps, gaps_different = [], 0.0, 0, [], []
    for job, answer in zip(jobs, true_answers, strict=True):
        tokens = [*job.prompt, *answer[:-1]]
        true = teacher_forced(full.module, tokens)
        rounded = teacher_forced(half.module, tokens).to(true.device)
        off = (rounded - true).abs() / true.std()
        errors.append(off.mean(dim=-1))
        largest = max(largest, float(off.max()))
        top = true.topk(2).values
        gap = top[:, 0] - top[:, 1]
        agree = rounded.argmax(-1) == true.argmax(-1)
        same += int(agree.sum())
        gaps += gap.tolist()
        gaps_different += gap[~agree].tolist()
    places = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None)
        for x, y in zip(true_answers, half_answers, strict=True)
    ]
    diverged = [place for place in places if place is not None]
    return Closeness(
        str(half.dtype).removeprefix("torch."),
        len(gaps),
        float(torch.cat(errors).mean()),
        largest,
        same / len(gaps),
        statistics.median(gaps_different) if gaps_different else None,
        statistics.median(gaps),
        len(jobs),
        len(diverged),
        statistics.median(diverged) if diverged else None,
    )


@dataclass
class Precisions:
    """Every precision against fp32: half precision logit by logit, all of them on the text."""

    closeness: list[Closeness]
    perplexity: list[perplexity.Perplexity]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return table(self.closeness) + "\n\n" + perplexity.table(self.perplexity)


def report(model: str, device: str, jobs_of: Any, *, text: str | None = None) -> Precisions:
    """Every precision against fp32, one after the other in memory.

    Args:
        jobs_of: `jobs_of(tokenizer)` makes the jobs.
        text: to read; None is all of the prose in the package.

    Raises:
        ModelError: for a model that cannot be had in one of the precisions.
    """
    full = load_model(model, dtype="float32", device=device)
    jobs = jobs_of(full.tokenizer)
    closeness: list[Closeness] = []

    def others() -> Iterator[tuple[str, LoadedModel]]:
        for dtype in DTYPES:
            half = load_model(model, dtype=dtype, device=device)
            closeness.append(compare(full, half, jobs))
            yield dtype, half
        if isinstance(full.module, Transformer):  # of others there is no int8
            yield "int8", load_model(model, device=device, quantization="int8")

    token_ids = full.tokenizer.encode(prose() if text is None else text, add_special_tokens=False)
    rows = perplexity.compare_text(full, others(), token_ids)
    return Precisions(closeness, rows)


def table(rows: Sequence[Closeness]) -> str:
    """A few lines for each dtype."""
    lines = []
    for r in rows:
        verdict = "within" if r.within else "OUTSIDE"
        lines += [
            f"{r.dtype}: mean error of a logit {r.mean_error:.2%} of their standard deviation ({verdict} the "
            f"tolerance of {TOLERANCE[r.dtype]:.0%}), largest {r.max_error:.1%}, over {r.positions:,} places",
            f"  the likeliest token is the same at {r.top1_agreement:.2%} of them",
        ]
        if r.gap_where_different is not None:
            lines.append(
                f"  where it is not, fp32's top two were {r.gap_where_different:.3f} apart (median), against "
                f"{r.gap_everywhere:.2f} everywhere"
            )
        lines.append(
            f"  greedy answers that leave fp32's: {r.diverged} of {r.answers}"
            + (f", the median at token {r.first_divergence:.0f}" if r.diverged else "")
        )
    return "\n".join(lines)
