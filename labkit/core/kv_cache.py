"""The paged KV cache as tensors. Only this file of core knows how a block lies in memory.

A block holds the keys and the values of `block_size` tokens of a request, for one layer:

    (2, num_kv_heads, block_size, head_dim)        2: keys, then values

so that what one head reads lies together. Token t of a request lies in its block `table[t // block_size]`, in
place `t % block_size` there. There is one block more than the pool has, the null block: padding tokens write
to it, and it fills block tables up to a common width.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """What one token needs in the cache of a model: a key and a value for each head of each layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """Return an empty cache of this shape."""
        return PagedKVCache(self, num_blocks, block_size)


class PagedKVCache:
    """Keys and values of all layers, in blocks. `num_blocks` does not count the null block, the last one."""

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int) -> None:
        self.num_blocks = self.null_block = num_blocks
        self.block_size, self.num_kv_heads = block_size, shape.num_kv_heads
        # (layers, blocks, 2, kv_heads, block_size, head_dim)
        sizes = shape.num_layers, num_blocks + 1, 2, shape.num_kv_heads, block_size, shape.head_dim
        # Zeros, not garbage: a masked score still multiplies its value, and 0 * NaN is NaN.
        if shape.device.type == "cpu":  # the system zeroes such memory, and takes it, when it is touched
            memory = mmap.mmap(-1, math.prod(sizes) * shape.dtype.itemsize)
            self.blocks = torch.frombuffer(memory, dtype=shape.dtype).view(sizes)
        else:
            self.blocks = torch.zeros(sizes, dtype=shape.dtype, device=shape.device)
        # The same memory, seen by token: (layers, blocks, block_size, kv_heads, head_dim).
        self.k, self.v = self.blocks.transpose(3, 4).unbind(2)
        self.device, self.dtype = self.blocks.device, shape.dtype
        # For each layer: (blocks, 2, kv_heads, block_size, head_dim), and the same memory as (n, head_dim).
        self.layers = self.blocks.unbind(0)
        self._vectors = [blocks.view(-1, shape.head_dim) for blocks in self.layers]
        # Where the vectors of each head begin in a block: (kv_heads,).
        self._heads = torch.arange(shape.num_kv_heads, device=shape.device) * block_size

    def slots(self, blocks: Tensor, places: Tensor) -> Tensor:
        """Return where the vectors of tokens lie in a layer, from their blocks (T,) and places there (T,).

        The result is int64 (2, T * kv_heads): the keys, then the values, of each head, token by token.
        """
        size = self.num_kv_heads * self.block_size  # so many keys in a block, and then so many values
        keys = ((blocks * (2 * size) + places)[:, None] + self._heads).flatten()  # (T * kv_heads,)
        return torch.stack((keys, keys + size))

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store keys and values (T, kv_heads, head_dim) of one layer where `slots` says."""
        vectors, dim = self._vectors[layer], k.shape[-1]
        vectors.index_copy_(0, slots[0], k.reshape(-1, dim))
        vectors.index_copy_(0, slots[1], v.reshape(-1, dim))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers, for copy on write."""
        source, target = torch.tensor(pairs, device=self.device).unbind(1)
        self.blocks[:, target] = self.blocks[:, source]

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zero blocks, so that what a failed request left there (NaN, say) reaches no other request."""
        self.blocks[:, torch.tensor(blocks, dtype=torch.long, device=self.device)] = 0


def read_tokens(blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values (T, kv_heads, head_dim) in these slots of one layer."""
    kv_heads, dim = blocks.shape[2], blocks.shape[4]
    found = blocks.view(-1, dim).index_select(0, slots.flatten())  # (2 * T * kv_heads, head_dim)
    k, v = found.view(2, -1, kv_heads, dim).unbind(0)
    return k, v


def head_pieces(tables: Tensor, kv_heads: int) -> Tensor:
    """Number the pieces (block_size, head_dim) of tables (rows, width): (2, rows, kv_heads, width)."""
    heads = torch.arange(kv_heads, device=tables.device)[:, None]
    keys = tables[:, None] * (2 * kv_heads) + heads  # (rows, kv_heads, width)
    return torch.stack((keys, keys + kv_heads))


def read_rows(blocks: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values (rows, kv_heads, width * block_size, head_dim) of whole tables, contiguous."""
    found = blocks.flatten(0, 2).index_select(0, pieces.flatten())
    k, v = found.view(*pieces.shape[:3], -1, blocks.shape[-1]).unbind(0)
    return k, v
