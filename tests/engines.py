"""Small engines for tests, and what is done with them."""

from __future__ import annotations

import random

from labkit import Engine, EngineConfig, SamplingParams
from tests.conftest import VOCAB, loaded


def engine_of(family: str = "llama", **config) -> Engine:
    defaults = dict(block_size=4, num_blocks=60, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    return Engine(EngineConfig(**{"model": loaded(family), **defaults, **config}))


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine._unfinished


def play(
    engine: Engine, jobs: list[tuple[list[int], int]], *, arrival: float = 1.0, seed: int = 0
) -> list[str]:
    """Run jobs that arrive with this chance at each step; ids in the order of the jobs."""
    rng = random.Random(seed)
    ids, left = [], list(jobs)
    while left or engine.has_unfinished:
        while left and rng.random() < arrival:
            prompt, max_tokens = left.pop(0)
            ids.append(engine.add_request(prompt, SamplingParams(max_tokens=max_tokens)))
        engine.step()
    return ids
