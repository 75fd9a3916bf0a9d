"""Decode rows are split so that a GPU is busy, and no program has next to nothing to do."""

from __future__ import annotations

from labkit.kernels.paged_decode import num_splits


def test_splits_keep_a_gpu_busy_and_have_something_to_do() -> None:
    for programs in (1, 3, 8, 96, 1024):
        for tokens in (1, 16, 100, 4096, 131072):
            splits = num_splits(programs, tokens, 40)
            assert splits & (splits - 1) == 0
            assert splits == 1 or (programs * splits <= 160 and tokens // splits >= 64 and splits <= 64)
    assert num_splits(3, 4096, 40) == 32
    assert num_splits(256, 4096, 40) == 1
