"""How far seconds can be trusted: steps of one size should take as long under every setting.

Nothing but the machine can make the difference between those, so their spread is the noise of a race.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from labkit.page.race.run import Result

LEAST = 0.05  # two runs of one setting on an idle machine differ by this much
BUSY = 0.25  # from here on, something else was at work


def noise(results: Sequence[Result]) -> float:
    """Return the largest relative difference, between two settings, of what steps of one size took.

    The size of a step is its requests and tokens. With no size in common it is `LEAST`, and never below.
    """
    sizes = [_seconds_by_size(result) for result in results]
    most = LEAST
    for one, other in combinations(sizes, 2):
        ratios = [
            statistics.median(one[size]) / statistics.median(other[size]) for size in one.keys() & other
        ]
        if ratios:
            ratio = statistics.median(ratios)
            most = max(most, ratio - 1, 1 / ratio - 1)
    return most


def _seconds_by_size(result: Result) -> dict[tuple[int, int], list[float]]:
    sizes = defaultdict(list)
    for record in result.trace:
        work = sum(map(bool, record.num_tokens)), record.total_tokens + sum(record.padding)
        if record.seconds > 0:
            sizes[work].append(record.seconds)
    return sizes


def busy(noise: float) -> str:
    """Return a sentence for a machine that had other things to do, else ""."""
    if noise < BUSY:
        return ""
    return (
        f"This machine was busy: steps of one size took {1 + noise:.1f} times as long under one setting as "
        "under another, so trust the steps and not the seconds."
    )
