"""A tiny kernel finds out whether Triton works. Where there is no GPU, the interpreter runs it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from labkit.kernels import probe
from tests.kernels.paged import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what takes the place of the kernel, and try it: returns what `why_not_triton` says."""
    from labkit.kernels import flash_decoding

    def swap(instead: Any) -> str | None:
        monkeypatch.setattr(flash_decoding, "paged_decode", instead)
        return probe.why_not_triton.__wrapped__(DEVICE, torch.float32, 8)

    return swap


@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_kernel_that_works_is_found_to_work(dtype: torch.dtype, head_dim: int) -> None:
    assert probe.why_not_triton(DEVICE, dtype, head_dim) is None


def test_the_reason_for_a_failure_is_one_line(kernel: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    assert kernel(fail) == "Triton's kernel does not run here (RuntimeError: Failed to find C compiler.)"


@pytest.mark.parametrize("wrong", [lambda out: out * 1.1, lambda out: out.roll(1, 0), lambda out: out / 0])
def test_a_kernel_that_computes_something_else_is_not_taken(kernel: Any, wrong: Any) -> None:
    from labkit.kernels.flash_decoding import paged_decode

    assert kernel(lambda *args, **kwargs: wrong(paged_decode(*args, **kwargs))).startswith(
        "Triton's kernel is wrong here (by "
    )


def test_too_little_memory_says_nothing_of_triton(kernel: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        kernel(full)


def test_one_attempt_is_enough_for_a_process() -> None:
    assert isinstance(probe.why_not_triton, functools._lru_cache_wrapper)
    before = probe.why_not_triton.cache_info().misses
    for _ in range(3):
        probe.why_not_triton(DEVICE, torch.float32, 16)
    assert probe.why_not_triton.cache_info().misses == before + 1
