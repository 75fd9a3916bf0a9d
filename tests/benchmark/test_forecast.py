"""The forecast: what it fits, predicts and measures."""

from __future__ import annotations

import json

from labkit.analysis.capacity import (
    Settings,
    replay,
)
from labkit.benchmark.engine import forecast
from labkit.models.load import load_model
from tests.analysis.test_replay import tick


def test_a_forecast_runs_what_it_predicts() -> None:
    """Its seconds are nobody's business here: tiny-random has hardly any."""
    loaded = load_model("tiny-random", device="cpu", say=None)
    cases = forecast.cases_of(loaded.tokenizer, scale=0.1)
    report = forecast.forecast(loaded, cases, repeats=2, replayed=50, progress=False)
    assert [row.fitted for row in report.rows] == [True, True, False, False, False]
    assert all(len(row.all_rates) == 2 and row.rate > 0 and row.predicted_rate > 0 for row in report.rows)
    assert all(0 < row.ttft < 60 and 0 < row.predicted_ttft < 60 for row in report.rows)
    told = json.loads(json.dumps(report.to_json()))
    assert told["clock"]["num_steps"] == report.clock.num_steps > 20
    assert "32 seats, arriving at 70%" in str(report) and "median error of a step" in str(report)
    bars = forecast.figure(report).data
    assert [bar.name for bar in bars] == ["measured", "predicted"] * 2
    assert list(bars[1].y) == [row.predicted_rate for row in report.rows]


def test_a_served_case_is_the_steps_that_were_predicted() -> None:
    """A backlog leaves nothing to time: the engine's steps and the replay's are the same."""
    loaded = load_model("tiny-random", device="cpu", say=None)
    case = forecast.cases_of(loaded.tokenizer, scale=0.2)[2]
    served = forecast.serve(loaded, case)
    sizes = Settings(served.num_blocks, max_num_seqs=case.seats, max_num_batched_tokens=case.budget)
    told = replay(case.demands, tick, sizes, traces=True)
    assert [step.num_tokens for step in served.records] == [step.num_tokens for step in told.traces[0]]
    assert len(served.ttft) == len(case.jobs) and len(served.itl) == told.gap_counts.sum()
