"""A prediction counts what a step launches, and adds up what it assumes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from labkit.analysis.devices import GPUS
from labkit.benchmark.gpu.predict import Prediction, PredictionReport, costs_of, predict


@pytest.fixture(scope="module")
def report() -> PredictionReport:
    return predict("T4", ["tiny"], [1, 4])


def row_of(report: PredictionReport, seats: int, graphs: bool) -> Prediction:
    (row,) = (row for row in report.rows if row.seats == seats and row.graphs is graphs)
    return row


def test_a_graph_takes_launches_off_python_and_none_off_the_gpu(report: PredictionReport) -> None:
    for seats in (1, 4):
        graphs, eager = row_of(report, seats, True), row_of(report, seats, False)
        assert graphs.operators < eager.operators / 2
        assert abs(graphs.kernels - eager.kernels) < 10  # slots and positions are computed within the graph
        assert graphs.seconds < eager.seconds
        assert eager.bound == "Python"


def test_what_passes_through_kernels_is_more_than_the_floor_counts(report: PredictionReport) -> None:
    gpu = GPUS["T4"]
    for row in report.rows:
        assert row.traffic > row.work.bytes > 0
        assert row.floor == row.work.seconds(gpu.bandwidth, gpu.flops)
        assert row.seconds > row.floor + costs_of(gpu).step
    one, four = row_of(report, 1, True), row_of(report, 4, True)
    assert one.work.bytes < four.work.bytes < 4 * one.work.bytes  # weights are read once


def test_the_table_says_what_it_assumes_and_what_an_engine_takes(report: PredictionReport) -> None:
    text = str(report)
    assert "Predicted, not measured" in text and "10 us of CPU to launch an operator" in text
    assert text.count("\n| tiny |") == 4
    (memory,) = report.memory
    assert f"a default engine {memory.num_blocks:,} blocks" in text and memory.weights > 0
    assert row_of(report, 4, True).name == "step tiny 4 graphs"
    json.dumps(report.to_json())


def test_a_gpu_without_a_data_sheet_is_refused_and_a_newer_one_is_assumed_to_be_faster() -> None:
    with pytest.raises(ValueError, match="no GPU 'V100'; there is T4, L4, A100, H100"):
        predict("V100")
    assert costs_of(GPUS["H100"]).operator < costs_of(GPUS["T4"]).operator
    assert costs_of(dataclasses.replace(GPUS["T4"], name="another")) == costs_of(GPUS["H100"])
