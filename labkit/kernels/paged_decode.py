"""Rows with a single query over blocks where they lie: what calls the kernel in `flash_decoding`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.gathered_sdpa import block_table

_MIN_SPLIT = 64  # tokens that are worth a program of their own
_MAX_SPLITS = 64
_PROGRAMS = 4  # for each processor of the GPU: what is wanted in flight


@dataclass
class PagedDecode:
    """Rows of one query each, over blocks where they lie.

    `tables` (rows, width) are their blocks and `lengths` (rows,) their tokens, both int32 or int64 and on the
    device. `splits` and the shapes are all that is known of them here: a CUDA graph may freeze those.
    """

    first: int
    last: int
    tables: Tensor
    lengths: Tensor
    splits: int

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        from labkit.kernels.flash_decoding import paged_decode  # needs Triton

        return paged_decode(
            q, blocks, self.tables, self.lengths, scale=scale, window=window, splits=self.splits
        )


def paged_rows(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[PagedDecode]:
    """One group for all rows with a single query: a short one costs no more beside a long one."""
    tables = block_table(rows, cache, -(-rows[0].length // cache.block_size))
    lengths = torch.tensor([row.length for row in rows], device=tables.device)
    return [_paged(first, tables, lengths, cache)]


def static_paged_rows(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> PagedDecode:
    """The same from tensors on the device (see `Backend.static`)."""
    return _paged(0, tables, lengths, cache)


def _paged(first: int, tables: Tensor, lengths: Tensor, cache: PagedKVCache) -> PagedDecode:
    rows, width = tables.shape
    splits = num_splits(rows * cache.num_kv_heads, width * cache.block_size, _processors(tables.device))
    return PagedDecode(first, first + rows, tables, lengths, splits)


def num_splits(programs: int, tokens: int, processors: int) -> int:
    """Into how many programs to split each of `programs`, which have so many tokens at most.

    As many as keep a GPU with so many processors busy, but not so many that they have next to nothing to do;
    a power of two.
    """
    wanted = min(_PROGRAMS * processors // programs, tokens // _MIN_SPLIT, _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
