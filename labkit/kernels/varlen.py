"""Rows with any number of queries in one call of PyTorch's FlashAttention, on newer GPUs."""

from __future__ import annotations

import functools
import inspect
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.int8_kv import read_tokens


@dataclass
class PackedChunks:
    """Rows with any number of queries in one call of FlashAttention: their tokens are packed without padding.

    `slots` (see `PagedKVCache.slots`) says where the keys and values of all tokens of these rows are.
    `query_starts` and `token_starts` (rows + 1, int32) say where each row begins, among the queries and among
    the tokens; `most_queries` and `most_tokens` are the largest numbers of a row.
    """

    first: int
    last: int
    slots: Tensor
    query_starts: Tensor
    token_starts: Tensor
    most_queries: int
    most_tokens: int

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        k, v = read_tokens(blocks, self.slots, q.dtype)  # (tokens, kv_heads, head_dim)
        return varlen_attention()(
            q,
            k,
            v,
            self.query_starts,
            self.token_starts,
            self.most_queries,
            self.most_tokens,
            scale=scale,
            # How far a query sees to the left and right of itself (it counts in the window); -1 is no limit.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
        )


def packed_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[PackedChunks]:
    """Make one group of all rows with more than one query."""
    size, device = cache.block_size, cache.device
    blocks = array("q")
    queries, tokens = [0], [0]
    for row in rows:
        for block in row.table[: -(-row.length // size)]:
            blocks.extend([block] * size)
        queries.append(queries[-1] + row.num_queries)
        tokens.append(tokens[-1] + row.length)
        del blocks[tokens[-1] :]  # the places of the last block that hold no token yet
    starts = torch.tensor([queries, tokens], dtype=torch.int32, device=device)
    most = (max(row.num_queries for row in rows), max(row.length for row in rows))
    places = torch.cat([torch.arange(row.length) % size for row in rows])
    where = torch.stack((torch.frombuffer(blocks, dtype=torch.int64), places)).to(device)
    slots = cache.slots(*where.unbind(0))
    return [PackedChunks(first, first + queries[-1], slots, starts[0], starts[1], *most)]


@functools.cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """Return `torch.nn.attention.varlen.varlen_attn`, if this PyTorch has it with all that is needed here.

    It came with PyTorch 2.10; by 2.12 it had windows, scale and grouped-query attention, too.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= has else None
