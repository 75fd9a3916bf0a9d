"""The throughput figure counts per step, or per second where the trace has a clock."""

from __future__ import annotations

import pytest

from labkit import views
from labkit.views import text
from tests.views.reading import named
from tests.views.stories import story, with_times


def test_throughput_without_a_clock_counts_per_step() -> None:
    figure = views.throughput(story())
    assert list(named(figure, "computed").y) == [6, 2, 1, 3]
    assert list(named(figure, "generated").y) == [1, 1, 1, 1]
    assert list(named(figure, "computed").x) == [3, 4, 5, 6]
    assert list(named(figure, "KV usage").y) == [0.25, 0.375, 0, 0]
    assert list(named(figure, "running").y) == [1, 2, 1, 1]
    assert list(named(figure, "waiting").y) == [1, 0, 1, 0]
    assert figure.layout.title.text.startswith("1 generated tokens per step, 3 computed")
    assert figure.layout.yaxis.title.text == "tokens / step"


def test_throughput_with_a_clock_divides_by_seconds_of_work() -> None:
    trace = with_times(story(), [(0.5, 0.5), (0.75, 0.25), (9, 0.25), (10, 1.0)])
    figure = views.throughput(trace, window=0.75)
    computed = named(figure, "computed")
    assert list(computed.y) == [12, pytest.approx(8 / 0.75), None, 3 / 0.5, 3]
    assert list(computed.x) == [0.5, 0.75, None, 9, 10]  # a gap where the engine rested
    assert "2 generated tokens per second, 6 computed" in text.throughput(trace, window=0.75)
    assert list(named(figure, "preempted").x) == [9]
