"""The two plain charts state the same numbers in figure and text, wherever the numbers come from."""

from __future__ import annotations

import json
import math

import numpy as np
import plotly.graph_objects as go
import pytest

from labkit.views import style, text
from labkit.views.figures import charts

HOSTILE = ["<b>bold</b>", "$x^2$", "2024-01-01", "1e5", "line\nbreak", "日本語", "a" * 300]


def plain(figure: go.Figure) -> dict:
    """Return a figure as JSON has it; `NaN`, which is not JSON, is refused."""
    return json.loads(json.dumps(figure.to_plotly_json(), allow_nan=False))


def test_bars_say_each_value_in_its_unit_in_figure_and_text() -> None:
    values = {"paged": 3, "reserved": 12, "none": 0}
    figure, twin = charts.bars(values, "Pages", "pages", 0), text.bars(values, "Pages", "pages", 0)
    (bar,) = plain(figure)["data"]
    assert (bar["y"], bar["x"]) == (["paged", "reserved", "none"], [3, 12, 0])
    assert bar["text"] == ["3 pages", "12 pages", "0 pages"]
    assert twin == (
        "Pages\n\n"
        f"paged     {'█' * 10} 3 pages\n"
        f"reserved  {'█' * 40} 12 pages\n"
        "none       0 pages"
    )  # fmt: skip


def test_bars_round_as_told_and_group_thousands() -> None:
    figure = charts.bars({"a": 12345.678}, "T", "", 1)
    assert plain(figure)["data"][0]["text"] == ["12,345.7"]
    assert text.bars({"a": 12345.678}, "T", "", 1).endswith(" 12,345.7")


@pytest.mark.parametrize("values", [{}, {"a": 0, "b": 0}, {"a": -2, "b": 0}, {"a": math.nan, "b": math.inf}])
def test_bars_of_nothing_below_zero_or_no_numbers_are_drawn_without_a_bar(values: dict[str, float]) -> None:
    plain(charts.bars(values, "T", "s", 1))
    assert "█" not in text.bars(values, "T", "s", 1)


def test_a_bar_below_zero_takes_nothing_from_the_others() -> None:
    assert text.bars({"a": -5, "b": 2}, "T", "", 0).splitlines()[-1] == f"b  {'█' * 40} 2"


def test_lines_say_each_number_and_leave_a_gap_where_there_is_none() -> None:
    x, ys = [1, 2.5, 1_234_567], {"cached": [1.0, 2.0, 3.0], "recomputed": [1.0, None, 9000.25]}
    figure = charts.lines(x, ys, "Work", "tokens", "ms", "")
    first, second = plain(figure)["data"]
    assert first["x"] == second["x"] == x
    assert (first["y"], second["y"]) == ([1.0, 2.0, 3.0], [1.0, None, 9000.25])
    assert first["line"]["dash"] != second["line"]["dash"]  # colour is not all that tells them apart
    assert text.lines(x, ys, "Work", "tokens", "ms", 1) == (
        "Work (ms)\n\n"
        "   tokens  cached  recomputed\n"
        "        1     1.0         1.0\n"
        "      2.5     2.0\n"
        "1,234,567     3.0     9,000.2"
    )


def test_lines_have_a_log_scale_where_told_and_a_legend_only_if_there_are_several() -> None:
    layout = plain(charts.lines([1, 10], {"a": [1, 2]}, "T", "x", "y", "x"))["layout"]
    assert (layout["xaxis"]["type"], layout["yaxis"]["type"], layout["showlegend"]) == (
        "log",
        "linear",
        False,
    )
    layout = plain(charts.lines([1, 10], {"a": [1, 2], "b": [2, 3]}, "T", "x", "y", "xy"))["layout"]
    assert (layout["xaxis"]["type"], layout["yaxis"]["type"], layout["showlegend"]) == ("log", "log", True)


def test_a_log_scale_is_marked_at_its_few_values_or_at_round_ones_written_in_full() -> None:
    def ticks(values: list[float], axis: str = "xaxis") -> list[str]:
        axis = plain(charts.lines(values, {"a": values}, "T", "x", "y", "xy"))["layout"][axis]
        assert axis["tickmode"] == "array"
        assert [float(text.replace(",", "")) for text in axis["ticktext"]] == axis["tickvals"]
        return axis["ticktext"]

    assert ticks([1, 8, 64, 4096]) == ["1", "8", "64", "4,096"]
    assert ticks([1, 8, 64], "yaxis") == ["1", "2", "5", "10", "20", "50", "100", "200", "500"]
    assert ticks([0.5, 0, -1, math.nan]) == ["0.5"]
    assert ticks([]) == []
    assert ticks([0.3, *range(1, 40)]) == [
        "0.1",
        "0.2",
        "0.5",
        "1",
        "2",
        "5",
        "10",
        "20",
        "50",
        "100",
        "200",
        "500",
    ]
    assert ticks([10.0**i for i in range(-2, 6)]) == [
        "0.01", "0.1", "1", "10", "100", "1,000", "10,000", "100,000",
    ]  # fmt: skip


def test_a_bar_without_length_still_says_its_number() -> None:
    (bar,) = plain(charts.bars({"a": 0, "b": 2, "c": math.nan}, "T", "", 0))["data"]
    assert bar["textposition"] == ["outside", "auto", "outside"]
    (bar,) = plain(charts.bars({"a": 1, "b": 2}, "T", "", 0))["data"]
    assert bar["textposition"] == "auto"


def test_a_long_table_keeps_its_ends_and_says_what_it_leaves_out() -> None:
    rows = text.lines(range(201), {"a": [float(i) for i in range(201)]}, "T", "x", "y", 0).splitlines()
    assert rows[0] == "T (y); 40 of 201 rows" and len(rows) == 43
    assert rows[3].split() == ["0", "0"] and rows[-1].split() == ["200", "200"]
    assert len(text.lines(range(40), {"a": [0.0] * 40}, "T", "x", "y", 0).splitlines()) == 43  # none left out


def test_numbers_of_numpy_and_torch_draw_as_pythons_own_do() -> None:
    import torch

    for make in (np.array, torch.tensor):
        x, y = make([1, 2]), make([0.5, math.nan])
        (series,) = plain(charts.lines(x, {"a": y}, "T", "x", "y", ""))["data"]
        assert (series["x"], series["y"]) == ([1, 2], [0.5, None])
        text.lines(x, {"a": y}, "T", "x", "y", 1)
        (bar,) = plain(charts.bars({"a": x[0], "b": y[0]}, "T", "", 1))["data"]
        assert (bar["x"], bar["text"]) == ([1, 0.5], ["1.0", "0.5"])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is_in_one_line(name: str) -> None:
    figure = plain(charts.bars({name: 1}, name, "", 0))
    (shown,) = figure["data"][0]["y"]
    assert "<" not in shown and "$" not in shown and "\n" not in shown
    assert figure["layout"]["yaxis"]["type"] == "category"  # or plotly would read some names as numbers
    assert "<b>" not in figure["layout"]["title"]["text"]
    assert len(text.bars({name: 1}, "T", "", 0).splitlines()) == 3
    table = text.lines([1], {name: [2.0]}, "T", "x", "y", 0).splitlines()
    assert len(table) == 4 and style.width_of(table[2]) == style.width_of(table[3])
