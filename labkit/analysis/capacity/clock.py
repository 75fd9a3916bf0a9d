"""What a step costs: seconds as a function of the work that its record shows.

Time goes with what a step must do: read the weights once, multiply for each token, read the keys and values
of every row. How much of each there is stands in the trace, and so a machine's prices can be fitted to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

import numpy as np

from labkit.sampling_params import check_number
from labkit.trace.records import StepRecord

TERMS = ("step", "tokens", "keys", "sampled", "rows", "pairs")
_ROUNDS = 30  # of reweighting; it settles after a few
_HUBER = 1.345  # spreads: errors beyond it count less than by their square (Huber 1964)
_EXACT = 1e-9  # a relative spread below this is rounding


class StepWork(NamedTuple):
    """What a step has to do.

    Attributes:
        rows: requests in the batch.
        tokens: computed, with those that a static batch pads.
        sampled: places that go through the output layer: one of each row that samples, and its drafts.
        keys: tokens of the KV cache read, each row's own once.
        pairs: of a query and a key that it looks at; quadratic in a prompt.
    """

    rows: int
    tokens: int
    sampled: int
    keys: int
    pairs: int

    @classmethod
    def of(cls, record: StepRecord) -> StepWork:
        """The work that a record shows."""
        padding = sum(record.padding)
        sampled = sum(1 for tokens in record.sampled if tokens) + sum(map(len, record.drafted))
        work = cls.of_rows(record.starts, record.num_tokens, sampled)
        return work._replace(tokens=work.tokens + padding) if padding else work

    @classmethod
    def of_rows(cls, starts: Sequence[int], num_tokens: Sequence[int], sampled: int) -> StepWork:
        """The work of rows that compute `num_tokens[i]` tokens from `starts[i]` on."""
        rows = len(num_tokens) - num_tokens.count(0)
        tokens = sum(num_tokens)
        keys = sum(starts) + tokens
        if rows != len(num_tokens):  # idle seats read nothing
            keys = sum(start + count for start, count in zip(starts, num_tokens, strict=True) if count)
        # A query at position p looks at p + 1 keys.
        pairs = sum(map(mul, starts, num_tokens)) + (sum(map(mul, num_tokens, num_tokens)) + tokens) // 2
        return cls(rows, tokens, sampled, keys, pairs)


Clock = Callable[[StepWork], float]  # seconds that a step takes


@dataclass(frozen=True)
class FittedClock:
    """A price in seconds for each kind of work: `step` once, and the others for each of what they name.

    Attributes:
        error: the median relative error of a step, of those that it was fitted to.
        bias: what it gives all of these steps together, against what they took: 0.01 is one percent too much.
        num_steps: how many they were.
    """

    step: float = 0.0
    tokens: float = 0.0
    keys: float = 0.0
    sampled: float = 0.0
    rows: float = 0.0
    pairs: float = 0.0
    error: float = 0.0
    bias: float = 0.0
    num_steps: int = 0

    def __post_init__(self) -> None:
        for term in TERMS:
            check_number(term, getattr(self, term), 0, math.inf)

    def __call__(self, work: StepWork) -> float:
        rows, tokens, sampled, keys, pairs = work
        return (
            self.step
            + self.tokens * tokens
            + self.keys * keys
            + self.sampled * sampled
            + self.rows * rows
            + self.pairs * pairs
        )

    def __str__(self) -> str:
        prices = [
            f"{getattr(self, term) * 1e3:.4g} ms a {_ONE[term]}" for term in TERMS if getattr(self, term)
        ]
        return (
            f"{' + '.join(prices)}; median error of a step {self.error:.1%}, of all together "
            f"{self.bias:+.1%} ({self.num_steps} steps)"
        )


_ONE = dict(zip(TERMS, ("step", "token", "key", "place that samples", "row", "pair"), strict=True))


def fit(records: Iterable[StepRecord], terms: Sequence[str] = TERMS[:3]) -> FittedClock:
    """Find the prices that come nearest to what steps took.

    Non-negative least squares of relative errors, with Huber's weights: what a busy moment did to some steps
    counts little. With so few terms every subset is tried, so the best is the best.

    Args:
        records: with their seconds; steps that computed nothing are left out.
        terms: which kinds of work have a price, of `TERMS`.

    Raises:
        ValueError: for terms that there are not, or fewer steps than twice as many as terms.
    """
    names = tuple(dict.fromkeys(terms))
    if not names or not set(names) <= set(TERMS):
        raise ValueError(
            f"terms must be some of {', '.join(TERMS)}, not {', '.join(map(str, terms)) or 'none'}"
        )
    timed = [(StepWork.of(record), record.seconds) for record in records]
    timed = [(work, seconds) for work, seconds in timed if work.tokens and seconds > 0]
    if len(timed) < 2 * len(names):
        raise ValueError(
            f"records must hold at least {2 * len(names)} steps with their seconds, to fit {len(names)} "
            f"terms, not {len(timed)}"
        )
    seconds = np.array([taken for _, taken in timed])
    work = np.array([[1 if name == "step" else getattr(work, name) for name in names] for work, _ in timed])
    relative = work / seconds[:, None]
    sizes = np.maximum(np.linalg.norm(relative, axis=0), np.finfo(float).tiny)
    columns = relative / sizes  # of like size, so that no term drowns in rounding
    weights = np.ones(len(timed))
    for _ in range(_ROUNDS):
        found = _non_negative(columns * weights[:, None], weights)
        off = np.abs(columns @ found - 1)
        spread = 1.4826 * np.median(off)  # the standard deviation, if most errors are normal
        before, weights = weights, np.sqrt(np.minimum(1, _HUBER * spread / np.maximum(off, _EXACT)))
        if spread < _EXACT or np.allclose(before, weights, atol=1e-6):
            break
    prices = found / sizes
    predicted = work @ prices
    return FittedClock(
        **dict(zip(names, prices.tolist(), strict=True)),
        error=float(np.median(np.abs(predicted / seconds - 1))),
        bias=float(predicted.sum() / seconds.sum() - 1),
        num_steps=len(timed),
    )


def _non_negative(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |columns @ x - target|.

    It is the plain least squares of the columns that it uses, so it is among those of all subsets.
    """
    best, least = np.zeros(columns.shape[1]), float(target @ target)
    for size in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            some = columns[:, chosen]
            x = np.linalg.lstsq(some, target, rcond=None)[0]
            left = float(np.sum((some @ x - target) ** 2))
            if (x >= 0).all() and left < least:
                best, least = np.zeros(columns.shape[1]), left
                best[list(chosen)] = x
    return best
