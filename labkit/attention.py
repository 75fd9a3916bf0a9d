"""The paged KV cache (the tensors) and attention over it.

The cache of one layer is two tensors of shape (pages, block_size, kv_heads, head_dim). Token t of a request
lies in slot `table[t // block_size] * block_size + t % block_size`. One page more than the pool has, the
null page, takes what padding writes and fills block tables up to a common width.

`reference_attention` says what is meant, one token at a time. `attend` computes the same for a whole
flattened batch: rows with a single query are batched over gathered pages (their heads' groups folded into
the query length, so that grouped-query attention needs no repeated keys), longer rows go one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_GROUPS = 4  # of decode rows with similar lengths
_MIN_GROUP = 4  # rows worth a call of their own


class PagedKVCache:
    """Keys and values of all layers, in pages.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_dim: sizes. `num_blocks` does not count the
            null page, whose index is `num_blocks`.
        dtype, device: of the tensors.

    Raises:
        ValueError: if the device cannot hold it, with the size asked for.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = self.null_block = num_blocks
        self.block_size = block_size
        shape = (num_layers, num_blocks + 1, block_size, num_kv_heads, head_dim)
        needed = 2 * math.prod(shape) * dtype.itemsize
        if device.type == "cpu":  # which promises memory that it does not have
            available = psutil.virtual_memory().available
        else:
            available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if needed > available:
            raise ValueError(
                f"num_blocks={num_blocks} needs {needed / 2**30:.1f} GiB for the KV cache, but {device} has "
                f"{available / 2**30:.1f} GiB free"
            )
        # Zeros, not garbage: a masked score still multiplies its value, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store keys and values (T, kv_heads, head_dim) of one layer at the slots (T,)."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in all layers: copy on write."""
        source = torch.tensor([pair[0] for pair in pairs], device=self.k.device)
        target = torch.tensor([pair[1] for pair in pairs], device=self.k.device)
        for cache in (self.k, self.v):
            cache[:, target] = cache[:, source]

    def clear_pages(self, blocks: Sequence[int]) -> None:
        """Zero pages, so that what a failed request left there (NaN, say) reaches nobody."""
        index = torch.tensor(blocks, dtype=torch.long, device=self.k.device)
        self.k[:, index] = 0
        self.v[:, index] = 0


@dataclass
class Span:
    """One row of the batch: `num_queries` tokens from position `start` on, with its block table."""

    start: int
    num_queries: int
    table: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens it attends to at the end of this step."""
        return self.start + self.num_queries


@dataclass
class QueryGroup:
    """Rows `[first, last)` of the flattened batch that share one call of attention.

    Either several rows of one query each (`num_rows` > 0), or the queries of one row. `blocks` are the pages
    to gather, (num_rows * width,) or (width,); `masks` maps a sliding window (None: no window) to what each
    query may see, (num_rows, 1, 1, L) or (queries, L), or to None where plain causal attention is meant.
    """

    first: int
    last: int
    num_rows: int
    blocks: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


@dataclass
class BatchLayout:
    """Where the tokens of a flattened batch lie: built once per step, used by every layer.

    `slots` (T,) says where each token's keys and values go; padding at the end goes to the null page.
    """

    slots: Tensor
    groups: list[QueryGroup]


def build_layout(
    rows: Sequence[Span],
    cache: PagedKVCache,
    *,
    num_padding: int = 0,
    windows: Sequence[int | None] = (None,),
) -> BatchLayout:
    """Lay out a batch. `rows` must come with single-query rows first, longest first (see `row_order`)."""
    size, device = cache.block_size, cache.k.device
    slots: list[int] = []
    for row in rows:
        table = row.table
        slots += [table[t // size] * size + t % size for t in range(row.start, row.length)]
    slots += [cache.null_block * size + i % size for i in range(num_padding)]
    single = 0
    while single < len(rows) and rows[single].num_queries == 1:
        single += 1
    groups = [
        _decode_group(first, rows[first:last], cache, windows)
        for first, last in _cut([-(-row.length // size) for row in rows[:single]])
    ]
    first = single
    for row in rows[single:]:
        groups.append(_chunk_group(first, row, cache, windows))
        first += row.num_queries
    return BatchLayout(torch.tensor(slots, dtype=torch.long, device=device), groups)


def row_order(rows: Sequence[Span]) -> list[int]:
    """The order that `build_layout` wants: single queries by falling length, then the others."""
    return sorted(range(len(rows)), key=lambda i: (rows[i].num_queries > 1, -rows[i].length))


def _cut(widths: list[int]) -> list[tuple[int, int]]:
    """Cut rows, sorted by falling width, into few groups with little padding between them."""
    cuts, first = [], 0
    for i, width in enumerate(widths):
        if len(cuts) == _MAX_GROUPS - 1:
            break
        if i - first >= _MIN_GROUP and 4 * width <= 3 * widths[first] and len(widths) - i >= _MIN_GROUP:
            cuts.append((first, i))
            first = i
    return [*cuts, (first, len(widths))] if widths else []


def _decode_group(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> QueryGroup:
    size, device = cache.block_size, cache.k.device
    width = -(-rows[0].length // size)
    blocks: list[int] = []
    for row in rows:
        used = -(-row.length // size)
        blocks += row.table[:used]
        blocks += [cache.null_block] * (width - used)
    group = QueryGroup(first, first + len(rows), len(rows), torch.tensor(blocks, device=device))
    lengths = torch.tensor([row.length for row in rows], device=device)[:, None, None, None]
    at = torch.arange(width * size, device=device)
    for window in windows:
        mask = at < lengths
        group.masks[window] = mask if window is None else mask & (at >= lengths - window)
    return group


def _chunk_group(first: int, row: Span, cache: PagedKVCache, windows: Sequence[int | None]) -> QueryGroup:
    device = cache.k.device
    width = -(-row.length // cache.block_size)
    blocks = torch.tensor(list(row.table[:width]), device=device)
    group = QueryGroup(first, first + row.num_queries, 0, blocks)
    keys = torch.arange(row.length, device=device)
    queries = torch.arange(row.start, row.length, device=device)[:, None]
    for window in windows:
        if row.start == 0 and (window is None or window >= row.length):
            group.masks[window] = None
        else:
            mask = keys <= queries
            group.masks[window] = mask if window is None else mask & (keys > queries - window)
    return group


def attend(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    layout: BatchLayout,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of a flattened batch over its pages, whose keys and values are already written.

    Args:
        q: queries (T, heads, head_dim).
        layout: from `build_layout`.
        window: how many tokens a query sees at most, itself included (None: all before it).

    Returns:
        (T, heads, head_dim); zeros for padding.
    """
    out = torch.zeros_like(q) if not layout.groups or layout.groups[-1].last < len(q) else torch.empty_like(q)
    k_pages, v_pages = cache.k[layer], cache.v[layer]
    kv_heads, dim = k_pages.shape[-2:]
    for group in layout.groups:
        mask = group.masks[window]
        queries = q[group.first : group.last]
        rows = group.num_rows or 1
        # Whole pages are gathered: (rows * width, block_size, kv_heads, dim) -> (rows, kv_heads, L, dim).
        k = k_pages.index_select(0, group.blocks).view(rows, -1, kv_heads, dim).transpose(1, 2)
        v = v_pages.index_select(0, group.blocks).view(rows, -1, kv_heads, dim).transpose(1, 2)
        if group.num_rows:
            folded = queries.view(rows, kv_heads, -1, dim)
            result = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
            out[group.first : group.last] = result.view_as(queries)
        else:
            out[group.first : group.last] = _attend_chunk(queries, k, v, mask, scale)
    return out


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Queries of one request (n, heads, dim) over its keys and values (1, kv_heads, >= L, dim)."""
    length = len(q) if mask is None else mask.shape[1]
    group = q.shape[1] // k.shape[1]
    k, v = (
        x[:, :, :length].repeat_interleave(group, dim=1) if group > 1 else x[:, :, :length] for x in (k, v)
    )
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out[0].transpose(0, 1)


def reference_attention(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    rows: Sequence[Span],
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The same as `attend`, said plainly: each query looks up its keys through the block table, one by one.

    Slow on purpose; the tests hold the fast ways against it.
    """
    out = torch.zeros_like(q)
    group = q.shape[1] // cache.k.shape[-2]
    i = 0
    for row in rows:
        for position in range(row.start, row.length):
            first = 0 if window is None else max(0, position + 1 - window)
            pages = [row.table[t // cache.block_size] for t in range(first, position + 1)]
            slots = [t % cache.block_size for t in range(first, position + 1)]
            k = cache.k[layer][pages, slots].repeat_interleave(group, dim=1)  # (L, heads, dim)
            v = cache.v[layer][pages, slots].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,lhd->hl", q[i].float(), k.float()) * scale
            out[i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v.float())
            i += 1
    return out
