"""A backend made of parts: for rows with a single query, for longer rows, and for graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from labkit.core.attention import QueryGroup, Span
from labkit.core.kv_cache import PagedKVCache

MakeGroups = Callable[[int, Sequence[Span], PagedKVCache, Sequence["int | None"]], "Sequence[QueryGroup]"]
MakeStatic = Callable[[Tensor, Tensor, PagedKVCache, Sequence["int | None"]], QueryGroup]


@dataclass(frozen=True)
class Backend:
    """How attention is computed: a `labkit.core.attention.AttentionBackend`.

    Args:
        name: "sdpa" or "triton".
        reason: why it was chosen, in a few words.
        decode: makes the groups of the rows with a single query, which come first in the batch, longest
            first; called with the first row's place, the rows, the cache and the windows that occur.
        chunks: makes those of the rows with more queries, likewise.
        static: makes one group of rows with a single query from tensors on the device alone, block tables
            (rows, width) and lengths (rows,), both int64, so that a CUDA graph can be captured; called with
            these, the cache and the windows that occur.
    """

    name: str
    reason: str
    decode: MakeGroups
    chunks: MakeGroups
    static: MakeStatic

    def groups(
        self, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> list[QueryGroup]:
        single = 0
        while single < len(rows) and rows[single].num_queries == 1:
            single += 1
        groups: list[QueryGroup] = []
        if single:
            groups += self.decode(0, rows[:single], cache, windows)
        if single < len(rows):
            groups += self.chunks(single, rows[single:], cache, windows)
        return groups
