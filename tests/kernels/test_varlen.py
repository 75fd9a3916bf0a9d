"""Rows of any length packed into one call: each row hands over its own tokens, and no more."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from labkit.core.attention import Span, build_metadata, reference_attention, row_order
from labkit.kernels import varlen as kernels_varlen
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import gathered_rows, static_rows
from labkit.kernels.varlen import PackedChunks, packed_chunks
from tests.kernels.paged import DEVICE, filled


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    token_starts: Tensor,
    most_queries: int,
    most_tokens: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `varlen_attn` computes: each row's queries are the last of its tokens."""
    assert query_starts.dtype == token_starts.dtype == torch.int32
    assert window_size[1] == 0 and enable_gqa
    queries, tokens = query_starts.tolist(), token_starts.tolist()
    out = torch.zeros_like(q)
    for i in range(len(queries) - 1):
        n, length = queries[i + 1] - queries[i], tokens[i + 1] - tokens[i]
        assert n <= most_queries and length <= most_tokens
        at = torch.arange(length, device=q.device)
        own = at[length - n :, None]
        seen = at <= own if window_size[0] < 0 else (at <= own) & (at >= own - window_size[0])
        keys, values = (
            x[tokens[i] : tokens[i + 1]].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[queries[i] : queries[i + 1]], keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[queries[i] : queries[i + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_packed_chunks_hand_over_the_live_slots_of_each_row(
    size: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_varlen, "varlen_attention", lambda: varlen)
    torch.manual_seed(2)
    rng = random.Random(size)
    shapes = [
        (0, 2),
        (3 * size - 2, 3) if size > 1 else (5, 3),
        (2 * size, size + 1),
        (0, 4 * size + 1),
        (9, 1),
    ]
    blocks = list(range(200))
    rng.shuffle(blocks)
    rows = [Span(start, n, [blocks.pop() for _ in range(-(-(start + n) // size))]) for start, n in shapes]
    rows = [rows[i] for i in row_order(rows)]
    cache = filled(rows, 200, size, 2, 8, torch.float32)  # NaN, were one slot too many gathered
    backend = Backend("test", "", gathered_rows, packed_chunks, static_rows)
    layout = build_metadata(rows, cache, windows=[window], backend=backend)
    assert isinstance(layout.groups[-1], PackedChunks)
    q = torch.randn(sum(row.num_queries for row in rows), 6, 8, device=DEVICE)
    chunk = layout.groups[-1]
    out = chunk.attend(q[chunk.first :], cache.layers[0], scale=0.3, window=window)
    plain = reference_attention(q, cache, 0, rows, scale=0.3, window=window)[chunk.first :]
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
