"""A model with a cache, and the reference that its answers are compared with (notebook 01)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from labkit.analysis.reference import reference_model
from labkit.core.attention import Span, build_metadata
from labkit.exercises.common import tiny_model
from labkit.kernels.gathered_sdpa import SDPA
from labkit.models.load import LoadedModel

Decoder = Callable[[list[int], int], list[int]]  # prompt and length of the answer -> answer

ROOM = 512  # tokens, prompt and answer together
PAGE = 16


class CachedModel:
    """A model with room for the keys and values of one text.

    Args:
        loaded: a model of the Llama shape.
        room: number of tokens that the cache holds.

    Attributes:
        passes: (start, tokens) of each pass through the model so far.
    """

    def __init__(self, loaded: LoadedModel, room: int = ROOM) -> None:
        self.module = loaded.module
        self.table = list(range(-(-room // PAGE)))
        self.cache = self.module.kv_shape.new_cache(len(self.table), PAGE)
        self.passes: list[tuple[int, int]] = []

    @property
    def computed(self) -> int:
        """Number of tokens that went through the model so far."""
        return sum(tokens for _, tokens in self.passes)

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        """Compute these tokens, the first of them at position `start`, and keep their keys and values.

        Each token sees itself and every token before it, from this call and from those before.

        Returns:
            Logits (vocab_size,) for the token that follows the last one.

        Raises:
            ValueError: there are no tokens, or there is no room for them.
        """
        return self.compute(tokens, range(start, start + len(tokens)), self.row(start, len(tokens)))

    def row(self, start: int, count: int) -> Span:
        """Where `count` tokens from position `start` on lie in the cache. They see all before them."""
        room = len(self.table) * PAGE
        if count < 1 or start < 0 or start + count > room:
            raise ValueError(f"{count} tokens from position {start} on: there is room for 0 to {room - 1}")
        return Span(start, count, self.table)

    def compute(self, tokens: Sequence[int], positions: Sequence[int], row: Span) -> Tensor:
        """One pass over these tokens; the row says where they lie in the cache and what they see."""
        module = self.module
        self.passes.append((positions[0], len(tokens)))
        metadata = build_metadata([row], self.cache, SDPA, windows=module.windows)
        token_ids, places = (torch.tensor(list(x), device=module.device) for x in (tokens, positions))
        hidden = module(token_ids, places, self.cache, metadata)
        return module.logits(hidden[-1:])[0]


def reference_for(loaded: LoadedModel) -> Decoder:
    """A decoder that answers as `transformers` does, greedily and with the same weights.

    Args:
        loaded: a model with a short name or a Hub id.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading the weights shows one
    try:
        model = reference_model(loaded, loaded.name)
    finally:
        if shown:
            logging.enable_progress_bar()

    @functools.cache
    def answer(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        return tuple(out[0, len(prompt) :].tolist())

    def reference(prompt: Sequence[int], max_tokens: int) -> list[int]:
        check_question(prompt, max_tokens)
        return list(answer(tuple(prompt), max_tokens))

    return reference


@functools.cache
def tiny_reference() -> Decoder:
    """The reference for tiny-random."""
    return reference_for(tiny_model())


def check_question(prompt: Sequence[int], max_tokens: int) -> None:
    """Raise ValueError for a question without a prompt or an answer, or one that is too long."""
    if not prompt or max_tokens < 1 or len(prompt) + max_tokens > ROOM:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_tokens} to answer: at least one of each is needed, "
            f"and {ROOM} is the most of both together"
        )
