"""How far half precision is from fp32, on the same weights and text.

Greedy tokens in half precision may differ from those in fp32 wherever the two likeliest are close, so
equality of tokens is no fair question there. Teacher forcing is: both see fp32's own answer, and the logits
at each place are compared. How often the likeliest token changes, and how close the top two were where it
did, says whether the difference is rounding or a mistake.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.attention import Span, build_layout
from labkit.benchmark.workload import Job
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.model import Transformer
from labkit.request import SamplingParams
from labkit.weights import LoadedModel, load_model

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


def teacher_forced(module: Transformer, token_ids: Sequence[int], *, block_size: int = 16) -> Tensor:
    """Logits (len(token_ids), vocab_size), fp32, of every place, each seeing the given tokens before it."""
    blocks = -(-len(token_ids) // block_size)
    cache = module.new_cache(blocks, block_size)
    layout = build_layout([Span(0, len(token_ids), range(blocks))], cache, windows=module.windows)
    tokens = torch.tensor(token_ids, device=module.device)
    hidden = module(tokens, torch.arange(len(token_ids), device=module.device), cache, layout)
    return module.logits(hidden).float()


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


def report(model: str, device: str, jobs_of: Any) -> list[Closeness]:
    """Every half precision against fp32. `jobs_of(tokenizer)` makes the jobs."""
    full = load_model(model, dtype="float32", device=device)
    jobs = jobs_of(full.tokenizer)
    return [compare(full, load_model(model, dtype=dtype, device=device), jobs) for dtype in DTYPES]


def table(rows: Sequence[Closeness]) -> str:
    """What `report` found, a few lines for each dtype."""
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


def to_json(rows: Sequence[Closeness]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
