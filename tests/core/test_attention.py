"""Attention over pages: the fast way equals the plain one for any mix of rows, stale memory stays out."""

from __future__ import annotations

import random

import pytest
import torch

from labkit.core.attention import (
    PagedKVCache,
    Span,
    _cut,
    attend,
    build_metadata,
    reference_attention,
    row_order,
)

CPU = torch.device("cpu")


def cache_of(num_blocks: int, block_size: int, *, kv_heads: int = 2, dim: int = 8) -> PagedKVCache:
    return PagedKVCache(2, num_blocks, block_size, kv_heads, dim, dtype=torch.float32, device=CPU)


def random_rows(rng: random.Random, block_size: int, count: int) -> tuple[list[Span], int]:
    """Rows of any length and start, over shuffled pages."""
    shapes = []
    for _ in range(count):
        n = 1 if rng.random() < 0.6 else rng.randint(2, 20)
        shapes.append((rng.choice([0, rng.randint(0, 60)]), n))
    needs = [-(-(start + n) // block_size) for start, n in shapes]
    pages = list(range(sum(needs)))
    rng.shuffle(pages)
    rows = []
    for (start, n), need in zip(shapes, needs, strict=True):
        rows.append(Span(start, n, [pages.pop() for _ in range(need)]))
    return [rows[i] for i in row_order(rows)], sum(needs)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("count", [1, 3, 24])
def test_fast_attention_equals_the_reference(block_size: int, window: int | None, count: int) -> None:
    rng = random.Random(f"{block_size}{window}{count}")
    torch.manual_seed(0)
    for _ in range(4):
        rows, blocks = random_rows(rng, block_size, count)
        cache = cache_of(blocks, block_size)
        cache.k.normal_()
        cache.v.normal_()
        total = sum(row.num_queries for row in rows)
        padding = rng.choice([0, 3])
        q = torch.randn(total + padding, 6, 8)
        layout = build_metadata(rows, cache, num_padding=padding, windows=[None, window])
        fast = attend(q, cache, 1, layout, scale=0.3, window=window)
        plain = reference_attention(q, cache, 1, rows, scale=0.3, window=window)
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
        assert not fast[total:].any()


def test_slots_follow_the_block_table_and_padding_goes_to_the_null_page() -> None:
    cache = cache_of(5, 4)
    rows = [Span(6, 1, [3, 1]), Span(2, 4, [0, 4])]
    layout = build_metadata(rows, cache, num_padding=2)
    page = 2 * 2 * 4  # keys and values of two heads, four tokens each
    keys = [1 * page + 2, 2, 3, 4 * page, 4 * page + 1, 5 * page, 5 * page + 1]
    heads = [slot + head * 4 for slot in keys for head in range(2)]
    assert layout.slots.tolist() == [heads, [slot + 2 * 4 for slot in heads]]


def test_decode_rows_are_grouped_by_length() -> None:
    assert _cut([]) == []
    assert _cut([5, 5, 4]) == [(0, 3)]
    widths = [40] * 5 + [20] * 6 + [4] * 9
    assert _cut(widths) == [(0, 5), (5, 11), (11, 20)]
    for _ in range(200):
        widths = sorted((random.randint(1, 64) for _ in range(random.randint(1, 64))), reverse=True)
        cuts = _cut(widths)
        assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])]
        assert cuts[-1][1] == len(widths)
        assert len(cuts) <= 4


def test_stale_memory_of_a_failed_request_is_cleared() -> None:
    cache = cache_of(3, 4)
    cache.k[:, 1], cache.v[:, 1] = torch.nan, torch.nan
    row = Span(2, 1, [1])
    q = torch.ones(1, 2, 8)
    layout = build_metadata([row], cache)
    cache.write(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8), layout.slots)
    assert attend(q, cache, 0, layout, scale=1.0).isnan().any()  # what clearing is for
    cache.clear_pages([1])
    assert cache.k[:, 1].eq(0).all()
    assert attend(q, cache, 0, layout, scale=1.0).isfinite().all()


def test_copied_pages_are_equal_in_every_layer() -> None:
    cache = cache_of(4, 2)
    cache.k.normal_()
    cache.v.normal_()
    cache.copy_pages([(0, 2), (1, 3)])
    assert torch.equal(cache.k[:, 0], cache.k[:, 2])
    assert torch.equal(cache.v[:, 1], cache.v[:, 3])
    assert not torch.equal(cache.k[0, 0], cache.k[1, 0])


def test_a_cache_that_does_not_fit_says_how_much_it_needs() -> None:
    with pytest.raises(ValueError, match=r"num_blocks=100000000 needs [\d.]+ GiB for the KV cache"):
        cache_of(100_000_000, 16, kv_heads=64, dim=128)
