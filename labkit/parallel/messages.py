"""What the first process tells the others, on their standard input. No tensors here.

Pickles are safe there: the pipe is private, and both ends are this program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Edit = tuple[str, list[Any]]  # a method of `PagedKVCache`, and its argument


@dataclass
class Load:
    """Load a part of a model, say so, and meet the others."""

    arguments: dict[str, Any]  # of `load_model`
    meeting: str  # the file of the `Group`
    threads: int  # of PyTorch


@dataclass
class Forward:
    """Compute the tokens of a flattened batch."""

    cache: int  # its number; it is made when it is named first
    num_blocks: int
    block_size: int
    int8_kv: bool  # whether it holds 8 bits
    edits: list[Edit]  # what was done to it since it was named last
    dropped: list[int]  # caches that are gone
    token_ids: list[int]
    positions: list[int]
    rows: list[tuple[int, int, list[int]]]  # start, number of queries and block table of each `Span`


@dataclass
class Logits:
    """Compute logits of so many rows of hidden states, which are broadcast next."""

    rows: int


Message = Forward | Logits
