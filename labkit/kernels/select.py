"""The choice of an attention backend for a device, with the reason.

On a GPU, rows with a single query go to `paged_decode`, which reads blocks in place. Rows with more queries
go to the FlashAttention of `varlen`, all in one call, if the GPU has it (sm_80 and newer, in half precision),
and otherwise one by one to `gathered_sdpa`, which runs everywhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.config import ATTENTION_BACKENDS
from labkit.core.attention import QueryGroup
from labkit.core.kv_cache import PagedKVCache
from labkit.kernels.backend import Backend, MakeGroups
from labkit.kernels.gathered_sdpa import SDPA, gathered_chunks, static_rows
from labkit.kernels.paged_decode import paged_rows, static_paged_rows
from labkit.kernels.probe import why_not_triton
from labkit.kernels.varlen import packed_chunks, varlen_attention

_TRITON_SINCE = (7, 5)  # the oldest GPUs that Triton compiles for
_FLASH_SINCE = (8, 0)
_FLASH_MAX_DIM = 256


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    wanted: str = "auto",
    as_t4: bool = False,
    kv_cache_dtype: str | None = None,
) -> Backend:
    """Choose how a model of this dtype and head_dim computes attention on this device.

    Args:
        device, dtype: the device and the dtype of the model.
        head_dim: the size of an attention head.
        wanted: one of `ATTENTION_BACKENDS`; "auto" is the fastest that is possible.
        as_t4: whether a newer GPU uses only the kernels that a T4 has.
        kv_cache_dtype: what `EngineConfig` says. All backends read either cache, each by its own kernel.

    A kernel of Triton is tried before it is chosen, which compiles it: the first time, that takes seconds.

    Raises:
        ValueError: if what is wanted is not possible; the message says why, and what is.
    """
    if wanted not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(ATTENTION_BACKENDS)}, not {wanted!r}")
    if as_t4 and device.type != "cuda":
        raise ValueError(f"as_t4 needs a CUDA GPU, and the model is on {device}")
    lacking = None if wanted == "sdpa" else _why_no_triton(device, dtype, head_dim, kv_cache_dtype)
    if wanted == "triton" and lacking:
        raise ValueError(f"attention_backend must be auto or sdpa here, not 'triton': {lacking}")
    if wanted == "sdpa" or lacking:
        reason = f"{SDPA.reason}; {'asked for' if wanted == 'sdpa' else lacking}"
        if not as_t4:
            return Backend("sdpa", reason, SDPA.decode, SDPA.chunks, SDPA.static)
        decode, chunks = _as_sm75(SDPA.decode), _as_sm75(SDPA.chunks)
        return Backend("sdpa", f"{reason}; as on a T4", decode, chunks, _static_as_sm75)
    no_flash = "as on a T4" if as_t4 else _why_no_flash(device, dtype, head_dim)
    if no_flash:
        chunks = _as_sm75(gathered_chunks) if as_t4 else gathered_chunks
        reason = f"decode reads pages in place; chunks one by one through PyTorch's kernels: {no_flash}"
    else:
        chunks = packed_chunks
        reason = "decode reads pages in place; chunks packed into one call of FlashAttention"
    return Backend("triton", reason, paged_rows, chunks, static_paged_rows)


def _why_no_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, kv_cache_dtype: str | None
) -> str | None:
    if device.type != "cuda":
        return f"Triton kernels need a CUDA GPU, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_SINCE:
        return f"Triton makes no code for sm_{capability[0]}{capability[1]}"
    return why_not_triton(device, dtype, head_dim, kv_cache_dtype == "int8")


def _why_no_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLASH_SINCE:
        return f"FlashAttention is not for sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention is not for {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > _FLASH_MAX_DIM:
        return f"FlashAttention is not for a head_dim of {head_dim}"
    if varlen_attention() is None or not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch has no FlashAttention for rows of different lengths"
    return None


# -- as on an older GPU ---------------------------------------------------------------------------


@dataclass
class Sm75:
    """A group that uses only those of PyTorch's kernels that GPUs of sm_75 have, too, such as a T4."""

    group: QueryGroup

    @property
    def first(self) -> int:
        return self.group.first

    @property
    def last(self) -> int:
        return self.group.last

    def attend(self, q: Tensor, blocks: Tensor, *, scale: float, window: int | None) -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return self.group.attend(q, blocks, scale=scale, window=window)


def _as_sm75(make: MakeGroups) -> MakeGroups:
    return lambda *args: [Sm75(group) for group in make(*args)]


def _static_as_sm75(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> Sm75:
    return Sm75(static_rows(tables, lengths, cache, windows))
