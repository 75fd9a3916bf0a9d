"""Attention with PyTorch's own kernels over gathered blocks. It runs on every device.

Rows with few queries share a call: their blocks are gathered, padded to the longest row, and masked. Other
rows get a call each. The query heads that share a key head are folded into the query length, so that
grouped-query attention needs no repeated keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache, head_pieces
from labkit.kernels.backend import Backend
from labkit.kernels.int8_kv import read_rows

_MAX_GROUPS = 4  # groups of decode rows with similar lengths
_MIN_GROUP = 4  # rows that are worth a call of their own
FEW = 16  # rows with at most so many queries, for instance drafts, share a call


@dataclass
class GatheredRows:
    """Rows with the same number of queries, mostly one, in one call over their gathered blocks.

    `pieces` (see `head_pieces`) says where the blocks are. `masks` maps a window (None: no window) to what is
    added to the scores, (rows, 1 or kv_heads, queries, width * block_size): 0, or minus infinity for a key
    that a query must not see. With `written_out`, attention is computed as two batched products: on a CPU in
    fp32 that is faster, because PyTorch's fused kernel makes a small product for each row and head there.
    """

    first: int
    last: int
    pieces: Tensor
    masks: dict[int | None, Tensor]
    written_out: bool
    _folded: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        k, v = read_rows(blocks, self.pieces, q.dtype)  # (rows, kv_heads, width * block_size, head_dim)
        rows, kv_heads, length, dim = k.shape
        mask = self.masks[window]
        queries = mask.shape[2]
        folded = q
        if queries > 1:  # fold them into the heads: first all queries of one head, then those of the next
            folded = q.reshape(rows, queries, -1, dim).transpose(1, 2)
            mask = self._fold(window, q.shape[1] // kv_heads)
        folded = folded.reshape(rows, kv_heads, -1, dim)  # (rows, kv_heads, group * queries, head_dim)
        if self.written_out:
            k, v = k.view(-1, length, dim), v.view(-1, length, dim)
            scores = torch.baddbmm(
                mask.view(len(k), -1, length), folded.reshape(len(k), -1, dim), k.transpose(1, 2), alpha=scale
            )
            out = torch.bmm(scores.softmax(-1), v)
        else:
            out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
        if queries > 1:
            out = out.reshape(rows, -1, queries, dim).transpose(1, 2).contiguous()
        return out.reshape(q.shape)

    def _fold(self, window: int | None, group: int) -> Tensor:
        """Return the mask, repeated for each head of a group; it is made once for all layers."""
        if window not in self._folded:
            mask = self.masks[window]
            rows, heads, queries, length = mask.shape
            folded = _zeros((rows, heads, group * queries, length), mask.dtype, mask.device)
            folded.unflatten(2, (group, queries)).copy_(mask[:, :, None])
            self._folded[window] = folded
        return self._folded[window]


@dataclass
class Chunk:
    """The queries of one row. A mask (queries, length) is added to the scores; None is the causal mask."""

    first: int
    last: int
    length: int
    pieces: Tensor
    masks: dict[int | None, Tensor | None]

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        k, v = read_rows(blocks, self.pieces, q.dtype)
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, : self.length] for x in (k, v))
        if group > 1:  # not all of PyTorch's kernels group queries; repeating one row's keys is cheap
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        mask = self.masks[window]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return out[0].transpose(0, 1)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores: 0 for a key that is seen, else minus infinity."""
    return _zeros(seen.shape, dtype, seen.device).masked_fill_(~seen, -torch.inf)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty mask: PyTorch's memory-efficient kernel takes it as it is, in every layer.

    Masks whose rows do not begin at multiples of 16 elements it copies; so this is a part of longer rows.
    """
    *others, length = shape
    return torch.zeros((*others, -(-length // 16) * 16), dtype=dtype, device=device)[..., :length]


def block_table(rows: Sequence[Span], cache: PagedKVCache, width: int) -> Tensor:
    """Return the block tables of these rows, filled up with the null block: (rows, width), int64."""
    table: list[int] = []
    for row in rows:
        used = -(-row.length // cache.block_size)
        table += row.table[:used]
        table += [cache.null_block] * (width - used)
    return torch.tensor(table, device=cache.device).view(len(rows), width)


def gathered_rows(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[GatheredRows]:
    """Make groups of rows with a single query, cut so that the shorter ones need little padding."""
    size = cache.block_size
    groups = []
    cuts = _cut([-(-row.length // size) for row in rows]) if len(rows) > _MIN_GROUP else [(0, len(rows))]
    for begin, end in cuts:
        some = rows[begin:end]
        groups.append(_gathered(first, some, cache, windows))
        first = groups[-1].last
    return groups


def _gathered(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> GatheredRows:
    """Make one group of rows with the same number of queries; the longest row comes first."""
    queries = rows[0].num_queries
    tables = block_table(rows, cache, -(-rows[0].length // cache.block_size))
    starts = torch.tensor([row.start for row in rows], device=tables.device)
    positions = starts[:, None] + torch.arange(queries, device=tables.device)
    return _group(first, tables, positions, cache, windows)


def static_rows(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> GatheredRows:
    """Make one group of rows with a single query from tensors on the device (see `Backend.static`)."""
    return _group(0, tables, lengths[:, None] - 1, cache, windows)


def _group(
    first: int, tables: Tensor, positions: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> GatheredRows:
    """Make one group from its block tables (rows, width) and the positions of its queries (rows, queries)."""
    at = torch.arange(tables.shape[1] * cache.block_size, device=tables.device)
    positions = positions[:, None, :, None]  # to be compared with keys: (rows, 1, queries, length)
    masks, written_out = {}, cache.device.type == "cpu" and cache.dtype == torch.float32
    for window in windows:
        seen = at <= positions
        mask = additive(seen if window is None else seen & (at > positions - window), cache.dtype)
        masks[window] = mask.repeat(1, cache.num_kv_heads, 1, 1) if written_out else mask
    return GatheredRows(
        first, first + positions.numel(), head_pieces(tables, cache.num_kv_heads), masks, written_out
    )


def gathered_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[GatheredRows | Chunk]:
    """Make groups of rows with more than one query: those with equally few together, others one by one."""
    groups: list[GatheredRows | Chunk] = []
    for queries, some in itertools.groupby(rows, lambda row: row.num_queries):
        if queries <= FEW:
            groups.append(_gathered(first, list(some), cache, windows))
        else:
            groups += _single_chunks(first, list(some), cache, windows)
        first = groups[-1].last
    return groups


def _single_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[Chunk]:
    device = cache.device
    chunks = []
    for row in rows:
        tables = block_table([row], cache, -(-row.length // cache.block_size))
        keys = torch.arange(row.length, device=device)
        queries = torch.arange(row.start, row.length, device=device)[:, None]
        masks: dict[int | None, Tensor | None] = {}
        for window in windows:
            if row.start == 0 and (window is None or window >= row.length):
                masks[window] = None
            else:
                seen = keys <= queries
                masks[window] = additive(
                    seen if window is None else seen & (keys > queries - window), cache.dtype
                )
        pieces = head_pieces(tables, cache.num_kv_heads)
        chunks.append(Chunk(first, first + row.num_queries, row.length, pieces, masks))
        first += row.num_queries
    return chunks


def _cut(widths: list[int]) -> list[tuple[int, int]]:
    """Cut rows, sorted by falling width, into few groups with little padding; return (begin, end) of each."""
    cuts, first = [], 0
    for i, width in enumerate(widths):
        if len(cuts) == _MAX_GROUPS - 1:
            break
        if i - first >= _MIN_GROUP and 4 * width <= 3 * widths[first] and len(widths) - i >= _MIN_GROUP:
            cuts.append((first, i))
            first = i
    return [*cuts, (first, len(widths))] if widths else []


SDPA = Backend(
    "sdpa", "PyTorch's own attention over gathered blocks", gathered_rows, gathered_chunks, static_rows
)
