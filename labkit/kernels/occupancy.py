"""How many programs of the decode kernel a processor of the GPU runs at once: its registers are the limit.

A program has 4 warps of 32 threads, and each thread holds the registers that the compiler gave the kernel.
With up to 128 a thread, a processor has room for four programs; with 168, as for most models, for three; with
240 for two (compiled for sm_75 to sm_90). More programs than that wait for a second round.
"""

from __future__ import annotations

import torch
from torch import Tensor

_REGISTERS = 65536  # of a processor, on all GPUs from sm_50 on
_THREADS = 4 * 32  # of a program
_UNIT = 8  # registers a thread are handed out in such steps
_MOST = 8  # programs that the threads of a processor of sm_75 allow
_GUESS = 4  # before the first kernel is compiled

_found: dict[tuple[torch.device, torch.dtype, torch.Size], int] = {}


def note_registers(blocks: Tensor, registers: int) -> None:
    """Keep what a kernel takes that reads blocks like these (blocks, 2, kv_heads, block_size, head_dim)."""
    _found[_kind(blocks)] = programs_for(registers)


def programs_at_once(blocks: Tensor) -> int:
    """Return how many programs that read blocks like these a processor runs at once."""
    return _found.get(_kind(blocks), _GUESS)


def programs_for(registers: int) -> int:
    """Return how many programs with so many registers a thread a processor runs at once, at least 1."""
    given = -(-registers // _UNIT) * _UNIT
    return max(1, min(_MOST, _REGISTERS // (given * _THREADS)))


def _kind(blocks: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return blocks.device, blocks.dtype, blocks.shape[1:]
