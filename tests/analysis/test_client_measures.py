"""What a client saw of a load, counted by hand."""

from __future__ import annotations

import statistics

import pytest

from labkit.analysis.client_measures import Measure, Slo, summary
from labkit.benchmark.serving.load_report import RateRow
from labkit.trace.latency import Spread


def answered(at: float, *times: float, tokens: int = 0, error: str = "") -> Measure:
    """A request whose pieces came at these times, the last of them with the end."""
    return Measure(
        at, len(times), at, list(times), times[-1], tokens or len(times), True, "x" * len(times), error
    )


def test_a_summary_counts_by_hand() -> None:
    measures = [
        answered(0, 1, 2, 3),  # TTFT 1, gaps of 1
        answered(1, 2, 2.5, 3, 3.5),  # TTFT 1, gaps of a half
        answered(2, 6, 9),  # TTFT 4, a gap of 3
        answered(3, 4, error="no luck"),
    ]
    of = summary(measures, slo=Slo(1, 0.75))
    assert (of.requests, of.errors, of.first_error, of.between) == (4, 1, "no luck", (0, 9))
    assert of.ttft == Spread(1, 4, 4) and of.e2e == Spread(3, 7, 7)
    assert of.itl == Spread(statistics.median([1, 1, 0.5, 0.5, 0.5, 3]), 3, 3)
    assert of.e2e_mean == pytest.approx((3 + 2.5 + 7) / 3)
    assert (of.done, of.tokens) == (3 / 9, 10 / 9)
    assert (of.good, of.attained) == (1 / 9, 1 / 4)  # the second alone, of all four
    assert of.in_flight == (3 + 2.5 + 7 + 1) / 9
    assert "4 requests, 1 errors (no luck)" in str(of) and "TTFT: median 1.000 s" in str(of)


def test_rates_can_count_a_part_of_the_time() -> None:
    measures = [answered(0, 1, 2, 3), answered(1, 2, 2.5, 3, 3.5), answered(2, 6, 9)]
    of = summary(measures, between=(2, 4))
    assert (of.done, of.tokens, of.in_flight) == (2 / 2, (2 + 4) / 2, (1 + 1.5 + 2) / 2)
    assert of.ttft.p99 == 4  # latencies are of all
    assert of.good is None and of.attained is None


def test_a_summary_without_any_answer_has_no_latencies() -> None:
    of = summary([Measure(0, 5, end=1.0, error="x"), Measure(0, 5, end=2.0, error="y")])
    assert (of.errors, of.ttft, of.itl, of.e2e_mean, of.done) == (2, None, None, None, 0)
    assert RateRow(1.0, of).power == 0 and "-" in RateRow(1.0, of).cells()
    str(of)


def test_late_is_what_the_client_is_to_blame_for() -> None:
    one, other = answered(1, 2), answered(2, 3)
    one.sent = 1.25
    assert summary([one, other, Measure(3, 1, end=3, error="never sent")]).late == 0.25
