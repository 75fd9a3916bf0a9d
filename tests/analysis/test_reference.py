"""How answers are compared, and the workloads."""

from __future__ import annotations

import pytest
import torch

from labkit.analysis.reference import DifferentTokens, Run, agreement, compare_tokens
from labkit.analysis.workload import make_noise


def run_of(*answers: list[int], name: str = "x", seconds: float = 1.0) -> Run:
    return Run(name, seconds, list(answers), [[float(i) for i, _ in enumerate(a)] for a in answers])


def test_agreement_names_the_first_difference() -> None:
    true = run_of([1, 2, 3], [4, 5], [6])
    assert agreement(true, run_of([1, 2, 3], [4, 6])) == [None, 1]
    assert agreement(true, run_of([1, 2], [4, 5, 6], [6])) == [2, 2, None]


def test_other_tokens_are_refused_in_fp32_and_counted_in_half_precision() -> None:
    runs = [run_of([1, 2], [3, 4], name="a"), run_of([1, 2], [3, 5], name="b")]
    with pytest.raises(DifferentTokens, match=r"b and a disagree on 1 of 2 answers \(first: number 1\)"):
        compare_tokens(runs, torch.float32)
    assert "1 of 2 equal answers" in compare_tokens(runs, torch.bfloat16)
    few = run_of([1, 2], name="few")
    assert compare_tokens([few, runs[0]], torch.float32) == "All 2 systems gave the same 4 tokens."


def test_a_workload_of_noise_is_seeded_and_within_its_bounds() -> None:
    jobs = make_noise(50, 20, seed=3, prompt_tokens=(2, 9), output_tokens=(1, 5))
    assert jobs == make_noise(50, 20, seed=3, prompt_tokens=(2, 9), output_tokens=(1, 5))
    assert all(2 <= len(job.prompt) <= 9 and 1 <= job.max_tokens <= 5 for job in jobs)
    assert all(0 <= token < 50 for job in jobs for token in job.prompt)
