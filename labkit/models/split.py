"""Tensor parallelism: which part of each weight one of several processes holds (Shoeybi et al. 2019).

Products come in pairs. The first of a pair is cut by its outputs (queries, keys and values by heads; gate and
up by columns), the second by its inputs (`o_proj`, `down_proj`). So a process computes both without the
others, and the sum over all processes is what one would have computed. Embedding and output layer are cut by
tokens of the vocabulary. Norms are whole everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.core.model import ModelShape
from labkit.models.checkpoint import Config
from labkit.models.errors import ModelError

_STEP = 64  # columns are cut at multiples of it, or of a smaller power of two in small models


@dataclass(frozen=True)
class Part:
    """What process `rank` of `world_size` holds, as ranges of the whole model."""

    rank: int
    world_size: int
    heads: range  # of queries
    kv_heads: range
    columns: range  # of gate and up, which are the rows of down
    tokens: range  # of the vocabulary; beyond its end, rows of zeros make all parts equally long


def parts(shape: ModelShape, world_size: int) -> list[Part]:
    """Cut a model for so many processes, with the same number of weights in each as nearly as heads allow.

    Where heads cannot be shared out evenly, as 3 KV heads to 2 processes, the columns of the MLP make up for
    it. Where there are fewer KV heads than processes, several hold the same one.

    Raises:
        ModelError: if the model cannot be cut in so many parts; the message names the sizes.
    """
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    group = heads // kv_heads  # query heads that share a KV head
    copies = -(-world_size // kv_heads)  # processes that hold the same KV head
    if copies > 1 and (world_size % kv_heads or group % copies):
        raise ModelError(
            f"tensor_parallel_size={world_size} does not divide {heads} heads over {kv_heads} KV heads"
        )
    if world_size > shape.intermediate_size or world_size > shape.vocab_size:
        raise ModelError(f"tensor_parallel_size={world_size} is more than this model has columns to share")
    if copies > 1:
        each = group // copies
        queries = [range(rank * each, (rank + 1) * each) for rank in range(world_size)]
        keys = [range(rank // copies, rank // copies + 1) for rank in range(world_size)]
    else:
        keys = list(_even(kv_heads, world_size))
        queries = [range(held.start * group, held.stop * group) for held in keys]
    columns = _balanced(shape, [len(q) + len(k) for q, k in zip(queries, keys, strict=True)])
    most = -(-shape.vocab_size // world_size)
    tokens = [range(rank * most, (rank + 1) * most) for rank in range(world_size)]
    cuts = zip(queries, keys, columns, tokens, strict=True)
    return [Part(rank, world_size, *cut) for rank, cut in enumerate(cuts)]


def _even(total: int, shares: int) -> Iterator[range]:
    base, more = divmod(total, shares)
    start = 0
    for share in range(shares):
        stop = start + base + (share < more)
        yield range(start, stop)
        start = stop


def _balanced(shape: ModelShape, heads: list[int]) -> list[range]:
    """Cut the columns so that they even out the weights of attention, which has so many heads per process."""
    step, size = _STEP, shape.intermediate_size
    while step > 1 and size < 4 * step * len(heads):
        step //= 2
    # A head, of queries or of keys, has 2 * head_dim * hidden_size weights, and a column 3 * hidden_size.
    columns_per_head = 2 * shape.head_dim / 3
    target = (size + columns_per_head * sum(heads)) / len(heads)
    cuts, start = [], 0
    for left, held in zip(range(len(heads) - 1, -1, -1), heads, strict=True):
        wanted = round((target - columns_per_head * held) / step) * step
        stop = min(max(start + wanted, start + 1), size - left) if left else size  # at least one for each
        cuts.append(range(start, stop))
        start = stop
    return cuts


def part_of_config(config: Config, part: Part, head_dim: int) -> Config:
    """Return the configuration of a model that has only this part."""
    own = copy.deepcopy(config)
    own.head_dim = head_dim  # which would otherwise follow from the number of heads
    own.num_attention_heads, own.num_key_value_heads = len(part.heads), len(part.kv_heads)
    own.intermediate_size, own.vocab_size = len(part.columns), len(part.tokens)
    return own


def part_of_tensors(
    tensors: Iterable[tuple[str, Tensor]], shape: ModelShape, part: Part
) -> Iterator[tuple[str, Tensor]]:
    """Yield this part of each tensor of a whole model.

    Raises:
        ValueError: for a tensor that does not have the shape that the model asks for.
    """
    dim = shape.head_dim
    cut: dict[str, tuple[range, int]] = {  # what is held, and of how many
        "q_proj": (_times(part.heads, dim), shape.num_attention_heads * dim),
        **dict.fromkeys(("k_proj", "v_proj"), (_times(part.kv_heads, dim), shape.num_key_value_heads * dim)),
        "o_proj": (_times(part.heads, dim), shape.num_attention_heads * dim),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (part.columns, shape.intermediate_size)),
        **dict.fromkeys(("embed_tokens", "lm_head"), (part.tokens, shape.vocab_size)),
    }
    for name, tensor in tensors:
        *_, owner, kind = ("", *name.split("."))
        by_inputs = owner in ("o_proj", "down_proj")
        if owner not in cut:
            yield name, tensor
        elif by_inputs and kind == "bias":
            yield name, tensor if part.rank == 0 else torch.zeros_like(tensor)  # the sum has it once
        else:
            held, whole = cut[owner]
            axis = 1 if by_inputs else 0
            if tensor.ndim <= axis or tensor.shape[axis] != whole:
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)}, and {whole} in place {axis} are needed"
                )
            yield name, _take(tensor, held, axis)


def _times(numbers: range, size: int) -> range:
    return range(numbers.start * size, numbers.stop * size)


def _take(tensor: Tensor, held: range, axis: int) -> Tensor:
    """Return a range of a tensor, filled up with zeros where it ends before the range does."""
    start, stop = (min(end, tensor.shape[axis]) for end in (held.start, held.stop))
    piece = tensor.narrow(axis, start, stop - start)
    if stop - start == len(held):
        return piece
    filled = piece.new_zeros(len(held), *piece.shape[1:])
    filled[: len(piece)] = piece
    return filled
