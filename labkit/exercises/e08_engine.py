"""Runs the engine with an attention of one's own for its decode rows (notebook 08)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.exercises.common import PROMPTS, answers, exactly, tiny_engine
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA, gathered_rows
from labkit.trace.trace import Trace

Read = Callable[[int], tuple[Tensor, Tensor]]
PagedAttention = Callable[[Tensor, Read, Sequence[int], int, int], Tensor]

_ANSWERS = (30, 22, 12)


@dataclass
class PagedRows:
    """Rows of one query each, given to a function row by row and key head by key head.

    `tables` and `lengths` are the block table and the number of tokens of each row.
    """

    first: int
    last: int
    tables: list[Sequence[int]]
    lengths: list[int]
    cache: PagedKVCache
    attention: PagedAttention

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        if window is not None:
            raise ValueError("a function of the notebook knows no sliding window")
        out = torch.empty_like(q)
        group = q.shape[1] // self.cache.num_kv_heads
        for row, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            for head in range(self.cache.num_kv_heads):
                mine = slice(head * group, (head + 1) * group)  # query heads that share this key head
                read = functools.partial(_read, pages, head)
                out[row, mine] = self.attention(
                    q[row, mine] * scale, read, table, length, self.cache.block_size
                )
        return out


def _read(pages: Tensor, head: int, block: int) -> tuple[Tensor, Tensor]:
    """The keys and the values of one head in one page, each (block_size, head_dim): views, not copies."""
    keys, values = pages[block]
    return keys[head], values[head]


def backend_of(attention: PagedAttention) -> Backend:
    """An attention backend whose decode rows go through a function, and the others through PyTorch's."""

    def decode(
        first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> list[PagedRows]:
        tables, lengths = [row.table for row in rows], [row.length for row in rows]
        return [PagedRows(first, first + len(rows), tables, lengths, cache, attention)]

    return replace(SDPA, name="yours", decode=decode)


def run_engine(backend: Backend = SDPA) -> tuple[Trace, dict[str, list[int]]]:
    """Run three requests in the real engine, with tiny-random and pages of 4 tokens.

    Returns:
        The trace, and the tokens of each answer by the request's name.
    """
    engine = tiny_engine(num_blocks=64, block_size=4)
    engine.runner.backend = backend
    for name, prompt, tokens in zip("abc", PROMPTS, _ANSWERS, strict=True):
        engine.add_request(prompt, exactly(tokens), request_id=name)
    return engine.run(), answers(engine)


def bytes_moved(rows: Sequence[Span], cache: PagedKVCache) -> tuple[int, int]:
    """Bytes of keys and values that the attention of these rows moves in one layer: gathered, and in place.

    To gather is to read pages, write them side by side, and read them again; all rows of a call are as wide
    as the longest. In place, each page of a row is read once.
    """
    page = cache.blocks.nbytes // len(cache.blocks) // (cache.num_blocks + 1)
    gathered = 0
    for group in gathered_rows(0, rows, cache, [None]):
        width = group.masks[None].shape[-1] // cache.block_size
        gathered += 3 * (group.last - group.first) * width * page
    return gathered, sum(-(-row.length // cache.block_size) for row in rows) * page
