"""Teacher forcing: what a model makes of a given text, each place seeing the true tokens before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.core.attention import Span, build_metadata
from labkit.core.model import Transformer
from labkit.kernels.gathered_sdpa import SDPA


def teacher_forced(module: Transformer, token_ids: Sequence[int], *, block_size: int = 16) -> Tensor:
    """Logits (len(token_ids), vocab_size), fp32, of every place, each seeing the given tokens before it."""
    blocks = -(-len(token_ids) // block_size)
    cache = module.new_cache(blocks, block_size)
    layout = build_metadata([Span(0, len(token_ids), range(blocks))], cache, SDPA, windows=module.windows)
    tokens = torch.tensor(token_ids, device=module.device)
    hidden = module(tokens, torch.arange(len(token_ids), device=module.device), cache, layout)
    return module.logits(hidden).float()
