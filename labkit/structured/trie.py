"""The tokens of a vocabulary as a trie: tokens that begin alike share a path from its root."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import numpy as np


class Trie:
    """The tokens of a vocabulary by their bytes, level by level.

    Args:
        tokens: the bytes of each token; those without any are in no text.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.num_tokens = len(tokens)
        self._sorted = sorted(set(tokens))
        # For each level: the parent of each node, in the level above; its byte; and which tokens end in it.
        self.levels: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        open_ = [(0, number, token) for number, token in enumerate(tokens) if token]
        depth = 0
        while open_:
            nodes: dict[tuple[int, int], int] = {}
            deeper = []
            ends: list[tuple[int, int]] = []
            for parent, number, token in open_:
                node = nodes.setdefault((parent, token[depth]), len(nodes))
                if len(token) > depth + 1:
                    deeper.append((node, number, token))
                else:
                    ends.append((node, number))
            parents, data = np.array(list(nodes)).T
            at, which = np.array(ends, dtype=np.int64).reshape(-1, 2).T
            self.levels.append((parents, data, at, which))
            open_, depth = deeper, depth + 1

    def walk(self, table: np.ndarray, state: int) -> np.ndarray:
        """Return the state after each token, from this one on; 0 if the token leads nowhere."""
        after = np.zeros(self.num_tokens, np.int32)
        here = np.array([state], np.int32)
        for parents, data, nodes, tokens in self.levels:
            here = table[here[parents], data]
            if not here.any():
                break
            after[tokens] = here[nodes]
        return after

    def open_ends(self, text: bytes, follows: frozenset[int]) -> Iterator[int]:
        """Yield where in a text a token may begin that goes on after it, with one of these bytes."""
        longest = len(self.levels) - 1
        for begin in range(max(0, len(text) - longest), len(text)):
            tail = text[begin:]
            low, high = bisect_right(self._sorted, tail), bisect_left(self._sorted, tail + b"\xff" * longest)
            if any(token[len(tail)] in follows for token in self._sorted[low:high]):
                yield begin
