"""Attention on a CPU that reads the keys and values of a row in their blocks, where they lie.

A row with one query, or with the few of its drafts, reads each key once for all query heads that share it.
Longer rows go to `gathered_sdpa`, whose products are larger than the copy that they need.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.core.attention import QueryGroup, Span
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import FEW, block_table, gathered_chunks, static_rows

_ENDLESS = 2**62  # the window of a layer without one


@dataclass
class InPlaceRows:
    """Rows with the same number of queries. `tables` are (rows, width), `lengths` (rows * queries,), int64.

    A length says how many tokens of its row a query sees, where it has no window.
    """

    first: int
    last: int
    tables: Tensor
    lengths: Tensor

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        return torch.ops.labkit_cpu.paged_attention(
            q.contiguous(), blocks, self.tables, self.lengths, scale, window or _ENDLESS
        )


def in_place_rows(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[InPlaceRows]:
    """Make one group of rows with the same number of queries; the longest row comes first."""
    tables = block_table(rows, cache, -(-rows[0].length // cache.block_size))
    lengths = torch.tensor([end for row in rows for end in range(row.start + 1, row.length + 1)])
    return [InPlaceRows(first, first + len(lengths), tables, lengths)]


def in_place_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[QueryGroup]:
    """Make groups of rows with more than one query: few are read in place, more are gathered."""
    groups: list[QueryGroup] = []
    for queries, some in itertools.groupby(rows, lambda row: row.num_queries):
        make = in_place_rows if queries <= FEW else gathered_chunks
        groups += make(first, list(some), cache, windows)
        first = groups[-1].last
    return groups


IN_PLACE = Backend(
    "in place", "a kernel of our own reads blocks in place", in_place_rows, in_place_chunks, static_rows
)
