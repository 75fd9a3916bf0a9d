"""Decode rows are split so that a GPU is busy, and no program has next to nothing to do."""

from __future__ import annotations

import pytest
import torch

from labkit.core.kv_cache import KVShape
from labkit.kernels import occupancy, paged_decode
from labkit.kernels.occupancy import note_registers, programs_at_once, programs_for
from labkit.kernels.paged_decode import num_splits, static_paged_rows


def test_splits_keep_a_gpu_busy_and_have_something_to_do() -> None:
    for programs in (1, 3, 8, 96, 1024):
        for tokens in (1, 16, 100, 4096, 131072):
            splits = num_splits(programs, tokens, 40)
            assert splits & (splits - 1) == 0
            assert splits == 1 or (programs * splits <= 160 and tokens // splits >= 64 and splits <= 64)
    assert num_splits(3, 4096, 40) == 32
    assert num_splits(256, 4096, 40) == 1


def test_registers_limit_how_many_programs_run_at_once() -> None:
    known = {32: 8, 64: 8, 72: 7, 128: 4, 129: 3, 168: 3, 169: 2, 240: 2, 255: 2, 512: 1, 9999: 1}
    assert {registers: programs_for(registers) for registers in known} == known
    for registers in range(1, 256):
        assert programs_for(registers) * 128 * registers <= 65536
        assert programs_for(registers) >= programs_for(registers + 1)


def test_a_compiled_kernel_decides_how_many_splits_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "_found", {})
    monkeypatch.setattr(paged_decode, "_processors", lambda device: 40)
    cache = KVShape(1, 8, 64, torch.float16, torch.device("cpu")).new_cache(4, 16)
    tables, lengths = torch.zeros(1, 256, dtype=torch.long), torch.ones(1, dtype=torch.long)

    def splits() -> int:
        return static_paged_rows(tables, lengths, cache, [None]).splits

    assert programs_at_once(cache.layers[0]) == 4 and splits() == 16  # of 8 heads: 128 of 160 programs
    note_registers(cache.layers[0], 166)
    assert programs_at_once(cache.layers[0]) == 3 and splits() == 8  # 16 would be 128 of 120
    other = KVShape(1, 8, 64, torch.float32, torch.device("cpu")).new_cache(4, 16)
    assert programs_at_once(other.layers[0]) == 4
