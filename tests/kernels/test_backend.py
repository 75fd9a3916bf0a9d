"""A backend cuts a batch into groups, each for the kernel that is made for it."""

from __future__ import annotations

import torch

from labkit.core.attention import Span, attend, build_metadata, reference_attention
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import gathered_chunks
from labkit.kernels.paged_decode import PagedDecode, paged_rows, static_paged_rows
from tests.kernels.paged import DEVICE, filled, needs_triton, rows_of


@needs_triton
def test_a_mixed_batch_goes_through_both_kinds_of_group() -> None:
    torch.manual_seed(1)
    single, num_blocks = rows_of([33, 16, 5], 4)
    blocks = list(range(num_blocks, num_blocks + 12))
    rows = [*single, Span(9, 6, blocks[:4]), Span(0, 5, blocks[4:6])]
    cache = filled(rows, num_blocks + 12, 4, 2, 8, torch.float32)
    cache.blocks.nan_to_num_(0)  # gathered blocks are read to their end
    q = torch.randn(16, 6, 8, device=DEVICE)
    backend = Backend("triton", "", paged_rows, gathered_chunks, static_paged_rows)
    layout = build_metadata(rows, cache, num_padding=2, windows=[None, 5], backend=backend)
    assert isinstance(layout.groups[0], PagedDecode)
    assert [(group.first, group.last) for group in layout.groups] == [(0, 3), (3, 9), (9, 14)]
    for window in (None, 5):
        out = attend(q, cache, 0, layout, scale=0.3, window=window)
        plain = reference_attention(q, cache, 0, rows, scale=0.3, window=window)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
