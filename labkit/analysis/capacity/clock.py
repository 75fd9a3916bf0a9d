"""Clocks: the seconds that a step takes, as a function of its work.

The time depends on what a step must do: read the weights once, multiply for each token, read the keys and
values of every row. A `FittedClock` has the prices of a machine, fitted to a trace; a `Roofline` has the
least times, from a data sheet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from labkit.analysis.devices import Gpu, Link
from labkit.analysis.roofline import ModelSize, StepWork
from labkit.sampling_params import check_number
from labkit.trace.records import StepRecord

TERMS = ("step", "tokens", "keys", "sampled", "rows", "pairs")
_ROUNDS = 30  # of reweighting; it settles after a few
_HUBER = 1.345  # spreads: errors beyond it count less than by their square (Huber 1964)
_EXACT = 1e-9  # a relative spread below this is rounding


Clock = Callable[[StepWork], float]  # seconds that a step takes


@dataclass(frozen=True)
class FittedClock:
    """A price in seconds for each kind of work: `step` once, and the others for each of what they name.

    Attributes:
        error: The median relative error of a step, among those that it was fitted to.
        bias: The relative error of these steps together: 0.01 is one percent too much.
        num_steps: The number of these steps.
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

    The method is non-negative least squares of the relative errors, with Huber's weights, so that what a busy
    moment did to some steps counts little. There are so few terms that every subset of them is tried.

    Args:
        records: Records with their seconds. Steps that computed nothing are left out.
        terms: The kinds of work that have a price, from `TERMS`.

    Raises:
        ValueError: If a term is unknown, or there are fewer than two steps per term.
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


# -- from a data sheet ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """A clock for a model on GPUs that one does not have: the least time of a step, plus an overhead.

    No kernel reaches both peaks of a data sheet, so real steps take longer, and real capacity is lower.

    Args:
        gpu: The data sheet.
        model: The sizes of the model.
        overhead: The seconds that every step takes besides: launches, scheduling, sampling.
        tensor_parallel_size: The number of such GPUs that share the model, each with a part of every layer.
        link: What connects them.
        latency: The seconds that each exchange between them takes besides its bytes. No data sheet has it:
            measure it, for instance as the time of the smallest all-reduce.
    """

    gpu: Gpu
    model: ModelSize
    overhead: float = 0.0
    tensor_parallel_size: int = 1
    link: Link | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        check_number("overhead", self.overhead, 0, math.inf)
        check_number("tensor_parallel_size", self.tensor_parallel_size, 1, self.model.heads, whole=True)
        check_number("latency", self.latency, 0, math.inf)
        if self.tensor_parallel_size > 1 and self.link is None:
            raise ValueError(f"link must say what connects {self.tensor_parallel_size} GPUs, as LINKS do")
        if self.tensor_parallel_size > 1 and not (self.model.hidden and self.model.vocab):
            raise ValueError("model must have its hidden and vocab, which decide what is sent")

    def __call__(self, step: StepWork) -> float:
        return self._working(step) + self.sending(step) + self.overhead

    def _working(self, step: StepWork) -> float:
        work = self.model.work(step, self.tensor_parallel_size)
        return work.seconds(self.gpu.bandwidth, self.gpu.flops)

    def sending(self, step: StepWork) -> float:
        """The seconds of such a step in which the GPUs exchange results; they do not compute meanwhile."""
        if self.link is None:
            return 0.0
        traffic = self.model.traffic(step, self.tensor_parallel_size)
        return traffic.seconds(self.link.bandwidth, self.latency)

    def bound(self, step: StepWork) -> str:
        """What such a step waits for most: "bandwidth" (of the memory), "compute" or "communication"."""
        if self.sending(step) > self._working(step):
            return "communication"
        work = self.model.work(step, self.tensor_parallel_size)
        return work.bound(self.gpu.bandwidth, self.gpu.flops)

    def speedup(self, step: StepWork) -> float:
        """How many times as fast as on one GPU such a step is. Below 1, more GPUs lose to one."""
        return replace(self, tensor_parallel_size=1)(step) / self(step)

    def break_even_latency(self, step: StepWork) -> float:
        """The latency from which on more GPUs lose to one; below 0, they lose by their bytes alone.

        Raises:
            ValueError: If there is only one GPU.
        """
        if self.tensor_parallel_size == 1:
            raise ValueError("tensor_parallel_size must be at least 2, to lose to one")
        alone, instant = replace(self, tensor_parallel_size=1), replace(self, latency=0.0)
        exchanges = self.model.traffic(step, self.tensor_parallel_size).exchanges
        return (alone(step) - instant(step)) / exchanges

    def num_blocks(self, block_size: int = 16, share: float = 0.9) -> int:
        """How many blocks of the KV cache fit beside the weights into this share of the memory.

        Raises:
            ValueError: If not even one does.
        """
        check_number("block_size", block_size, 1, math.inf, whole=True)
        check_number("share", share, 0, 1)
        size = self.tensor_parallel_size
        most = -(-self.model.kv_heads // size) / self.model.kv_heads  # of the KV heads, in one GPU
        left = share * self.gpu.memory - self.model.bytes / size
        blocks = int(left // (block_size * self.model.kv_bytes_per_token * most))
        if blocks < 1:
            which = f"a {self.gpu.name}" if size == 1 else f"{size} {self.gpu.name}s"
            raise ValueError(
                f"the weights take {self.model.bytes / 1e9:.1f} GB, and {share:.0%} of {which} is "
                f"{size * share * self.gpu.memory / 1e9:.1f} GB: no block of the KV cache fits"
            )
        return blocks
