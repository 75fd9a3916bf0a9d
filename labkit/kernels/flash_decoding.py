"""Attention of single queries over blocks, read where they lie: a kernel in Triton, for GPUs.

A decode step is bound by memory: each row has one query, and all keys and values of its request must be read
for it. Plain PyTorch has to gather the blocks first: it reads them, writes them and reads them again. This
kernel follows the block table instead, reads each key and value once, and keeps everything else in registers.
Its derivation uses one formula three times.

**The formula.** Attention of a query q over tokens t is sum(exp(s_t) v_t) / sum(exp(s_t)), with scores
s_t = scale * q . k_t. So that exp does not overflow, the maximum score is subtracted from all of them; it
cancels, so the result is the same. A set of tokens is then summed up in three values:

    m = max(s_t)        l = sum(exp(s_t - m))        a = sum(exp(s_t - m) v_t)

and the union of two sets without a common token has, with m = max(m1, m2):

    l = l1 exp(m1 - m) + l2 exp(m2 - m)        a = a1 exp(m1 - m) + a2 exp(m2 - m)

Attention is a / l. The formula does not depend on order, so tokens can be divided into any sets.

1. **Token by token**: a set takes in one more token, (s, 1, v). Only m, l and a are kept while keys and
   values stream by, so the scores of a row are never in memory. (Milakov and Gimelshein 2018, "Online
   normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".)
2. **Lane by lane**: a program reads TILE tokens at a time, and lane i keeps a set of its own, made of the
   i-th token of every tile. Lanes do not wait for each other until the end, where they are united.
3. **Split by split**: with few rows, one program for each would leave most of the GPU idle. So a row's
   tokens are split over several programs, and a second, small kernel unites them. (Dao et al. 2023,
   "Flash-Decoding for long-context inference".) A split hands over a / l and log(l) + m. These two are
   enough, because exp(log(l) + m) is its weight among the splits.

Blocks and their tables are those of Kwon et al. 2023, "Efficient memory management for large language
model serving with PagedAttention".

The query heads that share a key head are computed together, so that keys and values are read once for all of
them. Products are multiplied and summed without `tl.dot`: tensor cores need 16 queries at once, the time goes
into reading, and GPUs before sm_80 have no fast `tl.dot` at all. Powers are of 2, because GPUs have an
instruction for these; log2(e) is multiplied into the scale. Sums are in fp32 for inputs of any dtype.

Blocks in 8 bits (see `int8_kv`) take a quarter or half of the reading: a key's scale is multiplied into its
score, and a value's into its weight, once for all heads of a group and all dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.occupancy import note_registers

_LOG2E = 1.4426950408889634
_NO_WINDOW = 2**31 - 1
MOST_SPLITS = 64
_TILE_ELEMENTS = 8192  # elements of a tile, with all heads of a group: 64 registers a thread
_MAX_TILE = 64
# The maximum of no scores. It is finite because infinity minus infinity is NaN.
_FLOOR = tl.constexpr(-1.0e30)


# Numbers that change from step to step are not to be specialised: for a width of 1, say, or one that 16
# divides, Triton would compile anew in the middle of serving.
@triton.jit(do_not_specialize=["width", "window", "splits"])
def _split_kernel(
    q,
    blocks,
    tables,
    lengths,
    parts,
    logs,
    q_row,
    q_head,
    width,
    scale,
    window,
    splits,
    BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    HEAD: tl.constexpr,
    SLOT: tl.constexpr,
    SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    GROUP_2: tl.constexpr,
    DIM_2: tl.constexpr,
    IN_INT8: tl.constexpr,
):
    """Compute one split of one row for all query heads of one key head, and write it to `parts` and `logs`.

    BLOCK, VALUES, HEAD and SLOT are the strides between blocks, from keys to values, and between heads and
    tokens. With IN_INT8, SIZE scales follow the numbers of a head.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    # The splits share the tokens of this row in whole tiles: by its own length, not by the longest row's.
    length = tl.load(lengths + row).to(tl.int32)
    oldest = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - oldest, TILE), splits) * TILE
    begin = oldest + split * share
    end = tl.minimum(begin + share, length)

    # The axes from here on: head of the group, lane of the tile, dimension. Their sizes are powers of two.
    head = tl.arange(0, GROUP_2)[:, None, None]
    lane = tl.arange(0, TILE)[None, :]
    dim = tl.arange(0, DIM_2)[None, None, :]
    query = tl.load(
        q + row * q_row + (kv_head * GROUP + head) * q_head + dim,
        mask=(head < GROUP) & (dim < DIM),
        other=0.0,
    )
    query = query.to(tl.float32) * scale

    m = tl.full((GROUP_2, TILE), _FLOOR, tl.float32)
    l = tl.zeros((GROUP_2, TILE), tl.float32)  # noqa: E741
    a = tl.zeros((GROUP_2, TILE, DIM_2), tl.float32)
    for first in range(begin, end, TILE):
        token = first + lane
        live = token < end
        block = tl.load(tables + row * width + token // SIZE, mask=live, other=0).to(tl.int64)
        piece = block * BLOCK + kv_head * HEAD
        slot = piece + token % SIZE * SLOT
        at = blocks + slot[:, :, None] + dim
        # Nothing is read beyond the end of the row, so what a block held before (NaN, say) has no effect.
        here = live[:, :, None] & (dim < DIM)
        k = tl.load(at, mask=here, other=0.0).to(tl.float32)
        v = tl.load(at + VALUES, mask=here, other=0.0).to(tl.float32)
        s = tl.sum(query * k, axis=2)
        if IN_INT8:
            scales = (blocks + (piece + SIZE * DIM)).to(tl.pointer_type(tl.float32)) + token % SIZE
            s = s * tl.load(scales, mask=live, other=0.0)
        s = tl.where(live, s, float("-inf"))
        new = tl.maximum(m, s)
        old, p = tl.exp2(m - new), tl.exp2(s - new)
        l = l * old + p  # noqa: E741
        if IN_INT8:
            p = p * tl.load(scales + VALUES // 4, mask=live, other=0.0)
        a = a * old[:, :, None] + p[:, :, None] * v
        m = new

    # Unite the lanes: the same formula, over axis 1.
    top = tl.max(m, axis=1)
    weight = tl.exp2(m - top[:, None])
    total = tl.sum(l * weight, axis=1)
    some = tl.where(total == 0, 1.0, total)  # a split without tokens has the weight 0
    mean = tl.sum(a * weight[:, :, None], axis=1) / some[:, None]
    log = tl.where(total == 0, float("-inf"), tl.log2(some) + top)

    head = tl.arange(0, GROUP_2)
    dim = tl.arange(0, DIM_2)[None, :]
    part = ((row * KV_HEADS + kv_head) * GROUP + head) * splits + split
    tl.store(logs + part, log, mask=head < GROUP)
    mask = (head < GROUP)[:, None] & (dim < DIM)
    tl.store(parts + part[:, None] * DIM + dim, mean.to(parts.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _unite_kernel(parts, logs, out, splits, MOST: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr):
    """Unite the splits, at most MOST, of one query head of one row."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, MOST), tl.arange(0, DIM_2)
    log = tl.load(logs + row * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(log - tl.max(log, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    at = parts + (row * splits + split)[:, None] * DIM + dim[None, :]
    part = tl.load(at, mask=(split < splits)[:, None] & (dim < DIM)[None, :], other=0.0)
    mean = tl.sum(part * weight[:, None], axis=0)
    tl.store(out + row * DIM + dim, mean.to(out.dtype.element_ty), mask=dim < DIM)


def paged_decode(
    q: Tensor,
    blocks: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    splits: int = 1,
) -> Tensor:
    """Compute attention of one query per row over the blocks of that row.

    Every integer that the kernels get is an argument here or a size. Lengths and tables are read on the
    device, so a captured launch works with any of their values.

    Args:
        q: queries (rows, heads, head_dim), fp16, bf16 or fp32.
        blocks: the blocks of one layer (num_blocks + 1, 2, kv_heads, block_size, head_dim), in that dtype, or
            as `int8_kv` lays them out.
        tables: the blocks of each row in order (rows, width), int32 or int64. Entries beyond a row's length
            are not read.
        lengths: the number of tokens of each row (rows,), with the query's own, int32 or int64, at least 1.
        scale: the factor of the scores.
        window: how many tokens a query sees at most, itself included; None is all.
        splits: the number of programs that share the tokens of a row, at most `MOST_SPLITS`.

    Returns:
        The result (rows, heads, head_dim), in the dtype of q.

    Raises:
        ValueError: if `splits` is out of its range, or vectors or tables are not contiguous.
    """
    if not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"splits must be between 1 and {MOST_SPLITS}, not {splits}")
    if blocks.stride(-1) != 1 or not tables.is_contiguous():
        raise ValueError("the vectors of blocks, and tables, must lie in one piece")
    if q.stride(-1) != 1:
        q = q.contiguous()
    rows, heads, dim = q.shape
    kv_heads, size = blocks.shape[2:4]
    group = heads // kv_heads
    in_int8 = blocks.dtype == torch.int8
    group_2, dim_2 = triton.next_power_of_2(group), triton.next_power_of_2(dim)
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    logs = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    parts = out if splits == 1 else out.new_empty((rows, heads, splits, dim), dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel = _split_kernel[(rows, kv_heads, splits)](
            q,
            blocks,
            tables,
            lengths,
            parts,
            logs,
            q.stride(0),
            q.stride(1),
            tables.shape[1],
            scale * _LOG2E,
            _NO_WINDOW if window is None else window,
            splits,
            BLOCK=blocks.stride(0),
            VALUES=blocks.stride(1),
            HEAD=blocks.stride(2),
            SLOT=dim if in_int8 else blocks.stride(3),
            SIZE=size,
            KV_HEADS=kv_heads,
            GROUP=group,
            DIM=dim,
            TILE=max(1, min(_MAX_TILE, _TILE_ELEMENTS // (group_2 * dim_2))),
            GROUP_2=group_2,
            DIM_2=dim_2,
            IN_INT8=in_int8,
            num_warps=4,
        )
        if registers := getattr(kernel, "n_regs", None):  # the interpreter has none
            note_registers(blocks, registers)
        if splits > 1:
            _unite_kernel[(rows * heads,)](
                parts, logs, out, splits, MOST=MOST_SPLITS, DIM=dim, DIM_2=dim_2, num_warps=4
            )
    return out
