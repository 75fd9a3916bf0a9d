"""Exercise 14.1: cut a layer's weights for several processes, so that one sum after each pair is enough."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit import notebook
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import answers, few, serve
from labkit.exercises.e14_layers import JOBS, WORLD, Layer, engine_of, layers, right_answers

SECOND = ("o_proj", "down_proj")
"""The second product of each pair; `q_proj`, `k_proj`, `v_proj`, `gate_proj` and `up_proj` come first."""


def split(layer: Layer, rank: int, world_size: int) -> Layer:
    """Cut first products by their outputs, and second ones by their inputs; add their bias once."""
    part = {}
    for name, tensor in layer.items():
        product, kind = name.split(".")
        if product in SECOND and kind == "bias":
            part[name] = tensor if rank == 0 else torch.zeros_like(tensor)
        else:
            part[name] = tensor.chunk(world_size, 1 if product in SECOND else 0)[rank]
    return part


# -- a layer, without a cache ---------------------------------------------------------------------


def _product(layer: Layer, name: str, x: Tensor) -> Tensor:
    return F.linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))


def mlp(layer: Layer, x: Tensor) -> Tensor:
    """Compute the MLP of a layer, or of a part of it, for tokens x (T, hidden)."""
    gate, up = _product(layer, "gate_proj", x), _product(layer, "up_proj", x)
    return _product(layer, "down_proj", F.silu(gate) * up)


def attention(layer: Layer, x: Tensor, head_dim: int) -> Tensor:
    """Compute the attention of a layer, or of a part of it, for tokens x (T, hidden), without positions."""
    q, k, v = (
        _product(layer, name, x).view(len(x), -1, head_dim).transpose(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    group = len(q) // len(k)  # query heads that share a KV head
    k, v = (each.repeat_interleave(group, 0) for each in (k, v))
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = (q @ k.mT * head_dim**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    return _product(layer, "o_proj", (weights @ v).transpose(0, 1).reshape(len(x), -1))


# -- what is right --------------------------------------------------------------------------------

_SAME_NAMES = "return a dict with the names of the layer, and under each name this process's part"
_LEAVE = "leave the layer as it is: the others cut it as well"
_FIRST = "the first products (q, k, v, gate, up) are cut by their outputs: dimension 0 of a weight"
_SECOND = "the second products (o_proj, down_proj) are cut by their inputs: dimension 1 of a weight"
_DTYPE = "a part has the dtype of the whole"
_MLP = "the parts of the MLP add up to the whole: down_proj keeps the inputs that gate and up keep as outputs"
_ATTENTION = "the parts of attention add up to the whole: heads stay whole, a KV head with its query heads"
_BIAS = "the bias of o_proj and down_proj is in the sum once: process 0 has it, and the others have zeros"


class Size(NamedTuple):
    """The sizes of a layer, and how many processes share it."""

    world_size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    hidden: int
    bias: bool = False

    def layer(self, seed: int) -> Layer:
        """A layer of these sizes, in double precision, so that sums in another order agree."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }
        source = torch.Generator().manual_seed(seed)
        found = {}
        for name, size in sizes.items():
            found[f"{name}.weight"] = torch.randn(size, generator=source, dtype=torch.float64)
            if self.bias:
                found[f"{name}.bias"] = torch.randn(size[0], generator=source, dtype=torch.float64)
        return found

    def __str__(self) -> str:
        return (
            f"{self.world_size} processes; hidden size {self.hidden}, {self.heads} query heads over "
            f"{self.kv_heads} KV heads of {self.head_dim}, {self.inner} in the MLP"
            + (", with biases" if self.bias else "")
        )


_SIZES = (
    Size(2, 2, 2, 2, 4, 6),
    Size(2, 4, 2, 3, 6, 10),
    Size(2, 4, 2, 3, 6, 10),  # the same sizes, other weights
    Size(1, 2, 1, 4, 6, 4),
    Size(3, 6, 3, 2, 9, 8),
    Size(2, 2, 2, 2, 4, 6, bias=True),
    Size(4, 8, 4, 2, 12, 5, bias=True),
)


def _examine(function: Callable[..., Any]) -> None:
    for seed, size in enumerate(_SIZES):
        _ask(function, size, seed)
    rng = random.Random(14)
    for seed in range(100, 124):
        world, each = rng.randrange(1, 5), rng.randrange(1, 3)
        kv_heads = world * each
        inner, hidden = world * rng.randrange(1, 6), rng.randrange(3, 17)
        size = Size(world, kv_heads * rng.randrange(1, 4), kv_heads, rng.randrange(1, 6), inner, hidden)
        _ask(function, size._replace(bias=rng.random() < 0.4), seed)


def _ask(function: Callable[..., Any], size: Size, seed: int) -> None:
    layer = size.layer(seed)
    kept = {name: tensor.clone() for name, tensor in layer.items()}
    found: dict[int, Layer] = {}
    for rank in reversed(range(size.world_size)):
        part = function(layer, rank, size.world_size)
        same = layer.keys() == kept.keys() and all(torch.equal(layer[name], kept[name]) for name in kept)
        expect(same, _LEAVE, str(size))
        found[rank] = _read(part, size, rank, kept)
    x = torch.randn(5, size.hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Biases are asked for last, because a wrong one makes every sum wrong.
    bare = {rank: _without(part) for rank, part in found.items()}
    _compare(_MLP, size, mlp(_without(kept), x), [mlp(bare[rank], x) for rank in bare])
    whole = attention(_without(kept), x, size.head_dim)
    _compare(_ATTENTION, size, whole, [attention(bare[rank], x, size.head_dim) for rank in bare])
    if size.bias:
        whole = mlp(kept, x) + attention(kept, x, size.head_dim)
        sums = [mlp(part, x) + attention(part, x, size.head_dim) for part in found.values()]
        _compare(_BIAS, size, whole, sums)


def _read(part: Any, size: Size, rank: int, layer: Layer) -> Layer:
    """This part, if its names, dtypes and shapes are right."""
    if not isinstance(part, dict) or part.keys() != layer.keys():
        names = sorted(map(str, part)) if isinstance(part, dict) else repr(part)[:200]
        raise Wrong(_SAME_NAMES, f"{size}\nyours for process {rank}: {names}\nright: {sorted(layer)}")
    for name, tensor in part.items():
        product, kind = name.split(".")
        second = product in SECOND
        wanted = list(layer[name].shape)
        if kind == "weight" or not second:
            wanted[1 if second else 0] //= size.world_size
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else None
        told = f"{size}\n{name} is {tuple(layer[name].shape)}\nyours for process {rank}: "
        told += f"{tuple(shape) if shape is not None else repr(tensor)[:200]}\nright: {tuple(wanted)}"
        rule = _BIAS if kind == "bias" and second else _SECOND if second else _FIRST
        expect(shape == wanted, rule, told)
        expect(tensor.dtype == layer[name].dtype, _DTYPE, f"{name}: {tensor.dtype}")
    return part


def _without(layer: Layer) -> Layer:
    """The layer without the biases of its second products."""
    return {name: t for name, t in layer.items() if name not in [f"{second}.bias" for second in SECOND]}


def _compare(rule: str, size: Size, whole: Tensor, sums: list[Tensor]) -> None:
    total = torch.stack(sums).sum(0)
    told = f"{size}\nfor one token, the parts add up to {_numbers(total[0])}\n"
    told += f"the whole gives {_numbers(whole[0])}"
    expect(torch.allclose(total, whole, rtol=1e-9, atol=1e-9), rule, told)


def _numbers(row: Tensor) -> str:
    return ", ".join(f"{number:.2f}" for number in row[:4].tolist())


# -- in the engine --------------------------------------------------------------------------------


def _run(function: Callable[..., Any]) -> Run:
    engine = serve(engine_of(function), JOBS)
    right = right_answers()
    for name, tokens in answers(engine).items():
        told = f"request {name}\nyours: {few(tokens)}\nright: {few(right[name])}"
        expect(tokens == right[name], "the engine with your parts gives the tokens of the whole model", told)
    held = {
        f"process {rank}": sum(
            tensor.numel() for layer in layers() for tensor in function(dict(layer), rank, WORLD).values()
        )
        for rank in range(WORLD)
    }
    whole = sum(tensor.numel() for layer in layers() for tensor in layer.values())
    sentence = (
        f"The engine ran {len(JOBS)} requests with your {WORLD} parts of each layer, in {len(engine.trace)} "
        f"steps: the same {sum(map(len, right.values()))} tokens as the whole model, with "
        f"{held['process 0']:,} of {whole:,} weights of its layers in process 0."
    )
    picture = notebook.bars({"the whole": whole, **held}, "Weights of all layers")
    return Run(sentence, [("Who holds how much:", picture)])


SPLIT = Exercise("14.1", "split a layer's weights", split, _examine, _run)
