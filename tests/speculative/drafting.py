"""Engines that draft, and prompts in which there is something to draft."""

from __future__ import annotations

import random

from labkit import Engine, EngineConfig
from labkit.schedulers.audit import check_pool
from labkit.speculative.draft_model import ModelDrafter
from tests.conftest import VOCAB, loaded


def engine_of(speculative: str | None, **config) -> Engine:
    defaults = dict(block_size=4, num_blocks=80, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    if speculative == "draft":
        defaults["draft_model"] = loaded("qwen2")
    return Engine(
        EngineConfig(
            model=loaded("llama"), speculative=speculative, speculative_gate=False, **{**defaults, **config}
        )
    )


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_blocks
    if engine.speculator and isinstance(engine.speculator.drafter, ModelDrafter):
        pool = engine.speculator.drafter.pool
        check_pool(pool)
        assert not pool.tables


def repetitive(rng: random.Random, length: int) -> list[int]:
    """A prompt in which n-grams occur again and again."""
    words = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 4))] for _ in range(3)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(words)
    return tokens[:length]
