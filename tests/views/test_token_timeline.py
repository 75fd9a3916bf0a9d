"""The token timeline: when tokens come out on each clock, and the figure and its text twin against that."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from labkit import views
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.sampling_params import SamplingParams
from labkit.trace.trace import Trace
from labkit.views import text
from labkit.views.facts.token_timeline import token_timeline_of


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Two answers run, and a prompt of 20 tokens is computed whole before the third step."""
    config = EngineConfig(
        "tiny-random", device="cpu", num_blocks=40, block_size=4, max_num_seqs=4,
        max_num_batched_tokens=64, enable_chunked_prefill=False,
    )  # fmt: skip
    engine = Engine(config)
    for name in ("a", "b"):
        engine.add_request(
            [300, 301, 302 + ord(name)], SamplingParams(max_tokens=5, ignore_eos=True), request_id=name
        )
    engine.step()
    engine.step()
    engine.add_request(list(range(400, 420)), SamplingParams(max_tokens=2, ignore_eos=True), request_id="<c>")
    while engine.has_unfinished:
        engine.step()
    return engine.trace


def test_moments_count_the_tokens_computed(trace: Trace) -> None:
    timeline = token_timeline_of(trace)
    assert list(timeline.lanes) == ["a", "b", "<c>"]
    assert timeline["a"].tokens == [6, 8, 31, 33, 35]  # 2 prompts of 3, a step of 2, the prompt of 20 and 3
    assert timeline["<c>"].tokens == [28, 31]
    assert (timeline["a"].ttft, timeline["<c>"].ttft) == (6, 20)
    assert timeline["a"].gaps == [2, 23, 2, 2]
    assert timeline["a"].worst_gap == timeline.worst_gap == 23


def test_other_clocks(trace: Trace) -> None:
    by_steps = token_timeline_of(trace, "steps")
    assert by_steps["a"].tokens == [1, 2, 4, 5, 6]
    assert by_steps["<c>"].ttft == 1
    assert token_timeline_of(trace, fixed=10)["a"].tokens == [16, 28, 71, 83, 95]
    seconds = token_timeline_of(trace, "seconds")["a"].tokens
    assert all(0 < before < after for before, after in pairwise(seconds))
    assert seconds[-1] == pytest.approx(sum(record.seconds for record in trace))
    with pytest.raises(ValueError, match="clock must be one of tokens, steps, seconds, not 'hours'"):
        token_timeline_of(trace, "hours")  # type: ignore[arg-type]


def test_padding_costs_too() -> None:
    config = EngineConfig(
        "tiny-random", device="cpu", num_blocks=40, block_size=4, max_num_seqs=2, scheduler="static"
    )
    engine = Engine(config)
    for length in (3, 7):
        engine.add_request(list(range(400, 400 + length)), SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert token_timeline_of(engine.trace)["0"].tokens == [14, 16]


def test_the_figure_draws_each_token_and_shades_the_longest_gap(trace: Trace) -> None:
    figure = views.token_timeline(trace)
    tokens = {one.y[0]: list(one.x) for one in figure.data if one.name == "a token"}
    assert tokens == {"a": [6, 8, 31, 33, 35], "b": [6, 8, 31, 33, 35], "&lt;c&gt;": [28, 31]}
    shaded = [list(one.x) for one in figure.data if one.name == "the longest gap"]
    assert shaded == [[8, 31], [8, 31]]
    assert [one.name for one in figure.data if one.showlegend] == [
        "from arrival to the first token", "the longest gap", "a token",
    ]  # fmt: skip
    assert figure.layout.title.text == "12 tokens came out; the longest gap between two: 23 tokens computed"
    assert isinstance(json.loads(figure.to_json())["data"][0]["x"], list)


def test_the_twin_says_the_same(trace: Trace) -> None:
    lines = text.token_timeline(trace).splitlines()
    assert lines[0] == views.token_timeline(trace).layout.title.text
    assert max(map(len, lines)) <= 100
    assert lines[3].split()[-2:] == ["6", "23"]
    assert lines[5].split()[-2:] == ["20", "3"]
    assert lines[5].count("▪") == 2 and "░" in lines[5]
    assert "seconds of work" in text.token_timeline(trace, "seconds")


def test_nothing_has_run() -> None:
    empty = Trace(Engine(EngineConfig("tiny-random", device="cpu", num_blocks=4)).trace.meta)
    assert text.token_timeline(empty) == "No steps yet: nothing has run."
    assert not views.token_timeline(empty).data
    assert token_timeline_of(empty).worst_gap == 0


def test_a_request_that_waits_has_no_first_token() -> None:
    engine = Engine(EngineConfig("tiny-random", device="cpu", num_blocks=40, block_size=4, max_num_seqs=1))
    for _ in range(2):
        engine.add_request([300, 301], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    timeline = token_timeline_of(engine.trace)
    assert timeline["1"].ttft is None and timeline["1"].gaps == []
    assert text.token_timeline(engine.trace).splitlines()[4].split() == ["1", "-", "0"]
