"""Seeded workloads: prompts and answers of uneven length, of real text or of random tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.resources import files

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """A prompt as token ids, and how many tokens to answer with."""

    prompt: list[int]
    max_tokens: int


def prose() -> str:
    """Return the text in the package that prompts are cut from. It is in the public domain."""
    return files("labkit").joinpath("data/alice.txt").read_text(encoding="utf-8").split("\n", 1)[1].strip()


def make_workload(
    tokenizer: PreTrainedTokenizerBase,
    count: int = 32,
    *,
    seed: int = 0,
    prompt_tokens: tuple[int, int] = (16, 256),
    output_tokens: tuple[int, int] = (16, 128),
) -> list[Job]:
    """Make jobs with prompts cut out of the text. Lengths are log-uniform: many are short, a few long."""
    rng = random.Random(seed)
    token_ids = tokenizer.encode(prose(), add_special_tokens=False)
    jobs = []
    for _ in range(count):
        length = _draw(rng, *prompt_tokens)
        start = rng.randrange(len(token_ids) - length)
        jobs.append(Job(token_ids[start : start + length], _draw(rng, *output_tokens)))
    return jobs


def make_noise(
    vocab_size: int,
    count: int = 32,
    *,
    seed: int = 0,
    prompt_tokens: tuple[int, int] = (16, 256),
    output_tokens: tuple[int, int] = (16, 128),
) -> list[Job]:
    """Make jobs with lengths as in `make_workload`, but random tokens: for weights that know no text."""
    rng = random.Random(seed)
    return [
        Job(
            [rng.randrange(vocab_size) for _ in range(_draw(rng, *prompt_tokens))],
            _draw(rng, *output_tokens),
        )
        for _ in range(count)
    ]


def _draw(rng: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** rng.random())
