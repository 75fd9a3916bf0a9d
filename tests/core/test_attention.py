"""Attention over blocks: every way to compute it equals the reference, for any mix of rows."""

from __future__ import annotations

import random

import pytest
import torch

from labkit.core.attention import (
    AttentionBackend,
    PlainAttention,
    Span,
    attend,
    build_metadata,
    reference_attention,
    row_order,
)
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.kernels.gathered_sdpa import SDPA

CPU = torch.device("cpu")


def cache_of(num_blocks: int, block_size: int, *, kv_heads: int = 2, dim: int = 8) -> PagedKVCache:
    return KVShape(2, kv_heads, dim, torch.float32, CPU).new_cache(num_blocks, block_size)


def random_rows(rng: random.Random, block_size: int, count: int) -> tuple[list[Span], int]:
    """Rows of any length and start, over shuffled blocks."""
    shapes = []
    for _ in range(count):
        n = 1 if rng.random() < 0.6 else rng.randint(2, 20)
        shapes.append((rng.choice([0, rng.randint(0, 60)]), n))
    needs = [-(-(start + n) // block_size) for start, n in shapes]
    blocks = list(range(sum(needs)))
    rng.shuffle(blocks)
    rows = []
    for (start, n), need in zip(shapes, needs, strict=True):
        rows.append(Span(start, n, [blocks.pop() for _ in range(need)]))
    return [rows[i] for i in row_order(rows)], sum(needs)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("count", [1, 3, 24])
@pytest.mark.parametrize("backend", [PlainAttention(), SDPA], ids=lambda backend: backend.name)
def test_attention_equals_the_reference(
    backend: AttentionBackend, block_size: int, window: int | None, count: int
) -> None:
    rng = random.Random(f"{block_size}{window}{count}")
    torch.manual_seed(0)
    for _ in range(4):
        rows, blocks = random_rows(rng, block_size, count)
        cache = cache_of(blocks, block_size)
        cache.k.normal_()
        cache.v.normal_()
        total = sum(row.num_queries for row in rows)
        padding = rng.choice([0, 3])
        q = torch.randn(total + padding, 6, 8)
        layout = build_metadata(rows, cache, backend, num_padding=padding, windows=[None, window])
        fast = attend(q, cache, 1, layout, scale=0.3, window=window)
        plain = reference_attention(q, cache, 1, rows, scale=0.3, window=window)
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
        assert not fast[total:].any()
