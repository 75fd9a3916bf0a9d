"""Requests at random times: seeded, uneven, and like nobody else's."""

from __future__ import annotations

import itertools
import statistics

import pytest

from labkit.benchmark.serving.arrivals import Lengths, at_once, poisson
from labkit.models.tiny import tiny_tokenizer

SHORT = {"prompts": Lengths(10, 0.5, 6, 30), "answers": Lengths(6, 0.5, 3, 12)}


def test_arrivals_are_seeded_and_other_rates_bring_the_same_requests() -> None:
    tokenizer = tiny_tokenizer()
    slow = poisson(tokenizer, 4, 25, seed=3)
    assert slow == poisson(tokenizer, 4, 25, seed=3)
    assert slow != poisson(tokenizer, 4, 25, seed=4)
    assert len(slow) == 100
    fast = poisson(tokenizer, 8, 25, seed=3)
    assert [(a.prompt, a.max_tokens) for a in fast[:100]] == [(a.prompt, a.max_tokens) for a in slow]
    assert fast[7].at / fast[3].at == pytest.approx(slow[7].at / slow[3].at)


def test_arrivals_are_as_random_as_a_poisson_process() -> None:
    arrivals = poisson(tiny_tokenizer(), 50, 20, **SHORT)
    times = [arrival.at for arrival in arrivals]
    assert len(times) == 1000 and times == sorted(times) and times[0] > 0 and times[-1] < 20
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.01)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)  # of an exponential: the mean
    assert sum(gap < 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(1 - 2.71828**-1, abs=0.04)


def test_lengths_have_their_median_a_heavy_tail_and_bounds() -> None:
    tokenizer = tiny_tokenizer()
    arrivals = at_once(tokenizer, 600, prompts=Lengths(40, 1.0, 8, 300), answers=Lengths(24, 0.8, 4, 64))
    asked = [arrival.max_tokens for arrival in arrivals]
    assert (min(asked), max(asked)) == (4, 64)
    assert statistics.median(asked) == pytest.approx(24, abs=3)
    lengths = [len(tokenizer.encode(arrival.prompt)) for arrival in arrivals]
    assert min(lengths) >= 6 and max(lengths) <= 304  # cut in the middle of a word, it may be some others
    assert statistics.mean(lengths) > 1.2 * statistics.median(lengths)


def test_no_prompt_begins_like_another_and_another_text_keeps_the_lengths() -> None:
    tokenizer = tiny_tokenizer()
    one, other = (at_once(tokenizer, 200, text=text) for text in ("a", "b"))
    assert len({arrival.prompt[:4] for arrival in one + other}) > 395
    assert [a.max_tokens for a in one] == [a.max_tokens for a in other]
    lengths = ([len(tokenizer.encode(arrival.prompt)) for arrival in some] for some in (one, other))
    assert all(abs(a - b) <= 10 for a, b in zip(*lengths, strict=True))  # a word cut in two is some tokens
