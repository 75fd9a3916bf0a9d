"""An attention backend made of three parts: for decode rows, for longer rows, and for CUDA graphs."""

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
        reason: the reason for choosing it, in a few words.
        decode: a function that makes the groups of the rows with a single query, which come first in the
            batch, the longest first. Its arguments are the place of the first query, the rows, the cache
            and the windows that occur in the model.
        chunks: a function that does the same for the rows with more queries.
        static: a function that makes one group of rows with a single query, so that a CUDA graph can be
            captured: it reads nothing but tensors on the device. Its arguments are block tables (rows,
            width) and lengths (rows,), both int64, the cache and the windows that occur.
    """

    name: str
    reason: str
    decode: MakeGroups
    chunks: MakeGroups
    static: MakeStatic

    def groups(
        self, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> list[QueryGroup]:
        """Cut the rows of a batch into groups. `row_order` has put the decode rows first."""
        single = 0
        while single < len(rows) and rows[single].num_queries == 1:
            single += 1
        groups: list[QueryGroup] = []
        if single:
            groups += self.decode(0, rows[:single], cache, windows)
        if single < len(rows):
            groups += self.chunks(single, rows[single:], cache, windows)
        return groups
