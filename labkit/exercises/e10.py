"""Exercises of notebook 10: count the accepted drafts, and the textbook's rule for sampled drafts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from labkit import notebook
from labkit.core.model_runner import accept
from labkit.core.sampler import gumbel_noise, mix
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import TEXT, expect_same_answers, timelines, tiny_engine, tiny_model, whole
from labkit.models.teacher_forcing import teacher_forced
from labkit.sampling_params import SamplingParams

Accept = Callable[[Sequence[int], Sequence[int]], int]
Rule = Callable[[Sequence[float], Sequence[float], int, Random], int]

# -- 10.1 ------------------------------------------------------------------------------------------

# Answers that go round in circles: drafts taken from the answer itself are often accepted.
CIRCLES = SamplingParams(max_tokens=48, frequency_penalty=-2.0, ignore_eos=True)
PROMPTS = ("the sea and the sun and the sea and the sun", "once upon a time there was", "a day is a day")


def _cases() -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Drafts and what the model chose, shortest first: all cases with two tokens, then some long ones."""
    for length in range(4):
        for both in itertools.product((5, 7), repeat=2 * length):
            yield both[:length], both[length:]
    yield from (((0,), (0,)), ((0, 7), (0, 7)), ((7, 0), (7, 0)), ((0, 7), (7, 0)))  # 0 is a token
    rng = Random(10)
    for length, step in ((8, 1), (8, 100), (8, 1), (40, 65_536)):
        drafts = tuple(rng.choices(range(300, 50_000), k=length))
        for wrong in (length, length // 2, 0):
            # Equal numbers that are different objects. Python keeps small numbers only once: use large ones.
            chosen = [int(str(draft)) for draft in drafts]
            if wrong < length:
                chosen[wrong] += step
            yield drafts, tuple(chosen)


def _examine_accept(function: Callable[..., Any]) -> None:
    for drafts, chosen in _cases():
        _check_count(function(drafts, chosen), drafts, chosen)


def _check_count(got: Any, drafts: Sequence[int], chosen: Sequence[int]) -> None:
    """Raise `Wrong` if a count breaks a rule."""
    want = accept(drafts, chosen)
    told = f"drafts {drafts}, chosen {chosen}\nyours: {got!r}\nright: {want}"
    count = whole(got)
    if count is None or isinstance(got, bool):
        raise Wrong("return a whole number: how many drafts become part of the answer", told)
    got = count
    expect(
        0 <= got <= len(drafts),
        "count only drafts: the token after the last right one is added by the engine",
        told,
    )
    if got < want:
        raise Wrong("take every draft before the first wrong one: each of them saves a step", told)
    if got > want:
        hits = sum(draft == token for draft, token in zip(drafts, chosen, strict=True))
        later = "stop at the first wrong draft: what the model chose after it, it chose after a wrong token"
        raise Wrong(
            later if got == hits else "a draft is right only if the model chose the same token in its place",
            told,
        )


def circles(speculative: str | None, rule: Accept | None = None) -> Engine:
    """Answer the prompts of this exercise with tiny-random, with or without n-gram drafts.

    Args:
        speculative: field of `EngineConfig`.
        rule: function that counts the accepted drafts; None is the engine's own.
    """
    engine = tiny_engine(num_blocks=80, block_size=4, speculative=speculative, speculative_gate=False)
    if rule:
        engine.runner.accept = lambda drafts, chosen: int(rule(drafts, chosen))
    for prompt in PROMPTS:
        engine.add_request(prompt, CIRCLES)
    engine.run()
    return engine


def _run_accept(function: Callable[..., Any]) -> Run:
    engine, reference, plain = circles("ngram", function), circles("ngram"), circles(None)
    expect_same_answers(engine, plain, "the answers must be those without drafts")
    tokens = sum(len(output.token_ids) for output in engine.outputs.values())
    sentence = (
        f"In the engine, {tokens} tokens in {len(engine.trace)} steps with your rule, {len(reference.trace)} "
        f"with the reference, {len(plain.trace)} without drafts. The tokens are the same in all three."
    )
    return Run(sentence, timelines({"With your rule:": engine.trace, "Without drafts:": plain.trace}))


# -- 10.2 ------------------------------------------------------------------------------------------

_DRAWS = 20_000
_SURE = 1e-6  # how often a right answer is refused by chance
_P, _Q = (0.5, 0.25, 0.125, 0.125), (0.125, 0.125, 0.25, 0.5)


def accept_or_replace(p: Sequence[float], q: Sequence[float], draft: int, rng: Random) -> int:
    """Return the draft with probability min(1, p/q), otherwise a token drawn from what p has more of than q.

    The result is distributed as p is, for any q (Leviathan et al. 2023; Chen et al. 2023).

    Args:
        p, q: probabilities of each token: the model's and the drafter's.
        draft: token that was drawn from q.
    """
    if rng.random() < p[draft] / q[draft]:
        return draft
    left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    return rng.choices(range(len(p)), weights=left)[0]


def overlap(p: Sequence[float], q: Sequence[float]) -> float:
    """The largest share of drafts from q that can be taken while what comes out is distributed as p is."""
    return sum(map(min, p, q))


def chance_of(counts: Sequence[float], expected: Sequence[float]) -> float:
    """The probability of counts at least as far from these shares as by chance (Pearson's chi-square)."""
    total = sum(counts)
    pairs = list(zip(counts, expected, strict=True))
    if any(count and not share for count, share in pairs):
        return 0.0
    terms = [(count - total * share) ** 2 / (total * share) for count, share in pairs if share]
    freedom = max(1, len(terms) - 1)
    half = torch.tensor([freedom / 2, sum(terms) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _examine_rule(function: Callable[..., Any]) -> None:
    _draw(function, (1.0,), (1.0,), [0])
    _distributed(function, _P, _Q)
    for p, q, draft in (
        ((0.5, 0.5), (0.5, 0.5), 1),
        ((0.75, 0.25), (0.5, 0.5), 0),
        ((0.0, 1.0), (0.0, 1.0), 1),
        ((0.25, 0.25, 0.5), (0.25, 0.5, 0.25), 0),
    ):
        got = set(_draw(function, p, q, [draft] * 200))
        told = f"p {p}, q {q}, draft {draft}: tokens {sorted(got)} came out"
        rule = (
            "a draft that is at least as probable for the model as for the drafter (p >= q) is always taken"
        )
        expect(got == {draft}, rule, told)
    for p, q, draft in (((1.0, 0.0), (0.0, 1.0), 1), ((0.5, 0.0, 0.5), (0.5, 0.5, 0.0), 1)):
        got = set(_draw(function, p, q, [draft] * 200))
        told = f"p {p}, q {q}, draft {draft}: tokens {sorted(got)} came out"
        expect(all(p[token] > 0 for token in got), "a token with p = 0 must never come out", told)
        rule = "a token that is never drafted (q = 0) must come out as well, in place of refused drafts"
        expect(any(q[token] == 0 for token in got), rule, told)
    rng = Random(12)
    for size in (3, 12):
        p, q = ([rng.random() ** 2 for _ in range(size)] for _ in range(2))
        _distributed(function, *([x / sum(some) for x in some] for some in (p, q)))
    once, again = (_draw(function, _P, _Q, [3] * 100, seed=5) for _ in range(2))
    rule = "draw from `rng` and nothing else: two runs with the same seed must be the same"
    expect(once == again, rule, f"p {_P}, q {_Q}, draft 3: first {once[:8]} ..., then {again[:8]} ...")


def _draw(
    function: Callable[..., Any],
    p: Sequence[float],
    q: Sequence[float],
    drafts: Sequence[int],
    *,
    seed: int = 2,
) -> list[int]:
    """The token that comes out for each of these drafts."""
    rng, tokens = Random(seed), []
    mine, theirs = list(p), list(q)
    for draft in drafts:
        returned = function(mine, theirs, draft, rng)
        token = whole(returned)
        if token is None or not 0 <= token < len(p):
            told = f"p {list(p)}, q {list(q)}, draft {draft}: it returned {returned!r}"
            raise Wrong("always return a token: a place in p, from 0 on", told)
        tokens.append(token)
    expect(mine == list(p) and theirs == list(q), "leave p and q as they are", f"p is {mine}, q is {theirs}")
    return tokens


def _distributed(function: Callable[..., Any], p: Sequence[float], q: Sequence[float]) -> None:
    """Raise `Wrong` unless tokens are distributed as p is, and are the draft as often as possible."""
    drafts = Random(1).choices(range(len(p)), weights=q, k=_DRAWS)
    tokens = _draw(function, p, q, drafts)
    counts = [tokens.count(token) for token in range(len(p))]
    told = f"of {_DRAWS:,} drafts from q:\ntoken     p     q  came out\n" + "\n".join(
        f"{token:5} {a:5.3f} {b:5.3f} {count / _DRAWS:9.3f}"
        for token, (a, b, count) in enumerate(zip(p, q, counts, strict=True))
    )
    if chance_of(counts, p) < _SURE:
        name, chance = max(
            ((name, chance_of(counts, shares)) for name, shares in _mistakes(p, q).items()),
            key=lambda pair: pair[1],
        )
        rule = "tokens must come out as often as p says"
        raise Wrong(f"{rule}, but they come out as if {name}" if chance > _SURE else rule, told)
    taken = sum(map(int.__eq__, tokens, drafts))
    most = overlap(p, q)
    told += f"\nthe draft itself came out {taken / _DRAWS:.1%} of the time, and could {most:.1%} of the time"
    rule = "tokens come out as often as p says, but drafts that could be taken are thrown away"
    expect(chance_of((taken, _DRAWS - taken), (most, 1 - most)) > _SURE, rule, told)


def _mistakes(p: Sequence[float], q: Sequence[float]) -> dict[str, list[float]]:
    """How often each token comes out under rules that look right but are not."""
    ratios = [a / b if b else 1.0 for a, b in zip(p, q, strict=True)]
    kept = [min(a, b) for a, b in zip(p, q, strict=True)]
    left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    either = [abs(a - b) for a, b in zip(p, q, strict=True)]
    size, even = range(len(p)), [1.0] * len(p)
    top = [float(token == max(size, key=left.__getitem__)) for token in size]
    fallen = [x + (1 - sum(left)) * (token == len(p) - 1) for token, x in enumerate(left)]

    def out(accepted: Sequence[float], replaced: Sequence[float]) -> list[float]:
        """Accepted tokens, and in place of the others tokens in these proportions."""
        rest, total = 1 - sum(accepted), sum(replaced) or 1.0
        return [a + rest * b / total for a, b in zip(accepted, replaced, strict=True)]

    sure = [b if ratio >= 1 else 0.0 for b, ratio in zip(q, ratios, strict=True)]
    by_p = [a * b for a, b in zip(p, q, strict=True)]
    upside_down = [b * min(1.0, 1 / ratio) if ratio else b for b, ratio in zip(q, ratios, strict=True)]
    return {
        "every draft were taken": list(q),
        "a draft were taken only where p >= q: elsewhere, take it with probability p/q": out(sure, left),
        "a draft were taken with probability p: it is p/q": out(by_p, left),
        "a draft were taken with probability q/p: it is p/q": out(upside_down, left),
        "a refused draft were replaced from p: draw from what p has more of, max(0, p - q)": out(kept, p),
        "a refused draft were replaced from q: draw from what p has more of, max(0, p - q)": out(kept, q),
        "a refused draft were replaced from |p - q|: cut the difference off at 0": out(kept, either),
        "a refused draft were replaced by the likeliest token that is left: draw it": out(kept, top),
        "a refused draft were replaced by any token alike: draw from max(0, p - q)": out(kept, even),
        "the last token took what is missing: max(0, p - q) does not add up to 1, divide by the sum": out(
            kept, fallen
        ),
    }


@functools.cache
def _odds() -> tuple[Tensor, Tensor]:
    """Log-probabilities of tiny-random and of its int8 copy after each token of a text, (tokens, vocab)."""
    logits = (teacher_forced(tiny_model(kind).module, TEXT) for kind in (None, "int8"))
    mine, drafters = (each.double().log_softmax(-1) for each in logits)
    return mine, drafters


def _run_rule(function: Callable[..., Any]) -> Run:
    mine, drafters = _odds()
    rng = Random(4)
    taken = 0
    most = 0.0
    for p, q in zip(mine.exp().tolist(), drafters.exp().tolist(), strict=True):
        draft = rng.choices(range(len(q)), weights=q)[0]
        taken += int(function(p, q, draft, rng)) == draft
        most += overlap(p, q)
    noise = gumbel_noise([mix(0, place) for place in range(len(mine))], torch.arange(mine.shape[1]))
    together = int(((mine + noise).argmax(-1) == (drafters + noise).argmax(-1)).sum())
    shares = {"your rule": taken, "at most, on average": most, "the same noise for both": together}
    shares = {name: round(100 * count / len(mine), 1) for name, count in shares.items()}
    yours, bound, common = shares.values()
    sentence = (
        f"After each of {len(mine)} tokens, an int8 copy drafted for tiny-random at temperature 1: your rule "
        f"took {yours:g}% of the drafts, and {bound:g}% can be taken on average. Of those drawn with the "
        f"model's own noise, {common:g}% were right."
    )
    picture = notebook.bars(shares, "Drafts of an int8 copy that are taken", unit="%", digits=1)
    return Run(sentence, [("How many drafts are taken:", picture)])


EXERCISES: tuple[Exercise, ...] = (
    Exercise("10.1", "count the drafts that are right", accept, _examine_accept, _run_accept),
    Exercise("10.2", "accept or replace", accept_or_replace, _examine_rule, _run_rule),
)
