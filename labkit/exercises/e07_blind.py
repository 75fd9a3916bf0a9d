"""The fast engine of notebook 07 that is wrong: in decode, its attention sees nothing of the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.config import EngineConfig
from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.engine import Engine
from labkit.exercises.common import exactly
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA
from labkit.models.load import LoadedModel


class OnlyItself:
    """Rows that decode, each of which sees only its own token: the softmax of one score is 1."""

    def __init__(self, first: int, rows: Sequence[Span], cache: PagedKVCache) -> None:
        self.first, self.last = first, first + len(rows)
        size, device = cache.block_size, cache.device
        self.blocks = torch.tensor([row.table[row.start // size] for row in rows], device=device)
        self.places = torch.tensor([row.start % size for row in rows], device=device)

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        own = pages[self.blocks, 1, :, self.places]  # values of these tokens: (rows, kv_heads, head_dim)
        return own.repeat_interleave(q.shape[1] // own.shape[1], dim=1)


BLIND = dataclasses.replace(
    SDPA, name="only itself", decode=lambda first, rows, cache, windows: [OnlyItself(first, rows, cache)]
)
"""Attention that is right for prompts, but sees nothing of the cache in decode."""


def answer_together(
    model: LoadedModel, prompts: Sequence[list[int]], max_tokens: int, backend: Backend = SDPA
) -> Engine:
    """Answer each prompt with `max_tokens` tokens, with this attention.

    The first prompt is computed before the others, so that they find in the prefix cache what they share
    with it.
    """
    config = EngineConfig(model=model, num_blocks=256, attention_backend="sdpa", cuda_graphs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # the engine says which attention it chose
        engine = Engine(config)
    engine.runner.backend = backend
    for prompt in prompts:
        engine.add_request(prompt, exactly(max_tokens))
        if len(engine.outputs) == 1:
            engine.step()
    engine.run()
    return engine
