"""A cache with rows in it, and where there is Triton to read them."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from labkit.core.attention import Span
from labkit.core.kv_cache import KVShape, PagedKVCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")


def filled(
    rows: list[Span], num_blocks: int, size: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> PagedKVCache:
    """A cache with random keys and values for all tokens of these rows, and NaN everywhere else."""
    cache = KVShape(1, kv_heads, dim, dtype, DEVICE).new_cache(num_blocks, size)
    cache.blocks.fill_(torch.nan)
    for row in rows:
        for token in range(row.length):
            cache.blocks[0, row.table[token // size], :, :, token % size] = torch.randn(2, kv_heads, dim)
    return cache


def rows_of(lengths: list[int], size: int, seed: int = 0) -> tuple[list[Span], int]:
    """Rows with a single query, longest first, over shuffled blocks, and how many blocks there are."""
    needs = [-(-length // size) for length in lengths]
    blocks = list(range(sum(needs) + 3))
    random.Random(seed).shuffle(blocks)
    rows = [
        Span(length - 1, 1, [blocks.pop() for _ in range(need)])
        for length, need in zip(lengths, needs, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.length), sum(needs) + 3
