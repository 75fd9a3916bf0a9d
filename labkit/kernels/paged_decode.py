"""Decode rows for the kernel in `flash_decoding`, which reads blocks in place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.gathered_sdpa import block_table
from labkit.kernels.occupancy import programs_at_once

_MIN_SPLIT = 64  # tokens that are worth a program of their own
_MAX_SPLITS = 64


@dataclass
class PagedDecode:
    """Rows of one query each, whose blocks are read in place.

    `tables` (rows, width) lists their blocks and `lengths` (rows,) counts their tokens, both int32 or int64
    on the device. Python knows only `splits` and the shapes, so a CUDA graph can freeze the call.
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
    """Make one group of all rows with a single query: a short row costs no more beside a long one."""
    tables = block_table(rows, cache, -(-rows[0].length // cache.block_size))
    lengths = torch.tensor([row.length for row in rows], device=tables.device)
    return [_paged(first, tables, lengths, cache)]


def static_paged_rows(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> PagedDecode:
    """Make the same group from tensors on the device (see `Backend.static`)."""
    return _paged(0, tables, lengths, cache)


def _paged(first: int, tables: Tensor, lengths: Tensor, cache: PagedKVCache) -> PagedDecode:
    rows, width = tables.shape
    programs, tokens = rows * cache.num_kv_heads, width * cache.block_size
    at_once = programs_at_once(cache.layers[0])
    splits = num_splits(programs, tokens, _processors(tables.device), at_once)
    return PagedDecode(first, first + rows, tables, lengths, splits)


def num_splits(programs: int, tokens: int, processors: int, at_once: int = 4) -> int:
    """Return into how many programs to split each of `programs`, which have at most so many tokens.

    They are enough to keep a GPU busy with so many processors, each of which runs `at_once` programs at once,
    but each has some tokens to work on. The number is a power of two.
    """
    wanted = min(at_once * processors // programs, tokens // _MIN_SPLIT, _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
