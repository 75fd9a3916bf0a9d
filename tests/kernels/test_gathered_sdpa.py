"""PyTorch's own attention over gathered blocks: which rows share a call."""

from __future__ import annotations

import random

import torch

from labkit.core.attention import Span, build_metadata
from labkit.core.kv_cache import KVShape
from labkit.kernels.gathered_sdpa import SDPA, _cut
from tests.kernels.paged import DEVICE


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


def test_masks_are_cut_out_of_rows_that_the_memory_efficient_kernel_takes_as_they_are() -> None:
    rows = [Span(20, 1, [0, 1]), Span(3, 7, [2])]
    cache = KVShape(1, 2, 8, torch.float16, DEVICE).new_cache(6, 11)
    for group in build_metadata(rows, cache, SDPA).groups:
        mask = group.masks[None]
        assert mask.stride(-1) == 1 and all(stride % 16 == 0 for stride in mask.stride()[:-1])
