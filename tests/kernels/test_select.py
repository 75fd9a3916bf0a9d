"""Which attention a device gets, and the reason that is given."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from labkit.core.attention import Span, attend, build_metadata, reference_attention
from labkit.core.kv_cache import KVShape
from labkit.kernels import select
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA, gathered_chunks
from labkit.kernels.paged_decode import paged_rows
from labkit.kernels.select import Sm75, choose_backend
from labkit.kernels.varlen import packed_chunks
from tests.kernels.paged import DEVICE

CUDA = torch.device("cuda")


def test_a_cpu_has_plain_attention_and_says_why() -> None:
    backend = choose_backend(torch.device("cpu"), torch.float32, 64)
    assert (backend.name, backend.decode, backend.chunks) == ("sdpa", SDPA.decode, SDPA.chunks)
    assert "Triton kernels need a CUDA GPU" in backend.reason
    assert choose_backend(torch.device("cpu"), torch.float32, 64, wanted="sdpa").name == "sdpa"
    with pytest.raises(ValueError, match="attention_backend must be auto or sdpa here, not 'triton'"):
        choose_backend(torch.device("cpu"), torch.float32, 64, wanted="triton")
    with pytest.raises(ValueError, match="attention_backend must be one of auto, sdpa, triton, not 'flash'"):
        choose_backend(torch.device("cpu"), torch.float32, 64, wanted="flash")
    with pytest.raises(ValueError, match="as_t4 needs a CUDA GPU"):
        choose_backend(torch.device("cpu"), torch.float32, 64, as_t4=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were an H100, with Triton and FlashAttention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(select, "varlen_attention", lambda: object())
    monkeypatch.setattr(select, "why_not_triton", lambda *args: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return monkeypatch


def test_a_newer_gpu_has_triton_and_packed_chunks_in_half_precision(gpu: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        backend = choose_backend(CUDA, dtype, 64)
        assert (backend.name, backend.decode, backend.chunks) == ("triton", paged_rows, packed_chunks)
    for dtype, dim, why in ((torch.float32, 64, "float32"), (torch.float16, 20, "head_dim of 20")):
        backend = choose_backend(CUDA, dtype, dim)
        assert (backend.name, backend.chunks) == ("triton", gathered_chunks)
        assert why in backend.reason
    gpu.setattr(select, "varlen_attention", lambda: None)
    assert "this PyTorch has no FlashAttention" in choose_backend(CUDA, torch.float16, 64).reason


def test_a_t4_and_whatever_stands_in_for_one_has_no_kernels_of_sm_80(gpu: pytest.MonkeyPatch) -> None:
    backend = choose_backend(CUDA, torch.float16, 64, as_t4=True)
    assert (backend.name, backend.decode) == ("triton", paged_rows)
    assert backend.chunks is not packed_chunks
    assert "as on a T4" in backend.reason
    plain = choose_backend(CUDA, torch.float16, 64, as_t4=True, wanted="sdpa")
    assert plain.name == "sdpa" and "asked for" in plain.reason
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    backend = choose_backend(CUDA, torch.float16, 64)
    assert (backend.name, backend.chunks) == ("triton", gathered_chunks)
    assert "sm_75" in backend.reason


def test_where_triton_cannot_be_had_the_reason_says_so(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert "Triton makes no code for sm_60" in choose_backend(CUDA, torch.float16, 64).reason
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    backend = choose_backend(CUDA, torch.float16, 64)
    assert backend.name == "sdpa" and "triton is not installed" in backend.reason
    with pytest.raises(ValueError, match="not 'triton': the package triton is not installed"):
        choose_backend(CUDA, torch.float16, 64, wanted="triton")


def test_where_a_kernel_of_triton_fails_pytorchs_own_take_over(gpu: pytest.MonkeyPatch) -> None:
    why, tried = "Triton's kernel does not run here (RuntimeError: Failed to find C compiler.)", []
    gpu.setattr(select, "why_not_triton", lambda *args: tried.append(args) or why)
    backend = choose_backend(CUDA, torch.float16, 64)
    assert (backend.name, backend.decode) == ("sdpa", SDPA.decode)
    assert backend.reason == f"{SDPA.reason}; {why}"
    assert "as on a T4" in choose_backend(CUDA, torch.float16, 64, as_t4=True).reason
    with pytest.raises(ValueError, match="must be auto or sdpa here, not 'triton': Triton's kernel does not"):
        choose_backend(CUDA, torch.float16, 64, wanted="triton")
    assert tried == [(CUDA, torch.float16, 64, False)] * 3
    assert choose_backend(CUDA, torch.float16, 64, wanted="sdpa").name == "sdpa"
    assert len(tried) == 3, "who wants PyTorch's own waits for no compiler"


def test_groups_limited_to_the_kernels_of_sm_75_compute_the_same() -> None:
    torch.manual_seed(3)
    rows = [Span(20, 1, [5, 0]), Span(3, 1, [2]), Span(14, 9, [4, 1])]
    cache = KVShape(1, 2, 8, torch.float32, DEVICE).new_cache(6, 16)
    cache.blocks.normal_()
    q = torch.randn(11, 6, 8, device=DEVICE)
    backend = Backend("sdpa", "", select._as_sm75(SDPA.decode), select._as_sm75(SDPA.chunks), SDPA.static)
    layout = build_metadata(rows, cache, backend=backend)
    assert all(isinstance(group, Sm75) for group in layout.groups)
    out = attend(q, cache, 0, layout, scale=0.3)
    plain = reference_attention(q, cache, 0, rows, scale=0.3)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
