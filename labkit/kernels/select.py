"""Attention on a GPU: which kernels there are, which fit this GPU, and the groups of rows that call them.

Rows with a single query go to `flash_decoding`, which reads pages in place. Longer rows go, all in one call,
to the FlashAttention that comes with PyTorch, on the GPUs that it is made for (sm_80 and newer, in half
precision), and else one by one to `scaled_dot_product_attention`, which has a kernel for every GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.config import ATTENTION_BACKENDS
from labkit.core.attention import (
    SDPA,
    Backend,
    MakeGroups,
    PagedKVCache,
    QueryGroup,
    Span,
    block_table,
    gathered_chunks,
    static_rows,
)

_TRITON_SINCE = (7, 5)  # the oldest GPUs that Triton makes code for
_FLASH_SINCE = (8, 0)
_FLASH_MAX_DIM = 256
_MIN_SPLIT = 64  # tokens that are worth a program of their own
_MAX_SPLITS = 64
_PROGRAMS = 4  # for each processor of the GPU: what is wanted in flight


# -- rows with a single query ---------------------------------------------------------------------


@dataclass
class PagedDecode:
    """Rows of one query each, over pages where they lie.

    `tables` (rows, width) are their pages and `lengths` (rows,) their tokens, both int32 or int64 and on the
    device. `splits` and the shapes are all that is known of them here: a CUDA graph may freeze those.
    """

    first: int
    last: int
    tables: Tensor
    lengths: Tensor
    splits: int

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        from labkit.kernels.flash_decoding import paged_decode  # here, for it needs Triton

        return paged_decode(
            q, pages, self.tables, self.lengths, scale=scale, window=window, splits=self.splits
        )


def paged_rows(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[PagedDecode]:
    """One group for all rows with a single query: a short one costs no more beside a long one."""
    tables = block_table(rows, cache, -(-rows[0].length // cache.block_size))
    lengths = torch.tensor([row.length for row in rows], device=tables.device)
    return [_paged(first, tables, lengths, cache)]


def static_paged_rows(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> PagedDecode:
    """The same from tensors on the device (see `Backend.static`)."""
    return _paged(0, tables, lengths, cache)


def _paged(first: int, tables: Tensor, lengths: Tensor, cache: PagedKVCache) -> PagedDecode:
    rows, width = tables.shape
    splits = num_splits(rows * cache.kv_heads, width * cache.block_size, _processors(tables.device))
    return PagedDecode(first, first + rows, tables, lengths, splits)


def num_splits(programs: int, tokens: int, processors: int) -> int:
    """Into how many programs to split each of `programs`, which have so many tokens at most.

    As many as keep a GPU with so many processors busy, but not so many that they have next to nothing to do;
    a power of two.
    """
    wanted = min(_PROGRAMS * processors // programs, tokens // _MIN_SPLIT, _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# -- rows with more queries -----------------------------------------------------------------------


@dataclass
class PackedChunks:
    """Rows of any number of queries in one call of FlashAttention, their tokens packed one after the other.

    `slots` (see `PagedKVCache.slots`) say where the keys and the values of all tokens of these rows lie.
    `query_starts` and `token_starts` (rows + 1, int32) say where each row begins, among the queries and among
    the tokens; `most_queries` and `most_tokens` are those of the longest row.
    """

    first: int
    last: int
    slots: Tensor
    query_starts: Tensor
    token_starts: Tensor
    most_queries: int
    most_tokens: int

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        found = pages.flatten(0, 3).index_select(0, self.slots.flatten())
        k, v = found.view(2, -1, pages.shape[2], pages.shape[-1]).unbind(0)
        return varlen_attention()(
            q,
            k,
            v,
            self.query_starts,
            self.token_starts,
            self.most_queries,
            self.most_tokens,
            scale=scale,
            # How far to look left and right of a query, which is itself one of the window; -1 is no limit.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=True,
        )


def packed_chunks(
    first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
) -> list[PackedChunks]:
    """One group for all rows with more than one query."""
    size, device = cache.block_size, cache.pages.device
    blocks = array("q")
    queries, tokens = [0], [0]
    for row in rows:
        for page in row.table[: -(-row.length // size)]:
            blocks.extend([page] * size)
        queries.append(queries[-1] + row.num_queries)
        tokens.append(tokens[-1] + row.length)
        del blocks[tokens[-1] :]  # the rest of the last page
    starts = torch.tensor([queries, tokens], dtype=torch.int32, device=device)
    most = (max(row.num_queries for row in rows), max(row.length for row in rows))
    places = torch.cat([torch.arange(row.length) % size for row in rows])
    where = torch.stack((torch.frombuffer(blocks, dtype=torch.int64), places)).to(device)
    slots = cache.slots(*where.unbind(0))
    return [PackedChunks(first, first + queries[-1], slots, starts[0], starts[1], *most)]


@functools.cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """`torch.nn.attention.varlen.varlen_attn`, if this PyTorch has it with all that is needed here.

    It came with 2.10; windows, scale and fewer key heads than query heads came until 2.12.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= has else None


# -- as on an older GPU ---------------------------------------------------------------------------


@dataclass
class Sm75:
    """A group that is left only those kernels of PyTorch's that a GPU of sm_75, such as a T4, has too."""

    group: QueryGroup

    @property
    def first(self) -> int:
        return self.group.first

    @property
    def last(self) -> int:
        return self.group.last

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return self.group.attend(q, pages, scale=scale, window=window)


def _as_sm75(make: MakeGroups) -> MakeGroups:
    return lambda *args: [Sm75(group) for group in make(*args)]


def _static_as_sm75(
    tables: Tensor, lengths: Tensor, cache: PagedKVCache, windows: Sequence[int | None]
) -> Sm75:
    return Sm75(static_rows(tables, lengths, cache, windows))


# -- the choice -----------------------------------------------------------------------------------


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    wanted: str = "auto",
    as_t4: bool = False,
) -> Backend:
    """How attention is computed on this device, for a model of this dtype and head_dim.

    Args:
        wanted: one of `ATTENTION_BACKENDS`; "auto" is the fastest that is possible.
        as_t4: use only what a T4 has, on any newer GPU.

    Raises:
        ValueError: if what is wanted is not possible; says why, and what is.
    """
    if wanted not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(ATTENTION_BACKENDS)}, not {wanted!r}")
    if as_t4 and device.type != "cuda":
        raise ValueError(f"as_t4 needs a CUDA GPU, and the model is on {device}")
    lacking = _why_no_triton(device)
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


def _why_no_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"Triton kernels need a CUDA GPU, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_SINCE:
        return f"Triton makes no code for sm_{capability[0]}{capability[1]}"
    return None


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
