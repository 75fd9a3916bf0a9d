"""Requests as a crowd sends them: at random times, with prompts and answers of very uneven length."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from labkit.analysis.workload import prose
from labkit.models.hub import TINY, find
from labkit.models.tiny import tiny_tokenizer
from labkit.sampling_params import check_number


@dataclass(frozen=True)
class Arrival:
    """A request to come: its time in seconds from the start, its prompt, and the tokens to answer with."""

    at: float
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, log-normal: half are below the median, a few far above; clipped to low ... high.

    Conversations with chatbots have about this distribution (ShareGPT), with several times our medians.

    Raises:
        ValueError: Unless 1 <= low <= median <= high and sigma >= 0.
    """

    median: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        check_number("low", self.low, 1, self.median, whole=True)
        check_number("high", self.high, self.median, 10**6, whole=True)
        check_number("sigma", self.sigma, 0, 10)

    def draw(self, rng: random.Random) -> int:
        """A random length."""
        drawn = rng.lognormvariate(log(self.median), self.sigma)
        return round(min(self.high, max(self.low, drawn)))

    def __str__(self) -> str:
        return f"log-normal, median {self.median:g}, {self.low} to {self.high}"


PROMPTS = Lengths(24, 1.0, 8, 192)
ANSWERS = Lengths(24, 0.8, 4, 64)
_MARK = 4  # letters


def poisson(
    tokenizer: PreTrainedTokenizerBase, rate: float, seconds: float, *, seed: int = 0, **how: Any
) -> list[Arrival]:
    """Arrivals for an open loop, independent of each other.

    They are a Poisson process on the condition that `rate * seconds` requests (rounded, at least one) come in
    this time: only when they come is random. With the same seed, other rates bring the same requests in the
    same order and rhythm. `how` has further arguments of `requests`.

    Raises:
        ValueError: If the rate or the time is not above 0, and as `requests` does.
    """
    check_number("rate", rate, 1e-6, 1e6)
    check_number("seconds", seconds, 1e-6, 1e6)
    rng = random.Random(f"gaps {seed}")
    count = max(1, round(rate * seconds))
    *times, whole = itertools.accumulate(rng.expovariate(1) for _ in range(count + 1))
    sent = itertools.islice(requests(tokenizer, seed=seed, **how), count)
    return [
        Arrival(seconds * at / whole, prompt, max_tokens)
        for at, (prompt, max_tokens) in zip(times, sent, strict=True)
    ]


def at_once(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0, **how: Any) -> list[Arrival]:
    """So many requests that all come at the start. `how` is passed to `requests`, which may raise."""
    sent = itertools.islice(requests(tokenizer, seed=seed, **how), count)
    return [Arrival(0.0, prompt, max_tokens) for prompt, max_tokens in sent]


def requests(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    text: object = "",
    prompts: Lengths = PROMPTS,
    answers: Lengths = ANSWERS,
) -> Iterator[tuple[str, int]]:
    """Endless prompts, cut out of the text in the package, and how many tokens to answer each with.

    Each prompt begins with a few letters of its own, so that no prefix cache knows it.

    Args:
        tokenizer: The tokenizer that counts the lengths.
        seed: The seed of the lengths and, together with `text`, of the words.
        text: Any label. Another one gives other words of the same lengths, which a cache cannot know.
        prompts, answers: Their lengths. That of a prompt may be wrong by a token or two, because it is cut in
            the middle of words.

    Raises:
        ValueError: If prompts may be longer than the text.
    """
    token_ids = tokenizer.encode(prose(), add_special_tokens=False, verbose=False)  # longer than it likes
    if prompts.high >= len(token_ids):
        raise ValueError(f"prompts: high must be below {len(token_ids)}, the tokens of the text")
    lengths, words = random.Random(f"lengths {seed}"), random.Random(f"words {seed} {text}")

    def drawn() -> Iterator[tuple[str, int]]:
        while True:
            length, max_tokens = prompts.draw(lengths), answers.draw(lengths)
            mark = "".join(words.choices(string.ascii_lowercase, k=_MARK))
            left = max(1, length - len(tokenizer.encode(mark, add_special_tokens=False)))
            start = words.randrange(len(token_ids) - left)
            piece = tokenizer.decode(token_ids[start : start + left], clean_up_tokenization_spaces=False)
            yield mark + piece, max_tokens

    return drawn()


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, without its weights; raises `ModelError` if there is no such model."""
    if model == TINY:
        return tiny_tokenizer()
    return AutoTokenizer.from_pretrained(find(model, say=None))
