"""Attention that reads blocks in place: the reference's numbers, and nothing but what a query sees."""

from __future__ import annotations

import random

import pytest
import torch

from labkit.core.attention import Span, attend, build_metadata, reference_attention, row_order
from labkit.kernels.cpu.attention import IN_PLACE, InPlaceRows
from labkit.kernels.gathered_sdpa import FEW
from tests.kernels.cpu.compiled import needs_compiler
from tests.kernels.paged import filled

pytestmark = needs_compiler

# Sizes of heads that fill vectors of 4, 8 and 16 numbers, and that leave a rest; groups small and large.
SHAPES = [(3, 3, 8), (9, 3, 64), (14, 2, 64), (12, 1, 80), (10, 1, 24), (4, 2, 6)]


def mixed_rows(rng: random.Random, size: int) -> tuple[list[Span], int]:
    """Rows of 1 to more than a few queries, in the order for backends, and how many blocks there are."""
    shapes = [(rng.randint(0, 40), n) for n in (1, 1, 1, 2, 2, 5, FEW, FEW + 1)]
    blocks = list(range(sum(-(-(start + n) // size) for start, n in shapes) + 2))
    count = len(blocks)
    rng.shuffle(blocks)
    rows = [Span(start, n, [blocks.pop() for _ in range(-(-(start + n) // size))]) for start, n in shapes]
    return [rows[i] for i in row_order(rows)], count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, dim", SHAPES)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_it_equals_the_reference(heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    rows, num_blocks = mixed_rows(random.Random(size), size)
    cache = filled(rows, num_blocks, size, kv_heads, dim, dtype)  # NaN in all places of other requests
    cache.blocks[:, cache.null_block] = 0
    tokens = sum(row.num_queries for row in rows)
    q = torch.randn(tokens, heads, dim).to(dtype)
    windows = (None, 1, 7)
    metadata = build_metadata(rows, cache, IN_PLACE, windows=windows, num_padding=2)
    assert [type(group) is InPlaceRows for group in metadata.groups] == [True] * 4 + [False]
    padded = torch.cat((q, q[:2]))
    for window in windows:
        got = attend(padded, cache, 0, metadata, scale=dim**-0.5, window=window)
        want = reference_attention(q, cache, 0, rows, scale=dim**-0.5, window=window)
        close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        few = sum(row.num_queries for row in rows if row.num_queries <= FEW)  # the others are gathered
        torch.testing.assert_close(got[:few], want[:few], **close)
        assert not got[tokens:].any()  # padding


def test_huge_scores_and_equal_scores_are_weighed_as_a_softmax_weighs_them() -> None:
    row = Span(19, 1, [1, 0])
    cache = filled([row], 2, 16, 2, 8, torch.float32)
    for factor in (0.0, 1e30):
        q = torch.full((1, 4, 8), factor)
        metadata = build_metadata([row], cache, IN_PLACE)
        got = attend(q, cache, 0, metadata, scale=1.0)
        want = reference_attention(q, cache, 0, [row], scale=1.0)
        torch.testing.assert_close(got, want)


def test_a_row_with_nan_keeps_it_and_gives_it_to_no_other() -> None:
    rows = [Span(20, 1, [0, 1]), Span(9, 1, [2])]
    cache = filled(rows, 3, 16, 3, 64, torch.float32)
    cache.blocks[0, 0, 0, :, 3] = torch.nan
    out = attend(torch.randn(2, 9, 64), cache, 0, build_metadata(rows, cache, IN_PLACE), scale=0.125)
    assert out[0].isnan().any() and out[1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(threads: int) -> None:
    torch.manual_seed(0)
    rows = [Span(30 - i, 1, [2 * i, 2 * i + 1]) for i in range(9)]
    cache = filled(rows, 18, 16, 3, 64, torch.float32)
    q = torch.randn(9, 9, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = attend(q, cache, 0, build_metadata(rows, cache, IN_PLACE), scale=0.125)
    finally:
        torch.set_num_threads(before)
    for i, row in enumerate(rows):
        alone = attend(q[i : i + 1], cache, 0, build_metadata([row], cache, IN_PLACE), scale=0.125)
        assert torch.equal(alone[0], together[i])
