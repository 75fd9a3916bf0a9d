"""The parts of a tiny model, all in this process: the real engine runs them, and a function adds them up.

In a model over several processes a layer's parts lie in one of them each (`labkit.parallel`). Here they lie
side by side, so that a learner can hold all of them. The layers, the cache and the engine are the real ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.exercises.common import Job, answers, serve, tiny_model
from labkit.models.architecture import build
from labkit.models.tiny import tiny_random

Layer = dict[str, Tensor]
Split = Callable[[Layer, int, int], Layer]
Add = Callable[[Sequence[Tensor]], Sequence[Tensor]]

WORLD = 2
"""The number of parts: tiny-random has two KV heads."""
JOBS = (Job(9, 12), Job(23, 8), Job(4, 16), Job(14, 10, step=5))

_HOME = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}


@functools.cache
def layers() -> tuple[Layer, ...]:
    """The weights of each layer of tiny-random, by their short names: do not change them."""
    config, tensors, _ = tiny_random()
    return tuple(
        {name: tensors[_long(i, name)] for name in _names(tensors, i)}
        for i in range(config.num_hidden_layers)
    )


def added(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of all tensors, once for each."""
    total = functools.reduce(torch.add, tensors)
    return [total] * len(tensors)


class Added(nn.Module):
    """The parts of attention or of an MLP: what each gives for the same input, added up."""

    def __init__(self, own: Sequence[nn.Module], add: Add) -> None:
        super().__init__()
        self.parts, self.add = nn.ModuleList(own), add

    def forward(self, *arguments: Any) -> Tensor:
        return self.add([part(*arguments) for part in self.parts])[0]


def engine_of(split: Split, add: Add = added) -> Engine:
    """An engine that runs tiny-random with layers that `split` has cut.

    Args:
        split: called with a layer, a rank and the number of parts, as in exercise 14.1.
        add: called with the results of all parts; returns the sum for each of them.
    """
    config, tensors, _ = tiny_random()
    own = copy.deepcopy(config)  # of a part: embedding and output layer are whole in each
    own.num_attention_heads //= WORLD
    own.num_key_value_heads //= WORLD
    own.intermediate_size //= WORLD
    built = []
    for rank in range(WORLD):
        found = dict(tensors)
        for i, layer in enumerate(layers()):
            part = split(dict(layer), rank, WORLD)
            found |= {_long(i, name): tensor.contiguous() for name, tensor in part.items()}
        built.append(build(own, found.items(), dtype=torch.float32, device=torch.device("cpu")))
    first = built[0]
    for i in range(len(first.layers)):
        for rank, module in enumerate(built):  # each part of a layer has a place of its own in the cache
            module.layers[i].self_attn.layer = WORLD * i + rank
        attention, mlp = (
            [getattr(module.layers[i], name) for module in built] for name in ("self_attn", "mlp")
        )
        first.layers[i].self_attn, first.layers[i].mlp = Added(attention, add), Added(mlp, add)
    first.shape = replace(first.shape, num_hidden_layers=WORLD * len(first.layers))
    loaded = replace(tiny_model(), module=first)
    return Engine(EngineConfig(model=loaded, num_blocks=48, block_size=4, max_num_seqs=4), say=None)


@functools.cache
def right_answers() -> dict[str, list[int]]:
    """What the whole model answers to `JOBS`."""
    config = EngineConfig(model=tiny_model(), num_blocks=48, block_size=4, max_num_seqs=4)
    return answers(serve(Engine(config, say=None), JOBS))


def _long(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{_HOME.get(name.split('.')[0], 'mlp')}.{name}"


def _names(tensors: dict[str, Tensor], layer: int) -> list[str]:
    start = f"model.layers.{layer}."
    names = (key.removeprefix(start).split(".", 1) for key in tensors if key.startswith(start))
    return [name for home, name in names if home in ("self_attn", "mlp")]
