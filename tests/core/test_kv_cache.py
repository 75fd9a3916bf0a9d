"""The cache in memory: slots follow the block table, copies are equal, stale memory stays out."""

from __future__ import annotations

import torch

from labkit.core.attention import PlainAttention, Span, attend, build_metadata
from labkit.core.kv_cache import KVShape, PagedKVCache

CPU = torch.device("cpu")


def cache_of(num_blocks: int, block_size: int, *, kv_heads: int = 2, dim: int = 8) -> PagedKVCache:
    return KVShape(2, kv_heads, dim, torch.float32, CPU).new_cache(num_blocks, block_size)


def test_slots_follow_the_block_table_and_padding_goes_to_the_null_block() -> None:
    cache = cache_of(5, 4)
    rows = [Span(6, 1, [3, 1]), Span(2, 4, [0, 4])]
    layout = build_metadata(rows, cache, PlainAttention(), num_padding=2)
    block = 2 * 2 * 4  # keys and values of two heads, four tokens each
    keys = [1 * block + 2, 2, 3, 4 * block, 4 * block + 1, 5 * block, 5 * block + 1]
    heads = [slot + head * 4 for slot in keys for head in range(2)]
    assert layout.slots.tolist() == [heads, [slot + 2 * 4 for slot in heads]]


def test_stale_memory_of_a_failed_request_is_cleared() -> None:
    cache = cache_of(3, 4)
    cache.k[:, 1], cache.v[:, 1] = torch.nan, torch.nan
    row = Span(2, 1, [1])
    q = torch.ones(1, 2, 8)
    layout = build_metadata([row], cache, PlainAttention())
    cache.write(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8), layout.slots)
    assert attend(q, cache, 0, layout, scale=1.0).isnan().any()  # what clearing is for
    cache.clear_blocks([1])
    assert cache.k[:, 1].eq(0).all()
    assert attend(q, cache, 0, layout, scale=1.0).isfinite().all()


def test_copied_blocks_are_equal_in_every_layer() -> None:
    cache = cache_of(4, 2)
    cache.k.normal_()
    cache.v.normal_()
    cache.copy_blocks([(0, 2), (1, 3)])
    assert torch.equal(cache.k[:, 0], cache.k[:, 2])
    assert torch.equal(cache.v[:, 1], cache.v[:, 3])
    assert not torch.equal(cache.k[0, 0], cache.k[1, 0])


def test_a_token_takes_a_key_and_a_value_of_each_head_and_layer() -> None:
    shape = KVShape(3, 2, 8, torch.float16, CPU)
    assert shape.bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert shape.new_cache(4, 16).blocks.nbytes == 5 * 16 * shape.bytes_per_token  # and the null block
