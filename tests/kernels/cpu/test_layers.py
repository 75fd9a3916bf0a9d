"""Fused layers: each operation, and the whole model, compute what the readable ones do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.core.kv_cache import KVShape
from labkit.core.model import RMSNorm, apply_rotary
from labkit.kernels import int8
from labkit.kernels.cpu.layers import DTYPES, is_fused
from labkit.models.teacher_forcing import teacher_forced
from tests.conftest import fused, loaded
from tests.kernels.cpu.compiled import needs_compiler

pytestmark = needs_compiler
OPS = torch.ops.labkit_cpu
SIZES = dict(
    rows=st.integers(1, 40), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99)
)


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, 1e-5)
    norm.weight = torch.nn.Parameter(torch.randn(width).to(dtype), requires_grad=False)
    return norm


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_norms(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, delta, norm = (
        torch.randn(rows, width).to(dtype),
        torch.randn(rows, width).to(dtype),
        norm_of(width, dtype),
    )
    torch.testing.assert_close(OPS.rms_norm(x, norm.weight, norm.eps), norm(x))
    total, normed = OPS.add_rms_norm(x, delta, norm.weight, norm.eps)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(normed, norm(total))


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_the_gate_and_the_scale_of_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = (10 * torch.randn(rows, 2 * width)).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(OPS.silu_mul(x), F.silu(gate) * up)
    x[rows // 2] = 0
    x[rows // 3, width // 2] = torch.inf  # a row that is not sound stays so
    got, want = OPS.scale_rows(x, int8._TINY), int8.scale_rows(x.float(), int8._TINY)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # bit for bit: they are rounded next


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [8, 24, 64])
def test_rotation_and_the_cache(dim: int, normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    rows, heads, kv_heads, size = 21, 6, 2, 4
    caches = [KVShape(1, kv_heads, dim, dtype, torch.device("cpu")).new_cache(8, size) for _ in range(2)]
    order = torch.randperm(8 * size)[:rows]
    slots = caches[0].slots(order // size, order % size)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.randn(rows, 1, dim // 2)
    cos, sin = (
        torch.cat(pair, -1).to(dtype) for pair in ((angles.cos(),) * 2, (-angles.sin(), angles.sin()))
    )
    q_norm, k_norm = norm_of(dim, dtype), norm_of(dim, dtype)
    weights = (q_norm.weight, k_norm.weight) if normed else (None, None)
    got = OPS.rotate_and_write(qkv, cos, sin, caches[0].layers[0], slots, heads, *weights, q_norm.eps)
    q, k, v = qkv.view(rows, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    if normed:
        q, k = q_norm(q), k_norm(k)
    torch.testing.assert_close(got, apply_rotary(q, cos, sin))
    caches[1].write(0, apply_rotary(k, cos, sin), v, slots)
    torch.testing.assert_close(caches[0].blocks, caches[1].blocks)


def test_a_fused_model_says_what_the_plain_one_says(family: str) -> None:
    assert is_fused(fused(family).module) and not is_fused(loaded(family).module)
    tokens = list(range(60))  # beyond Mistral's window
    want = teacher_forced(loaded(family).module, tokens)
    torch.testing.assert_close(teacher_forced(fused(family).module, tokens), want, rtol=1e-4, atol=1e-4)
