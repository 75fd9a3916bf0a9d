"""Teacher forcing: what a model would have said at each place of a given text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.core.attention import Span, build_metadata
from labkit.core.model import Transformer
from labkit.kernels.gathered_sdpa import SDPA
from labkit.kernels.int8_kv import kv_shape


def teacher_forced(
    module: Transformer,
    token_ids: Sequence[int],
    *,
    block_size: int = 16,
    kv_cache_dtype: str | None = None,
) -> Tensor:
    """Return the logits (len(token_ids), vocab_size) of every place, in fp32.

    Each place sees the given tokens before it, even if the model would have chosen others.
    """
    num_blocks = -(-len(token_ids) // block_size)
    cache = kv_shape(module, kv_cache_dtype).new_cache(num_blocks, block_size)
    row = Span(0, len(token_ids), range(num_blocks))
    metadata = build_metadata([row], cache, SDPA, windows=module.windows)
    tokens = torch.tensor(token_ids, device=module.device)
    positions = torch.arange(len(token_ids), device=module.device)
    return module.logits(module(tokens, positions, cache, metadata)).float()
