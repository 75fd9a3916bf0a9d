"""Metrics add up."""

from __future__ import annotations

from labkit.outputs import RequestMetrics, RequestOutput


def test_metrics_count_from_arrival() -> None:
    metrics = RequestMetrics(
        10.0, first_scheduled_time=11.0, finish_time=16.0, token_times=[13.0, 14.0, 16.0]
    )
    assert metrics.ttft == 3.0
    assert metrics.itl == [1.0, 2.0]
    assert metrics.tpot == 1.5
    assert metrics.queue_time == 1.0
    assert metrics.e2e_latency == 6.0
    empty = RequestMetrics(1.0)
    assert (empty.ttft, empty.itl, empty.tpot, empty.queue_time, empty.e2e_latency) == (
        None,
        [],
        None,
        None,
        None,
    )


def test_an_output_is_read_as_vllms_is() -> None:
    output = RequestOutput("7", [1], [2, 3], "two", "length", RequestMetrics(0.0), prompt="one")
    assert output.prompt == "one"
    (answer,) = output.outputs
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.index) == ("two", [2, 3], "length", 0)
