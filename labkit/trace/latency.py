"""What a request's latencies mean. They are defined here, once, and used wherever one is shown.

All are differences between times on one clock: seconds for an engine or a client, and tokens or steps for a
timeline that runs on those.

- **TTFT**, time to first token: from arrival to the first token. It includes the time in the queue.
- **ITL**, inter-token latency: from one token of a request to its next. An answer of n tokens has n - 1.
- **TPOT**, time per output token: the decode time, from the first token to the last, over n - 1. It is the
  mean of a request's ITLs, so it has one value per request, in which a long stall can hide.
- **End-to-end latency**: from arrival to the end of the request.
- **Queue time**: from arrival to the first step that works on the request.

A speculative step gives a request several tokens at once. Then TPOT does not change its meaning, but an ITL
can be read in three ways, which agree as long as tokens come one by one:

- `itl` counts token by token: the first of the new tokens has the whole gap, the others a gap of 0. Its
  maximum says how long the answer stood still; its median says little: it is 0 if most drafts are accepted.
- `itl_shared` divides the gap equally among the tokens that ended it. It has as many values and the same sum,
  and its median says how fast the text grows.
- `itl_per_step` has one gap for each step that gave the request tokens, however many. This is vLLM's
  `inter_token_latency_seconds`, and what the client of a stream sees, whose pieces are a step's tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple


def ttft(arrival: float, token_times: Sequence[float]) -> float | None:
    """Time to first token, from arrival; None if there is no token yet."""
    return token_times[0] - arrival if token_times else None


def itl(token_times: Iterable[float]) -> list[float]:
    """Inter-token latencies, token by token: 0 between tokens that came at once."""
    return [after - before for before, after in pairwise(token_times)]


def itl_shared(token_times: Iterable[float]) -> list[float]:
    """Inter-token latencies, each gap divided equally among the tokens that came at its end."""
    shared: list[float] = []
    before = None
    for now, tokens in groupby(token_times):
        shared += share_gap(before, now, sum(1 for _ in tokens))
        before = now
    return shared


def share_gap(before: float | None, now: float, count: int) -> list[float]:
    """What `count` tokens that came at once add to `itl_shared`.

    Args:
        before: The time of the tokens before them; None if these are the first of the request.
        now: The time at which they came.
        count: The number of tokens.
    """
    if before is None:
        return [0.0] * (count - 1)
    return [(now - before) / count] * count


def itl_per_step(token_times: Iterable[float]) -> list[float]:
    """The gaps between successive steps that gave the request tokens, one gap per step."""
    return itl(now for now, _ in groupby(token_times))


def decode_time(token_times: Sequence[float]) -> float | None:
    """The time from the first token to the last; None if there is no token yet."""
    return token_times[-1] - token_times[0] if token_times else None


def tpot(token_times: Sequence[float], num_tokens: int | None = None) -> float | None:
    """Time per output token: the decode time over the tokens after the first; None if there is none of these.

    Args:
        token_times: The times of the tokens, or of the pieces in which they came.
        num_tokens: The number of tokens, if it is not that of the times.
    """
    after_first = (len(token_times) if num_tokens is None else num_tokens) - 1
    took = decode_time(token_times)
    return took / after_first if took is not None and after_first > 0 else None


def e2e(arrival: float, finish: float | None) -> float | None:
    """End-to-end latency; None if the request has not finished."""
    return None if finish is None else finish - arrival


def queue_time(arrival: float, first_scheduled: float | None) -> float | None:
    """Queue time; None if no step has worked on the request yet."""
    return None if first_scheduled is None else first_scheduled - arrival


# -- many requests --------------------------------------------------------------------------------


def percentile(values: Iterable[float], percent: float, counts: Iterable[int] | None = None) -> float:
    """The smallest value that at least `percent` of all values do not exceed (the nearest rank).

    It is always one of the values. NaN if there are none.

    Args:
        values: The values, in any order.
        percent: 0 to 100.
        counts: How often each of the values counts; None is once.
    """
    if counts is None:
        ordered = sorted(values)
        return ordered[_rank(len(ordered), percent) - 1] if ordered else math.nan
    pairs = sorted(zip(values, counts, strict=True))
    rank = _rank(sum(count for _, count in pairs), percent)
    reached = 0
    for value, count in pairs:
        reached += count
        if reached >= rank:
            return value
    return math.nan


def _rank(count: int, percent: float) -> int:
    return max(1, math.ceil(count * percent / 100 - 1e-9))  # 1e-9: a product that is whole may be rounded up


class Spread(NamedTuple):
    """The median and the tail of a latency. The median of an even number is the mean of the middle two."""

    median: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of some values; None if there are none."""
        if not values:
            return None
        return cls(statistics.median(values), percentile(values, 95), percentile(values, 99))
