"""What all pictures of a trace have in common: the same facts in figure and text, stable JSON, no markup."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import plotly.io
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import views
from labkit.trace.trace import Trace
from labkit.views import style, text
from tests.views.reading import named, strings, words
from tests.views.stories import HOSTILE, run, story, trace_of, traces, with_times

FIGURES = (views.block_heatmap, views.batch_timeline, views.throughput)
TWINS = (text.block_heatmap, text.batch_timeline, text.throughput)


@settings(max_examples=25, deadline=None)
@given(traces())
def test_text_twins_state_the_numbers_of_the_figures(trace: Trace) -> None:
    for figure, twin in zip(FIGURES, TWINS, strict=True):
        said = twin(trace)
        assert max(map(style.width_of, said.splitlines())) <= text.COLUMNS
        stated = "; ".join(said.split("\n\n")[0].splitlines())
        assert stated == words(figure(trace).layout.title.text)


@pytest.mark.parametrize("clock", [False, True])
def test_a_trace_that_forgot_its_beginning(clock: bool) -> None:
    whole = run([(0, str(i), 9, 9) for i in range(8)], seats=3)
    whole = with_times(whole, [((i + 1) * clock, clock) for i in range(len(whole))])
    short = Trace(whole.meta, whole.records, max_steps=9)
    first = short[1].step  # the step before stands for all that is forgotten
    assert first > 1 and whole.at(first).waiting
    assert views.batch_timeline(short, first=first) == views.batch_timeline(whole, first=first)
    assert text.batch_timeline(short, first=first) == text.batch_timeline(whole, first=first)
    assert views.block_heatmap(short) == views.block_heatmap(whole)
    tails = [named(views.throughput(trace), "running").y[-len(short) :] for trace in (short, whole)]
    assert tails[0] == tails[1]
    assert named(views.throughput(short), "computed").y[:2] == (None, 3)
    rate = sum(record.total_tokens for record in short) / (len(short) - 1)
    assert text.throughput(short).startswith(
        f"{rate:.4g} generated tokens per {'second' if clock else 'step'}, "
    )


def test_steps_that_are_not_there() -> None:
    for module in (views, text):
        with pytest.raises(ValueError, match="step 99 is not in this trace"):
            module.block_heatmap(story(), 99)
        with pytest.raises(ValueError, match="no step from 7 to 9 is in this trace"):
            module.batch_timeline(story(), first=7, last=9)
        with pytest.raises(ValueError, match="window must be positive"):
            module.throughput(story(), window=0)


def test_empty_traces_say_so() -> None:
    for figure, twin in zip(FIGURES, TWINS, strict=True):
        drawn = figure(trace_of())
        assert drawn.layout.annotations[0].text == twin(trace_of())
        assert drawn.layout.height <= 120


def test_equal_traces_give_equal_json_whatever_the_clock_and_the_default_template(tmp_path: Path) -> None:
    trace = run([(i, str(i), 9, 9) for i in range(6)], num_blocks=9)
    before = [figure(trace).to_json() for figure in FIGURES]
    slow = with_times(trace, [(i + 1.5, 0.5) for i in range(len(trace))])
    slow.save(tmp_path / "trace")
    default = plotly.io.templates.default
    try:
        plotly.io.templates.default = "seaborn"
        again = [figure(Trace.load(tmp_path / "trace")).to_json() for figure in FIGURES]
    finally:
        plotly.io.templates.default = default
    assert again[:2] == before[:2]
    assert again[2] != before[2]
    for figure in FIGURES:
        drawn = figure(trace)
        assert plotly.io.from_json(drawn.to_json()) == drawn
        assert "bdata" not in drawn.to_json()  # no packed arrays: lists read the same in every plotly


def test_what_users_typed_is_never_markup() -> None:
    trace = run([(i, name, 5, 9) for i, name in enumerate(HOSTILE)], num_blocks=64, aborts=[(2, HOSTILE[0])])
    for figure in (lambda t: views.block_heatmap(t, 8), views.batch_timeline, views.throughput):
        for string in strings(json.loads(figure(trace).to_json())):
            ours = re.sub(r"</?(b|br|extra)>|<span style=[^<>]*>|</span>", "", string)
            assert not re.search(r"[<>$\n\x07\u202e\ud800]|&(?!amp;|lt;|gt;|#36;)", ours)
    axis = views.batch_timeline(trace).layout.yaxis
    assert list(axis.tickvals) == list(range(len(HOSTILE)))  # places, so no id is taken for a date
    assert [html.unescape(tick) for tick in axis.ticktext][:8] == [
        "<b>bold</b>", "<img sr…lert(1)>", "&lt;", "$x^2$", "%{x}", "2024-01-01", "1e5", "0x10",
    ]  # fmt: skip
    for said in (text.block_heatmap(trace, 8), text.batch_timeline(trace), text.throughput(trace)):
        assert all(char == "\n" or char.isprintable() for char in said)
        assert max(map(style.width_of, said.splitlines())) <= text.COLUMNS


@given(st.text(max_size=40), st.integers(3, 20))
def test_labels_fit_and_keep_both_ends(name: str, width: int) -> None:
    shown = style.label(name, width)
    assert style.width_of(shown) <= width
    assert shown.isprintable() and shown
    if name.isprintable() and 0 < style.width_of(name) <= width:
        assert shown == name
    assert style.color_of(name) in style.PALETTE
