"""What is done on a GPU before the first request: size the KV cache by what is free, capture the graphs.

On a CPU there is nothing to measure and nothing to capture.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import psutil
import torch

from labkit.config import EngineConfig
from labkit.core.attention import Span, build_metadata
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.core.model_runner import PagedModel
from labkit.kernels.backend import Backend
from labkit.kernels.cuda_graphs import Capture, DecodeGraphs
from labkit.kernels.gathered_sdpa import SDPA
from labkit.kernels.select import choose_backend

_GRAPH_SHARE = 0.5  # of what is free beside the KV cache and the activations of a step


def backend_for(model: PagedModel, config: EngineConfig) -> Backend:
    """How a model's attention is computed.

    Raises:
        ValueError: if that which the configuration names is not possible.
    """
    if not model.is_adapted:
        shape = model.kv_shape
        return choose_backend(
            model.device,
            shape.dtype,
            shape.head_dim,
            wanted=config.attention_backend,
            as_t4=config.as_t4,
        )
    if config.attention_backend == "triton":
        raise ValueError(
            "attention_backend must be auto or sdpa for a model that transformers runs, not 'triton'"
        )
    return SDPA


def activation_bytes(model: PagedModel, backend: Backend, config: EngineConfig) -> int:
    """What the widest step takes beside weights and KV cache, by a forward pass of that size on a GPU.

    The step is a chunk of the whole token budget at the end of the longest request, over a cache of a single
    page, which is in its table again and again. Then every seat gets logits, which are sorted, for sampling
    takes about as much.

    Raises:
        ValueError: if it does not fit into memory.
    """
    device, size = model.device, config.block_size
    longest = min(config.max_model_len or model.max_model_len, model.max_model_len)
    tokens = min(config.max_num_batched_tokens, longest)
    try:
        cache = model.kv_shape.new_cache(1, size)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        row = Span(longest - tokens, tokens, [0] * -(-longest // size))
        layout = build_metadata([row], cache, windows=model.windows, backend=backend)
        ids = torch.zeros(tokens, dtype=torch.long, device=device)
        hidden = model(ids, torch.arange(row.start, row.length, device=device), cache, layout)
        seats = hidden[:1].expand(config.max_num_seqs, -1).contiguous()
        model.logits(seats).float().sort(dim=-1)
        return torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"too little memory on {device} for a step of max_num_batched_tokens={tokens} tokens: lower it"
        ) from error


def check_memory(shape: KVShape, num_blocks: int, block_size: int) -> None:
    """Raise `ValueError` unless the device has room for a cache of this size."""
    needed, device = (num_blocks + 1) * block_size * shape.bytes_per_token, shape.device
    if device.type == "cpu":  # it promises memory that it does not have
        available = psutil.virtual_memory().available
    else:
        available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
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
    """The KV cache, and on a GPU the graphs of decode steps; with fewer pages where memory does not suffice.

    Args:
        num_blocks: pages that are wanted.
        reserve: bytes to be left for the activations of a step.
        capture: records graphs also where there is no GPU, for tests.

    Raises:
        ValueError: if not even a single page, or a decode step, fits.
    """
    device = model.device
    graphed = config.cuda_graphs and not model.is_adapted
    while True:
        cache = graphs = None
        try:
            check_memory(model.kv_shape, num_blocks, config.block_size)
            cache = model.kv_shape.new_cache(num_blocks, config.block_size)
            if not graphed or (device.type != "cuda" and capture is None):
                return cache, None
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**30
            graphs = DecodeGraphs(
                model,
                cache,
                backend,
                max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
                max_model_len=min(
                    config.max_model_len or model.max_model_len, num_blocks * config.block_size
                ),
                memory_limit=max(0, int(_GRAPH_SHARE * (free - reserve))),
                say=say,
                capture=capture,
            )
            graphs.warm_up()
            return cache, graphs
        except torch.OutOfMemoryError as error:
            fewer = num_blocks * 3 // 4
            if fewer < 1:
                raise ValueError(f"too little memory on {device} for a decode step") from error
        if say:
            say(f"Out of memory in warm-up: num_blocks is lowered from {num_blocks} to {fewer}.")
        num_blocks = fewer
        del cache, graphs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
