"""Attention over the paged cache: the metadata of a batch, and the plainest way to compute it.

The tokens of a step lie one after the other in a flattened batch, and only attention knows where one request
ends and the next begins: from `AttentionMetadata`, which is built once per step and used by every layer.

A backend cuts the rows of the batch into groups, and each group is one call. `PlainAttention` makes each row
a group; faster backends are in `labkit.kernels`. `reference_attention` defines what all of them must compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from labkit.core.kv_cache import PagedKVCache, read_tokens


@dataclass
class Span:
    """One row of the batch: `num_queries` tokens from position `start` on, with its block table."""

    start: int
    num_queries: int
    table: Sequence[int]

    @property
    def length(self) -> int:
        """How many tokens its last query attends to."""
        return self.start + self.num_queries


class QueryGroup(Protocol):
    """Rows `[first, last)` of the flattened batch that share one call of attention."""

    first: int
    last: int

    # Attention of queries (last - first, heads, head_dim) over a layer's blocks; the result has their shape.
    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor: ...


class AttentionBackend(Protocol):
    """A way to compute attention: it cuts the rows of a batch, as `row_order` sorts them, into groups."""

    def groups(
        self, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> Sequence[QueryGroup]: ...  # windows: the sliding windows among the layers (None: one without)


@dataclass
class AttentionMetadata:
    """Where the tokens of a flattened batch lie in the cache, and which of its rows share a call."""

    slots: Tensor  # where keys and values go (see `PagedKVCache.slots`); those of padding, to the null block
    groups: Sequence[QueryGroup]
    rows: Sequence[Span]


def build_metadata(
    rows: Sequence[Span],
    cache: PagedKVCache,
    backend: AttentionBackend,
    *,
    windows: Sequence[int | None] = (None,),
    num_padding: int = 0,
) -> AttentionMetadata:
    """Describe a batch. `rows` must be in the order of `row_order`; `num_padding` tokens follow them."""
    size = cache.block_size
    where = [(row.table[t // size], t % size) for row in rows for t in range(row.start, row.length)]
    where += [(cache.null_block, i % size) for i in range(num_padding)]
    blocks, places = torch.tensor(where, dtype=torch.long, device=cache.device).view(-1, 2).unbind(1)
    return AttentionMetadata(cache.slots(blocks, places), backend.groups(rows, cache, windows), rows)


def row_order(rows: Sequence[Span], few: int = 16) -> list[int]:
    """Return the order that backends need: rows that can share a call side by side, the longest first."""
    return sorted(range(len(rows)), key=lambda i: (min(rows[i].num_queries, few + 1), -rows[i].length))


def attend(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Compute attention of queries (T, heads, head_dim) in a layer, after their keys and values are written.

    A query sees at most `window` tokens, itself included (None: all before it). Padding gets zeros.
    """
    groups, blocks = metadata.groups, cache.layers[layer]
    if len(groups) == 1 and groups[0].last == len(q):  # as in most decode steps: nothing to put together
        return groups[0].attend(q, blocks, scale=scale, window=window)
    # Padding comes after the last group, and gets zeros.
    out = torch.zeros_like(q) if not groups or groups[-1].last < len(q) else torch.empty_like(q)
    for group in groups:
        queries = q[group.first : group.last]
        out[group.first : group.last] = group.attend(queries, blocks, scale=scale, window=window)
    return out


class PlainAttention:
    """Computes each row straight from the formula: softmax(q k / sqrt(d)) v over the keys that q may see."""

    name = "plain"

    def groups(
        self, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> list[_PlainRow]:
        first, groups = 0, []
        for row in rows:
            at = torch.arange(row.length, device=cache.device)
            table = torch.tensor(row.table, device=cache.device)
            slots = cache.slots(table[at // cache.block_size], at % cache.block_size)
            groups.append(_PlainRow(first, first + row.num_queries, slots, at[row.start :], at))
            first += row.num_queries
        return groups


@dataclass
class _PlainRow:
    first: int
    last: int
    slots: Tensor  # (2, K * kv_heads), where its keys and values lie
    queries: Tensor  # positions (Q,)
    keys: Tensor  # positions (K,)

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        k, v = read_tokens(blocks, self.slots)  # (K, kv_heads, head_dim)
        group = q.shape[1] // k.shape[1]  # grouped-query attention: so many heads share a key
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (K, heads, head_dim)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        distance = self.queries[:, None] - self.keys  # (Q, K): how far back from the query a key lies
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def reference_attention(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    rows: Sequence[Span],
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Compute what every backend must give: each query looks up its keys through the block table."""
    out, i = torch.zeros_like(q), 0
    group = q.shape[1] // cache.num_kv_heads
    for row in rows:
        for position in range(row.start, row.length):
            seen = range(0 if window is None else max(0, position + 1 - window), position + 1)
            blocks = [row.table[t // cache.block_size] for t in seen]
            places = [t % cache.block_size for t in seen]
            k = cache.k[layer][blocks, places].repeat_interleave(group, dim=1)  # (seen, heads, head_dim)
            v = cache.v[layer][blocks, places].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,lhd->hl", q[i].float(), k.float()) * scale  # (heads, seen)
            out[i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v.float())
            i += 1
    return out
