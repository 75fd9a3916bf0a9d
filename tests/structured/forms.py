"""A vocabulary for tests, and what is done with masks in several of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from labkit.models.load import LoadedModel, load_model
from labkit.structured.form import Matcher
from labkit.structured.guidance import Guidance
from labkit.structured.vocabulary import Vocabulary


@functools.cache
def tiny() -> LoadedModel:
    return load_model("tiny-random", say=None)


@functools.cache
def vocabulary() -> Vocabulary:
    """Some thousand tokens: each byte, and common words with the space before them."""
    model = tiny()
    return Vocabulary(model.tokenizer, model.module.vocab_size, model.eos_token_ids)


@functools.cache
def guidance() -> Guidance:
    return Guidance(vocabulary())


def tokens_of(mask: np.ndarray | Tensor) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


def walk(matcher: Matcher, rng: random.Random, most: int = 12) -> Iterator[tuple[bytes, set[int]]]:
    """What is written so far, and which tokens may come next, along an answer of random tokens."""
    text = b""
    for _ in range(most):
        allowed = tokens_of(matcher.mask())
        yield text, allowed
        if not allowed:
            return
        # Long tokens are many, and short ones lead to other places.
        short = [token for token in allowed if len(vocabulary().tokens[token]) == 1]
        token = rng.choice(sorted(short if short and rng.random() < 0.5 else allowed))
        assert matcher.advance(token)
        text += vocabulary().tokens[token]
