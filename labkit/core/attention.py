"""The paged KV cache (the tensors) and attention over it.

A page holds the keys and the values of `block_size` tokens, for one layer: (2, kv_heads, block_size,
head_dim), so that what a head reads lies together. Token t of a request lies in its page
`table[t // block_size]`, at place `t % block_size`. One page more than the pool has, the null page, takes
what padding writes and fills block tables up to a common width.

`reference_attention` says what is meant, one token at a time. `attend` computes the same for a whole
flattened batch, cut into groups of rows; how a group is computed is its own affair, and the `Backend` says
which kinds of group are used. Those here need nothing but PyTorch: rows with few queries are batched over
gathered pages (their heads' groups folded into the query length, so that grouped-query attention needs no
repeated keys), longer rows go one by one. Those for a GPU are in `kernels.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_GROUPS = 4  # of decode rows with similar lengths
_MIN_GROUP = 4  # rows worth a call of their own
_FEW = 16  # queries in a row, such as drafts, with which rows still share a call


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
        self.block_size, self.kv_heads = block_size, num_kv_heads
        shape = (num_layers, num_blocks + 1, 2, num_kv_heads, block_size, head_dim)
        needed = math.prod(shape) * dtype.itemsize
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
        self.pages = torch.zeros(shape, dtype=dtype, device=device)
        # Views (layers, pages, block_size, kv_heads, head_dim).
        self.k, self.v = self.pages.transpose(3, 4).unbind(2)
        # What each layer needs at every step, looked up once.
        self._layers = list(self.pages.unbind(0))
        self._slots = [pages.view(-1, head_dim) for pages in self._layers]
        self._heads = torch.arange(num_kv_heads, device=device) * block_size

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    def layer(self, layer: int) -> Tensor:
        """The pages of one layer: (num_blocks + 1, 2, kv_heads, block_size, head_dim)."""
        return self._layers[layer]

    def slots(self, blocks: Tensor, places: Tensor) -> Tensor:
        """Where in a layer's pages tokens lie that have these places (T,) in these pages (T,), int64.

        Returns:
            (2, T * kv_heads): of the keys and of the values of each head, token by token, in vectors.
        """
        size = self.kv_heads * self.block_size
        keys = ((blocks * (2 * size) + places)[:, None] + self._heads).flatten()
        return torch.stack((keys, keys + size))

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store keys and values (T, kv_heads, head_dim) of one layer at the slots of `AttentionMetadata`."""
        pages, dim = self._slots[layer], k.shape[-1]
        pages.index_copy_(0, slots[0], k.reshape(-1, dim))
        pages.index_copy_(0, slots[1], v.reshape(-1, dim))

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, destination) in all layers: copy on write."""
        source = torch.tensor([pair[0] for pair in pairs], device=self.k.device)
        target = torch.tensor([pair[1] for pair in pairs], device=self.k.device)
        self.pages[:, target] = self.pages[:, source]

    def clear_pages(self, blocks: Sequence[int]) -> None:
        """Zero pages, so that what a failed request left there (NaN, say) reaches nobody."""
        index = torch.tensor(blocks, dtype=torch.long, device=self.k.device)
        self.pages[:, index] = 0


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


class QueryGroup(Protocol):
    """Rows `[first, last)` of the flattened batch that share one call of attention."""

    first: int
    last: int

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Queries (last - first, heads, head_dim) over one layer's pages (see `PagedKVCache.layer`)."""
        ...


@dataclass
class AttentionMetadata:
    """Where the tokens of a flattened batch lie: built once per step, used by every layer.

    `slots` (see `PagedKVCache.slots`) says where keys and values go, those of padding at the end to the null
    page.
    """

    slots: Tensor
    groups: Sequence[QueryGroup]


MakeGroups = Callable[[int, Sequence[Span], PagedKVCache, Sequence["int | None"]], "Sequence[QueryGroup]"]
MakeStatic = Callable[[Tensor, Tensor, PagedKVCache, Sequence["int | None"]], QueryGroup]


@dataclass(frozen=True)
class Backend:
    """How attention is computed.

    Args:
        name: "sdpa", or one of those in `kernels.py`.
        reason: why this one, in a few words.
        decode: makes the groups of rows with a single query, which come first in the batch, longest first;
            called with the first row's place, the rows, the cache and the windows that occur.
        chunks: makes those of the rows with more queries, likewise.
        static: makes one group of rows with a single query from tensors on the device alone, block tables
            (rows, width) and lengths (rows,), both int64, for a CUDA graph to be captured; called with
            these, the cache and the windows that occur.
    """

    name: str
    reason: str
    decode: MakeGroups
    chunks: MakeGroups
    static: MakeStatic


def build_metadata(
    rows: Sequence[Span],
    cache: PagedKVCache,
    *,
    num_padding: int = 0,
    windows: Sequence[int | None] = (None,),
    backend: Backend | None = None,
) -> AttentionMetadata:
    """Lay out a batch. `rows` must come in the order that `row_order` says."""
    backend = backend or SDPA
    size, device = cache.block_size, cache.pages.device
    blocks: list[int] = []
    places: list[int] = []
    for row in rows:
        table, tokens = row.table, range(row.start, row.length)
        blocks += [table[t // size] for t in tokens]
        places += [t % size for t in tokens]
    blocks += [cache.null_block] * num_padding
    places += [i % size for i in range(num_padding)]
    single = 0
    while single < len(rows) and rows[single].num_queries == 1:
        single += 1
    groups: list[QueryGroup] = []
    if single:
        groups += backend.decode(0, rows[:single], cache, windows)
    if single < len(rows):
        groups += backend.chunks(single, rows[single:], cache, windows)
    where = torch.tensor([blocks, places], dtype=torch.long, device=device)
    return AttentionMetadata(cache.slots(*where.unbind(0)), groups)


def row_order(rows: Sequence[Span]) -> list[int]:
    """The order that `build_metadata` wants: by the number of queries while these are few, then by length."""
    return sorted(range(len(rows)), key=lambda i: (min(rows[i].num_queries, _FEW + 1), -rows[i].length))


def attend(
    q: Tensor,
    cache: PagedKVCache,
    layer: int,
    layout: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of a flattened batch over its pages, whose keys and values are already written.

    Args:
        q: queries (T, heads, head_dim).
        layout: from `build_metadata`.
        window: how many tokens a query sees at most, itself included (None: all before it).

    Returns:
        (T, heads, head_dim); zeros for padding.
    """
    groups, pages = layout.groups, cache.layer(layer)
    if len(groups) == 1 and groups[0].last == len(q):
        return groups[0].attend(q, pages, scale=scale, window=window)
    out = torch.zeros_like(q) if not groups or groups[-1].last < len(q) else torch.empty_like(q)
    for group in groups:
        queries = q[group.first : group.last]
        out[group.first : group.last] = group.attend(queries, pages, scale=scale, window=window)
    return out


def block_table(rows: Sequence[Span], cache: PagedKVCache, width: int) -> Tensor:
    """The block tables of these rows, filled up with the null page: (rows, width), int64."""
    table: list[int] = []
    for row in rows:
        used = -(-row.length // cache.block_size)
        table += row.table[:used]
        table += [cache.null_block] * (width - used)
    return torch.tensor(table, device=cache.pages.device).view(len(rows), width)


# -- in plain PyTorch -----------------------------------------------------------------------------


@dataclass
class GatheredRows:
    """Rows of equally many queries, mostly one, in one call over pages gathered side by side.

    `blocks` (see `gather`) are the pages; `masks` maps a sliding window (None: no window) to what is added
    to the scores, (rows, 1 or kv_heads, queries, width * block_size): 0, or minus infinity where a query may
    not look.
    """

    first: int
    last: int
    blocks: Tensor
    masks: dict[int | None, Tensor]

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        k, v = gather(pages, self.blocks)
        rows, kv_heads, length, dim = k.shape
        mask = self.masks[window]
        queries = mask.shape[2]
        folded = q
        if queries > 1:  # of a group of heads, those of each head come one after the other
            folded = q.reshape(rows, queries, -1, dim).transpose(1, 2)
            mask = mask.repeat(1, 1, q.shape[1] // kv_heads, 1)
        folded = folded.reshape(rows, kv_heads, -1, dim)
        if _plainly(q):
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


@dataclass
class Chunk:
    """The queries of one row. A mask (queries, length) is added to the scores; None is plain causal."""

    first: int
    last: int
    length: int
    blocks: Tensor
    masks: dict[int | None, Tensor | None]

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        k, v = gather(pages, self.blocks)
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, : self.length] for x in (k, v))
        if group > 1:  # not every kernel of PyTorch's groups queries; to repeat the keys of one row is cheap
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        mask = self.masks[window]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return out[0].transpose(0, 1)


def gather(pages: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows, each (rows, kv_heads, width * block_size, head_dim) and in one piece.

    `blocks` (2, rows, kv_heads, width) are the parts of pages to take, as `parts` makes them.
    """
    found = pages.flatten(0, 2).index_select(0, blocks.flatten())
    k, v = found.view(*blocks.shape[:3], -1, pages.shape[-1]).unbind(0)
    return k, v


def parts(table: Tensor, kv_heads: int) -> Tensor:
    """Where the keys and the values of each head lie in the pages of a block table (rows, width).

    Counted in parts of a page, each (block_size, head_dim): (2, rows, kv_heads, width).
    """
    heads = torch.arange(kv_heads, device=table.device)[:, None]
    keys = table[:, None] * (2 * kv_heads) + heads
    return torch.stack((keys, keys + kv_heads))


def _plainly(q: Tensor) -> bool:
    """Whether to write single queries out as two batched products: on a CPU in fp32 they are faster.

    PyTorch's fused kernel makes a small product of its own for each row and head there.
    """
    return q.device.type == "cpu" and q.dtype == torch.float32


def additive(seen: Tensor, like: Tensor) -> Tensor:
    """A mask to be added to scores: 0 where something is seen, else minus infinity.

    It is cut out of rows of a multiple of 16, as PyTorch's memory-efficient kernel wants them; others it
    would copy in every layer.
    """
    *shape, length = seen.shape
    mask = torch.zeros(*shape, -(-length // 16) * 16, dtype=like.dtype, device=seen.device)
    return mask[..., :length].masked_fill_(~seen, -torch.inf)


def gathered_rows(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[GatheredRows]:
    """Groups of rows with a single query, cut where the padding of the shorter ones would be much."""
    size = cache.block_size
    groups = []
    for begin, end in _cut([-(-row.length // size) for row in rows]):
        some = rows[begin:end]
        groups.append(_gathered(first, some, cache, windows))
        first = groups[-1].last
    return groups


def _gathered(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> GatheredRows:
    """One group of rows with equally many queries, the longest row first."""
    queries = rows[0].num_queries
    tables = block_table(rows, cache, -(-rows[0].length // cache.block_size))
    starts = torch.tensor([row.start for row in rows], device=tables.device)
    positions = starts[:, None] + torch.arange(queries, device=tables.device)
    return _group(first, tables, positions, cache, windows)


def static_rows(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> GatheredRows:
    """One group of rows with a single query, from tensors on the device (see `Backend.static`)."""
    return _group(0, tables, lengths[:, None] - 1, cache, windows)


def _group(
    first: int, tables: Tensor, positions: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> GatheredRows:
    """One group of rows, from their tables (rows, width) and their queries' positions (rows, queries)."""
    at = torch.arange(tables.shape[1] * cache.block_size, device=tables.device)
    positions = positions[:, None, :, None]
    masks = {}
    for window in windows:
        seen = at <= positions
        mask = additive(seen if window is None else seen & (at > positions - window), cache.pages)
        masks[window] = mask.repeat(1, cache.kv_heads, 1, 1) if _plainly(mask) else mask
    return GatheredRows(first, first + positions.numel(), parts(tables, cache.kv_heads), masks)


def gathered_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[GatheredRows | Chunk]:
    """Rows with more than one query: together where they have equally many and few, else one by one."""
    groups: list[GatheredRows | Chunk] = []
    for queries, some in itertools.groupby(rows, lambda row: row.num_queries):
        if queries <= _FEW:
            groups.append(_gathered(first, list(some), cache, windows))
        else:
            groups += _single_chunks(first, list(some), cache, windows)
        first = groups[-1].last
    return groups


def _single_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[Chunk]:
    device = cache.pages.device
    chunks = []
    for row in rows:
        blocks = parts(block_table([row], cache, -(-row.length // cache.block_size)), cache.kv_heads)
        keys = torch.arange(row.length, device=device)
        queries = torch.arange(row.start, row.length, device=device)[:, None]
        masks: dict[int | None, Tensor | None] = {}
        for window in windows:
            if row.start == 0 and (window is None or window >= row.length):
                masks[window] = None
            else:
                seen = keys <= queries
                masks[window] = additive(
                    seen if window is None else seen & (keys > queries - window), cache.pages
                )
        chunks.append(Chunk(first, first + row.num_queries, row.length, blocks, masks))
        first += row.num_queries
    return chunks


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


SDPA = Backend(
    "sdpa", "PyTorch's own attention over gathered pages", gathered_rows, gathered_chunks, static_rows
)


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


# -- to be replaced by `labkit.core.kv_cache.KVShape`, which is the same --------------------------


@dataclass(frozen=True)
class KVShape:
    """What one token takes in the KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """A key and a value for each head of each layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """An empty cache. Raises `ValueError` if it does not fit."""
        return PagedKVCache(
            self.num_layers,
            num_blocks,
            block_size,
            self.num_kv_heads,
            self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
