"""The latencies of a request, with tokens one by one or several at once, and percentiles of many."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.trace import latency
from labkit.trace.latency import Spread

WHOLE = st.integers(0, 1000).map(float)  # differences and sums of these are exact


@st.composite
def token_times(draw: st.DrawFn, *, at_once: bool = True) -> list[float]:
    """Times of a request's tokens, some of which may come at once."""
    moments = sorted(draw(st.sets(WHOLE, max_size=20)))
    counts = st.integers(1, 4) if at_once else st.just(1)
    return [now for now in moments for _ in range(draw(counts))]


def test_a_request_by_hand() -> None:
    times = [2.0, 2.0, 5.0, 6.0, 6.0, 6.0, 8.0]
    assert latency.ttft(0.5, times) == 1.5
    assert latency.itl(times) == [0, 3, 1, 0, 0, 2]
    assert latency.itl_shared(times) == pytest.approx([0, 3, 1 / 3, 1 / 3, 1 / 3, 2])
    assert latency.itl_per_step(times) == [3, 1, 2]
    assert latency.decode_time(times) == 6
    assert latency.tpot(times) == 1
    assert latency.tpot([2.0, 8.0], 4) == 2  # two pieces that hold four tokens
    assert (latency.e2e(0.5, 9.0), latency.queue_time(0.5, 1.0)) == (8.5, 0.5)


def test_nothing_yet() -> None:
    assert latency.ttft(0.0, []) is latency.decode_time([]) is latency.tpot([]) is latency.tpot([1.0]) is None
    assert latency.e2e(0.0, None) is latency.queue_time(0.0, None) is None
    assert latency.itl([]) == latency.itl_shared([]) == latency.itl_per_step([]) == []
    assert latency.itl([1.0]) == latency.itl_shared([1.0]) == latency.itl_per_step([1.0]) == []


@given(token_times())
def test_three_readings_of_itl_share_their_sum(times: list[float]) -> None:
    tokens, shared, steps = latency.itl(times), latency.itl_shared(times), latency.itl_per_step(times)
    assert len(tokens) == len(shared) == max(0, len(times) - 1)
    assert len(steps) == max(0, len(set(times)) - 1)
    assert [gap for gap in tokens if gap] == steps
    took = latency.decode_time(times) or 0.0
    assert sum(tokens) == sum(steps) == took == pytest.approx(sum(shared))
    assert max(shared, default=0.0) <= max(tokens, default=0.0) == max(steps, default=0.0)


@given(token_times(at_once=False))
def test_they_agree_where_tokens_come_one_by_one(times: list[float]) -> None:
    assert latency.itl(times) == latency.itl_shared(times) == latency.itl_per_step(times)


@given(token_times())
def test_tpot_is_the_mean_of_a_requests_itls(times: list[float]) -> None:
    if len(times) < 2:
        assert latency.tpot(times) is None
    else:
        assert latency.tpot(times) == pytest.approx(statistics.mean(latency.itl(times)))
        assert latency.tpot(times) == pytest.approx(statistics.mean(latency.itl_shared(times)))


@given(token_times())
def test_shared_gaps_can_be_found_as_tokens_come(times: list[float]) -> None:
    found: list[float] = []
    before = None
    for now in sorted(set(times)):
        found += latency.share_gap(before, now, times.count(now))
        before = now
    assert found == latency.itl_shared(times)


@given(token_times(), WHOLE)
def test_the_clocks_zero_does_not_matter(times: list[float], later: float) -> None:
    moved = [now + later for now in times]
    assert latency.itl(moved) == latency.itl(times) and latency.ttft(later, moved) == latency.ttft(0.0, times)


@given(st.lists(WHOLE, min_size=1), st.floats(0, 100))
def test_a_percentile_is_the_nearest_rank(values: list[float], percent: float) -> None:
    found = latency.percentile(values, percent)
    assert found in values
    slack = 1e-6  # of a rank: a product is rounded
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - slack
    assert sum(value < found for value in values) < max(1, len(values) * percent / 100 + slack)


@given(st.lists(WHOLE, min_size=1), st.floats(0, 100), st.floats(0, 100))
def test_percentiles_rise(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert latency.percentile(values, low) <= latency.percentile(values, high)
    assert latency.percentile(values, 0) == min(values) and latency.percentile(values, 100) == max(values)


@given(st.lists(st.tuples(WHOLE, st.integers(0, 5))), st.sampled_from([0, 1, 50, 95, 99, 100]))
def test_counts_stand_for_repetition(pairs: list[tuple[float, int]], percent: float) -> None:
    repeated = [value for value, count in pairs for _ in range(count)]
    found = latency.percentile([v for v, _ in pairs], percent, [c for _, c in pairs])
    expected = latency.percentile(repeated, percent)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_a_rank_is_not_raised_by_rounding() -> None:
    values = [float(i) for i in range(1, 1001)]
    for percent in (7, 29, 57, 58, 99.9, 0.1, 99):
        assert latency.percentile(values, percent) == round(10 * percent)


def test_spreads() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    values = [float(i) for i in range(1, 101)]
    assert Spread.of(values[::-1]) == Spread(50.5, 95.0, 99.0)
