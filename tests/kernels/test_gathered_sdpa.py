"""PyTorch's own attention over gathered blocks: which rows share a call."""

from __future__ import annotations

import random

from labkit.kernels.gathered_sdpa import _cut


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
