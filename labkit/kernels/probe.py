"""Whether Triton works on a device, found out by a tiny kernel: much can be missing that nothing else tells.

Triton needs a C compiler at run time, which many machines do not have, a folder that it can write to, and a
driver and a GPU that its compiler still supports.
"""

from __future__ import annotations

import functools

import torch

from labkit.core.attention import Span
from labkit.core.kv_cache import KVShape
from labkit.kernels.gathered_sdpa import block_table, gathered_rows
from labkit.kernels.int8_kv import in_int8
from labkit.kernels.paged_decode import PagedDecode
from labkit.outputs import in_one_line

_ROWS = [Span(20, 1, [2, 0]), Span(3, 1, [1])]
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@functools.cache  # also of a failure: there is one answer, and one attempt, for each process
def why_not_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, int8_kv: bool = False
) -> str | None:
    """Return why `flash_decoding` does not work on a device, or None if it computes what PyTorch does.

    With `int8_kv`, it is tried on a KV cache in 8 bits.

    Raises:
        torch.OutOfMemoryError: if there is no memory left to try.
    """
    try:
        shape = KVShape(1, 2, head_dim, dtype, device)
        cache = (in_int8(shape) if int8_kv else shape).new_cache(3, 16)
        places = torch.arange(3 * 16, device=device)
        kv = torch.arange(2 * len(places) * 2 * head_dim, device=device).sin().to(dtype)
        k, v = kv.view(2, len(places), 2, head_dim)
        cache.write(0, k, v, cache.slots(places // 16, places % 16))
        q = torch.arange(2 * 4 * head_dim, device=device).cos().view(2, 4, head_dim).to(dtype)
        (plain,) = gathered_rows(0, _ROWS, cache, [None])
        lengths = torch.tensor([row.length for row in _ROWS], device=device)
        paged = PagedDecode(0, 2, block_table(_ROWS, cache, 2), lengths, splits=2)
        wanted, found = (group.attend(q, cache.layers[0], scale=1.0, window=None) for group in (plain, paged))
        off = float((wanted.float() - found.float()).abs().max())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a linker, a driver: anything can be wrong
        return f"Triton's kernel does not run here ({in_one_line(error)})"
    return None if off < _TOLERANCE[dtype] else f"Triton's kernel is wrong here (by {off:.2g})"
