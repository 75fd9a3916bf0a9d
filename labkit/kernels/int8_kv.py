"""A KV cache in 8 bits: whole numbers, with a scale for each token and head.

A key x of a head becomes `round(x / scale)`, from -127 to 127, with `scale = max |x| / 127`; so does a value.
So no number is off by more than half a scale, and a token with large numbers makes no other coarse: scales
are found when a token is written, and need no calibration. Whoever reads computes in the dtype of the model.
A kernel need not even make numbers of that dtype in memory: a key's scale can be multiplied into its score,
and a value's into its weight.

Where a cache of the model's dtype has a piece (block_size, head_dim) of one head, this one has

    block_size * head_dim whole numbers of 8 bits, then block_size scales in fp32

so a block still is one piece of memory, and whoever copies or moves blocks takes the scales along. With a
head_dim of 64, that is 0.27 of the bytes of fp32, and 0.53 of those of 16 bits.

A token's numbers depend on its own key and value alone. So they are the same in a chunk, a later step or a
shared block, as far as sums in another order leave keys and values the same: a difference in the last bit
may, rarely, round to the next whole number. Tokens need not equal those of `transformers`, whose cache is
exact; `tests/kernels/test_int8_kv.py` bounds what that costs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from labkit.core import kv_cache
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.core.model_runner import PagedModel

SCALE_BYTES = 4  # in fp32: 16 bits would save 0.01 of fp32's bytes, and not hold the numbers of every model
_LEVELS = 127
_TINY = torch.finfo(torch.float32).tiny  # the scale of a vector of zeros


def kv_shape(model: PagedModel, kv_cache_dtype: str | None) -> KVShape:
    """Return what a token needs in the cache of a model.

    Args:
        model: the model.
        kv_cache_dtype: what `EngineConfig` says: None or "auto" for the model's own dtype, or "int8".

    Raises:
        ValueError: if the model's heads do not fit; the message names field and limit.
    """
    return in_int8(model.kv_shape) if kv_cache_dtype == "int8" else model.kv_shape


@functools.singledispatch
def in_int8(shape: KVShape) -> KVShape:
    """Return the shape of the same cache in 8 bits. Raises as `kv_shape` does."""
    return Int8KVShape(**{field.name: getattr(shape, field.name) for field in fields(shape)})


@dataclass(frozen=True)
class Int8KVShape(KVShape):
    """What one token needs in a cache in 8 bits. `dtype` is the model's."""

    def __post_init__(self) -> None:
        if self.head_dim % SCALE_BYTES:  # or scales would not lie where a processor reads them
            raise ValueError(
                f"kv_cache_dtype 'int8' needs a head_dim that {SCALE_BYTES} divides, not {self.head_dim}"
            )

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim + SCALE_BYTES)

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        return Int8KVCache(self, num_blocks, block_size)


class Int8KVCache(PagedKVCache):
    """Keys and values of all layers, in 8 bits.

    `blocks` (layers, blocks, 2, kv_heads, block_size, head_dim + 4) in int8 holds whole numbers and scales:
    only `split` knows which is which, and there is no view by token as `k` and `v`. `dtype` is the dtype in
    which they are read.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int) -> None:
        width = shape.head_dim + SCALE_BYTES
        sizes = shape.num_layers, shape.num_kv_heads, width, torch.int8, shape.device
        super().__init__(KVShape(*sizes), num_blocks, block_size)
        del self.k, self.v
        self.dtype = shape.dtype
        self._parts = [split(blocks.flatten(0, 2)) for blocks in self.layers]

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store keys and values (T, kv_heads, head_dim) of one layer where `slots` says."""
        numbers, scales = self._parts[layer]
        for x, where in zip((k, v), slots.unbind(0), strict=True):
            place = where // self.block_size, where % self.block_size
            numbers[place], scales[place] = quantize(x.flatten(0, 1))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round vectors (..., head_dim) of any float dtype to whole numbers.

    Returns:
        Numbers (..., head_dim) in int8 and scales (...) in fp32, with `x ~ numbers * scales`. What was NaN or
        infinite has a scale that is, too.
    """
    x = x.float()
    scales = (x.abs().amax(-1) / _LEVELS).clamp_(min=_TINY)
    return (x / scales[..., None]).round_().to(torch.int8), scales


def split(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Cut pieces (..., block_size, head_dim + 4) into what they hold; both share their memory.

    Returns:
        Numbers (..., block_size, head_dim) in int8, and scales (..., block_size) in fp32.
    """
    size, width = blocks.shape[-2:]
    count = size * (width - SCALE_BYTES)
    flat = blocks.flatten(-2)
    return flat[..., :count].unflatten(-1, (size, -1)), flat[..., count:].view(torch.float32)


def dequantize(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the keys and values (..., block_size, head_dim) of pieces (..., block_size, head_dim + 4)."""
    numbers, scales = split(blocks)
    return numbers.to(dtype).mul_(scales[..., None])  # whole numbers are exact in any dtype


def read_tokens(blocks: Tensor, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values (T, kv_heads, head_dim) in these slots of one layer, of either cache."""
    if blocks.dtype != torch.int8:
        return kv_cache.read_tokens(blocks, slots)
    kv_heads, size = blocks.shape[2:4]
    numbers, scales = split(blocks.flatten(0, 2))
    place = slots // size, slots % size  # (2, T * kv_heads)
    found = numbers[place].to(dtype).mul_(scales[place][..., None])
    k, v = found.unflatten(1, (-1, kv_heads)).unbind(0)
    return k, v


def read_rows(blocks: Tensor, pieces: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return keys and values (rows, kv_heads, width * block_size, head_dim) of tables, of either cache."""
    if blocks.dtype != torch.int8:
        return kv_cache.read_rows(blocks, pieces)
    found = dequantize(blocks.flatten(0, 2).index_select(0, pieces.flatten()), dtype)
    k, v = found.view(*pieces.shape[:3], -1, found.shape[-1]).unbind(0)
    return k, v
