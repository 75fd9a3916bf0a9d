"""Warm-up: before the first request, make the KV cache and, on a GPU, measure memory and capture graphs.

On a CPU there is nothing to measure and nothing to capture. On a GPU, much can be missing: where Triton or
the capture of graphs fails, the engine goes on without it and says why.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import weakref
from collections.abc import Callable

import psutil
import torch

from labkit.config import EngineConfig
from labkit.core.attention import Span, build_metadata, row_order
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.core.model import Transformer
from labkit.core.model_runner import PagedModel
from labkit.kernels.backend import Backend
from labkit.kernels.cpu.attention import IN_PLACE
from labkit.kernels.cpu.layers import is_fused
from labkit.kernels.cuda_graphs import Capture, DecodeGraphs
from labkit.kernels.gathered_sdpa import SDPA
from labkit.kernels.int8_kv import kv_shape
from labkit.kernels.select import choose_backend
from labkit.outputs import in_one_line

# In a process, one engine at a time warms up: captures share a stream, and break if another thread waits for
# the whole device; two engines that size their pools count the same memory; and timed steps must be alone.
warm_up_lock = threading.RLock()
_GRAPH_SHARE = 0.5  # of the memory that the KV cache and the activations of a step leave free
_told: weakref.WeakKeyDictionary[PagedModel, set[str]] = weakref.WeakKeyDictionary()  # what was said once


def once(model: PagedModel, what: str, say: Callable[[str], None] | None) -> Callable[[str], None]:
    """Return `say` for the first engine of a model that tells of `what`; for others, silence."""
    told = _told.setdefault(model, set())
    if say is None or what in told:
        return lambda line: None
    told.add(what)
    return say


def tried_backend(
    model: PagedModel, config: EngineConfig, say: Callable[[str], None] | None
) -> tuple[Backend, int]:
    """Choose the attention backend, and try it with the widest step on a GPU.

    Returns:
        The backend, and how many bytes a step takes beside weights and KV cache; 0 if it is not on a GPU.

    Raises:
        ValueError: if the backend that the configuration names does not work, or memory does not suffice.
    """
    device = model.device
    if device.type != "cuda":
        return backend_for(model, config), 0
    tell = once(model, f"attention {config.attention_backend}", say)
    tell(f"Trying attention on {device}: kernels that are new here are compiled, which takes some seconds.")
    backend = backend_for(model, config)
    try:
        reserve = activation_bytes(model, backend, config)
    except Exception as error:
        if backend.name != "triton" or isinstance(error, ValueError):
            raise
        why = f"Triton's kernel does not run here ({in_one_line(error)})"
        if config.attention_backend == "triton":
            raise ValueError(f"attention_backend must be auto or sdpa here, not 'triton': {why}") from error
        backend = backend_for(model, dataclasses.replace(config, attention_backend="sdpa"))
        backend = dataclasses.replace(backend, reason=f"{SDPA.reason}; {why}")
        reserve = activation_bytes(model, backend, config)
    tell(f"Attention on {device}: {backend.name} ({backend.reason}).")
    return backend, reserve


def backend_for(model: PagedModel, config: EngineConfig) -> Backend:
    """Return the attention backend for a model.

    Raises:
        ValueError: if the configuration names one that is not possible.
    """
    if is_fused(model) and config.attention_backend == "auto":
        return IN_PLACE
    if isinstance(model, Transformer):
        shape = model.kv_shape
        return choose_backend(
            model.device,
            shape.dtype,
            shape.head_dim,
            wanted=config.attention_backend,
            as_t4=config.as_t4,
            kv_cache_dtype=config.kv_cache_dtype,
        )
    if config.attention_backend == "triton":
        raise ValueError(
            "attention_backend must be auto or sdpa for a model that transformers runs, not 'triton'"
        )
    return SDPA


def activation_bytes(model: PagedModel, backend: Backend, config: EngineConfig) -> int:
    """Measure how many bytes the widest step takes beside weights and KV cache, with a step on a GPU.

    The step decodes a token at the end of the longest request, and the rest of the token budget is a chunk at
    the end of another one, over a cache of a single block, which their tables list again and again: so the
    kernels of both are compiled. Then every seat gets logits, which are sorted: sampling takes about as much.

    Raises:
        ValueError: if the step does not fit into memory.
    """
    device, size = model.device, config.block_size
    longest = min(config.max_model_len or model.max_model_len, model.max_model_len)
    tokens = min(config.max_num_batched_tokens, longest)
    try:
        cache = kv_shape(model, config.kv_cache_dtype).new_cache(1, size)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        table = [0] * -(-longest // size)
        rows = [Span(longest - 1, 1, table)]
        if tokens > 1:
            rows.append(Span(longest - tokens + 1, tokens - 1, table))
            rows = [rows[i] for i in row_order(rows)]
        metadata = build_metadata(rows, cache, windows=model.windows, backend=backend)
        ids = torch.zeros(tokens, dtype=torch.long, device=device)
        positions = torch.cat([torch.arange(row.start, row.length) for row in rows]).to(device)
        hidden = model(ids, positions, cache, metadata)
        seats = hidden[:1].expand(config.max_num_seqs, -1).contiguous()
        model.logits(seats).float().sort(dim=-1)
        return torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"too little memory on {device} for a step of max_num_batched_tokens={tokens} tokens: lower it"
        ) from error


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a GPU can be had. PyTorch's allocator gives back what it holds unused."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def check_memory(shape: KVShape, num_blocks: int, block_size: int) -> None:
    """Raise `ValueError` unless the device has room for a cache of this size."""
    needed, device = (num_blocks + 1) * block_size * shape.bytes_per_token, shape.device
    if device.type == "cpu":  # the system lets us allocate more than it has
        available = psutil.virtual_memory().available
    else:
        available = free_bytes(device) if device.type == "cuda" else math.inf
    if needed > available:
        raise ValueError(
            f"num_blocks={num_blocks} needs {needed / 2**30:.1f} GiB for the KV cache, but {device} has "
            f"{available / 2**30:.1f} GiB free"
        )


def warm_up(
    model: PagedModel,
    backend: Backend,
    config: EngineConfig,
    num_blocks: int,
    *,
    reserve: int = 0,
    say: Callable[[str], None] | None = print,
    capture: Capture | None = None,
) -> tuple[PagedKVCache, DecodeGraphs | None]:
    """Make the KV cache and, on a GPU, the graphs of decode steps. If memory is short, the cache is smaller.

    Where graphs cannot be captured, there are none, and a line says why.

    Args:
        model, backend: the model and its attention backend.
        config: the sizes of the engine.
        num_blocks: the number of blocks that are wanted.
        reserve: the number of bytes that are left for the activations of a step.
        say: a function that gets a line about each thing that takes time; None is silence.
        capture: a recorder for tests, which makes graphs without a GPU.

    Raises:
        ValueError: if the cache needs more memory than is free, no decode step fits, or the model cannot have
            its cache in the dtype that is asked for.
    """
    device, shape = model.device, kv_shape(model, config.kv_cache_dtype)
    graphed = config.cuda_graphs and isinstance(model, Transformer)
    while True:
        cache = graphs = None
        try:
            check_memory(shape, num_blocks, config.block_size)
            cache = shape.new_cache(num_blocks, config.block_size)
            if not graphed or (device.type != "cuda" and capture is None):
                return cache, None
            free = free_bytes(device) if device.type == "cuda" else 2**30
            graphs = DecodeGraphs(
                model,
                cache,
                backend,
                max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
                max_model_len=min(
                    config.max_model_len or model.max_model_len, num_blocks * config.block_size
                ),
                memory_limit=max(0, int(_GRAPH_SHARE * (free - reserve))),
                say=once(model, f"graphs {backend.name}", say),
                capture=capture,
            )
            graphs.warm_up()
            return cache, graphs
        except torch.OutOfMemoryError as error:
            fewer = num_blocks * 3 // 4
            if fewer < 1:
                raise ValueError(f"too little memory on {device} for a decode step") from error
        except Exception as error:  # a kernel, a driver or a library that cannot be captured
            if cache is None:
                raise
            first = error.__context__ or error  # the end of a capture that failed is an error, too
            once(model, "no graphs", say)(
                f"CUDA graphs cannot be captured here, so every step runs eagerly ({in_one_line(first)})."
            )
            return cache, None
        if say:
            say(f"Out of memory in warm-up: num_blocks is lowered from {num_blocks} to {fewer}.")
        num_blocks = fewer
        del cache, graphs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
