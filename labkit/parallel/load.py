"""Load the model of an engine, over several processes if it asks for them."""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import replace
from typing import Any

import torch

from labkit.config import EngineConfig
from labkit.models.architecture import shape_of
from labkit.models.devices import resolve_device
from labkit.models.hub import TINY, find, is_folder
from labkit.models.load import LoadedModel, load_model
from labkit.models.progress import Say, tell
from labkit.models.split import parts
from labkit.parallel.group import Group
from labkit.parallel.model import ParallelTransformer, spread
from labkit.parallel.workers import Workers


def model_of(config: EngineConfig, say: Say | None) -> LoadedModel:
    """Load the model that a configuration names, or return the loaded one that it holds."""
    loaded = config.model if isinstance(config.model, LoadedModel) else None
    if config.as_t4:
        device = loaded.device if loaded else resolve_device(config.device)
        if device.type != "cuda":
            raise ValueError(f"as_t4 needs a CUDA GPU, and the device is {device}")
    dtype = "float16" if config.as_t4 else config.dtype
    if loaded:
        loaded.check(replace(config, dtype=dtype))
        return loaded
    load = load_model
    if config.tensor_parallel_size > 1:
        load = functools.partial(load_parallel, world_size=config.tensor_parallel_size)
    return load(
        config.model,
        dtype=dtype,
        device=config.device,
        quantization=config.quantization,
        fused_projections=config.fused_projections,
        packed_weights=config.packed_weights,
        cpu_kernels=config.cpu_kernels,
        say=say,
    )


def load_parallel(
    model: str | os.PathLike[str],
    world_size: int,
    *,
    device: str = "auto",
    say: Say | None = print,
    **switches: Any,
) -> LoadedModel:
    """Load a model over `world_size` processes, of which this one is the first.

    The others end with the model, and with this process however it ends. On a CPU the processes share
    PyTorch's threads; on GPUs each has one to itself.

    Args:
        model, device, say: as in `load_model`.
        world_size: the number of processes.
        switches: the other arguments of `load_model`.

    Raises:
        ModelError: as `load_model` does, and for a model that cannot be cut in so many parts.
        ParallelError: if one of the processes cannot do its part.
    """
    tell(say, f"Starting {world_size - 1} more processes for {model}.")
    workers = Workers(world_size)
    try:
        place = TINY if model == TINY else find(model, say=say)
        arguments = dict(switches, model=place, device=device, world_size=world_size)
        own = load_model(**arguments, rank=0, say=say)
        threads = max(1, torch.get_num_threads() // world_size) if own.device.type == "cpu" else 1
        torch.set_num_threads(threads)
        theirs = [dict(arguments, rank=rank, device=_device(own, rank)) for rank in range(1, world_size)]
        workers.load(theirs, threads, own.device)
    except BaseException:
        workers.close()
        raise
    spread_over(own, workers.group)
    module = ParallelTransformer(own.module, own.config.vocab_size, workers)
    weakref.finalize(module, workers.close)
    return replace(own, module=module, name=own.name if is_folder(model) else str(model))


def _device(own: LoadedModel, rank: int) -> str:
    """Return where a process computes: on GPUs, each on one of its own."""
    return f"cuda:{rank}" if own.device.type == "cuda" else str(own.device)


def spread_over(loaded: LoadedModel, group: Group) -> None:
    """Join the part of a model that this process has loaded with the others'."""
    part = parts(shape_of(loaded.config), group.world_size)[group.rank]
    spread(loaded.module, part, group)
