"""How far half precision is from fp32, on the same weights and text.

Greedy tokens in half precision may differ from those in fp32 wherever the two likeliest are close, so equal
tokens are too much to ask there. Teacher forcing is a fair test: both models see fp32's own answer, and the
logits at each place are compared. How often the likeliest token changes, and how close the top two were
where it did, says whether the difference is rounding or a mistake. What a precision, int8 among them, costs
in the end is measured by perplexity on a text that none of the models has written (`perplexity.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from labkit.analysis.workload import Job, prose
from labkit.benchmark.engine import perplexity
from labkit.benchmark.engine.runs import dtype_name, run_engine
from labkit.config import EngineConfig
from labkit.core.model import Transformer
from labkit.models.load import LoadedModel, load_model
from labkit.models.teacher_forcing import teacher_forced

DTYPES = ("bfloat16", "float16")
# The mean error of a logit, as a share of the logits' standard deviation. A mistake in the model's code is
# an error near 1; rounding to 8 bits of mantissa (bf16) or 11 (fp16) through 30 layers is far below.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.01}


@dataclass
class Closeness:
    """One dtype compared with fp32. Gaps are between the two likeliest logits, in fp32."""

    dtype: str
    positions: int
    mean_error: float  # of a logit, as a share of the logits' standard deviation
    max_error: float  # the largest, likewise
    top1_agreement: float
    gap_where_different: float | None  # the median
    gap_everywhere: float
    answers: int
    diverged: int  # greedy answers that differ from fp32's somewhere
    first_divergence: float | None  # the median place where they begin to, in tokens

    @property
    def within(self) -> bool:
        """Whether the mean error is within the tolerance."""
        return self.mean_error <= TOLERANCE[self.dtype]


def compare(full: LoadedModel, half: LoadedModel, jobs: Sequence[Job]) -> Closeness:
    """Compare a half-precision model with the fp32 one."""
    true_answers, half_answers = (run_engine(EngineConfig(model=one), jobs).tokens for one in (full, half))
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
        dtype_name(half.dtype),
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
    """Every precision compared with fp32: half precision logit by logit, all of them on the text."""

    closeness: list[Closeness]
    perplexity: list[perplexity.Perplexity]

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return table(self.closeness) + "\n\n" + perplexity.table(self.perplexity)


def report(model: str, device: str, jobs_of: Any, *, text: str | None = None) -> Precisions:
    """Compare every precision with fp32. They are in memory one after the other.

    Args:
        model, device: As in `load_model`.
        jobs_of: A function of the tokenizer that makes the jobs.
        text: The text to read; None is all of the prose in the package.

    Raises:
        ModelError: If the model does not exist in one of the precisions.
    """
    full = load_model(model, dtype="float32", device=device)
    jobs = jobs_of(full.tokenizer)
    closeness: list[Closeness] = []

    def others() -> Iterator[tuple[str, LoadedModel]]:
        for dtype in DTYPES:
            half = load_model(model, dtype=dtype, device=device)
            closeness.append(compare(full, half, jobs))
            yield dtype, half
        if isinstance(full.module, Transformer):  # there is no int8 of others
            yield "int8", load_model(model, device=device, quantization="int8")

    token_ids = full.tokenizer.encode(prose() if text is None else text, add_special_tokens=False)
    rows = perplexity.compare_text(full, others(), token_ids, int8_kv=isinstance(full.module, Transformer))
    return Precisions(closeness, rows)


def table(rows: Sequence[Closeness]) -> str:
    """A table with a few lines for each dtype."""
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
