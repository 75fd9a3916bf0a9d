"""A picture is a figure with its text twin; this file pairs the two.

A front end that can draw plotly shows the figure. Everything else shows the text: a plain terminal, the web
page of a repository, a screen reader. Both stand in the same output of a notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit import views
from labkit.trace.trace import Trace
from labkit.views import text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from labkit.views.facts.token_timeline import Clock

_MIMETYPE = "application/vnd.plotly.v1+json"


class Picture:
    """A picture holds a figure and the same facts as text.

    Args:
        figure: the plotly figure.
        twin: the text that a plain terminal shows.
    """

    def __init__(self, figure: Figure, twin: str) -> None:
        self.figure, self.twin = figure, twin

    def __repr__(self) -> str:
        return self.twin

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.twin}
        if in_colab():  # it draws plotly from HTML alone
            bundle["text/html"] = self.figure.to_html(include_plotlyjs="cdn", full_html=False)
        else:
            bundle[_MIMETYPE] = self.figure.to_plotly_json() | {"config": {"displaylogo": False}}
        return bundle


def in_colab() -> bool:
    return "google.colab" in sys.modules


def show(*pictures: Any) -> None:
    """Show pictures in a notebook, or print their text outside of one."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        sys.modules["IPython"].display.display(*pictures)
    else:
        for picture in pictures:
            print(picture)


# -- pictures of a trace --------------------------------------------------------------------------


def timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> Picture:
    """Show what each request did in each step; see `labkit.views.batch_timeline`."""
    limits = {"first": first, "last": last}
    return Picture(views.batch_timeline(trace, **limits), text.batch_timeline(trace, **limits))


def heatmap(trace: Trace, step: int | None = None) -> Picture:
    """Show the blocks of the pool during a step: who owns each, and how full it is."""
    return Picture(views.block_heatmap(trace, step), text.block_heatmap(trace, step))


def throughput(trace: Trace, *, window: float | None = None) -> Picture:
    """Show tokens per step or second, KV usage, and how many requests ran and waited."""
    return Picture(views.throughput(trace, window=window), text.throughput(trace, window=window))


def token_timeline(trace: Trace, clock: Clock = "tokens") -> Picture:
    """Show when each token came out; see `labkit.views.token_timeline`."""
    return Picture(views.token_timeline(trace, clock), text.token_timeline(trace, clock))


# -- pictures of any numbers ----------------------------------------------------------------------


def bars(values: Mapping[str, float], title: str, *, unit: str = "", digits: int = 0) -> Picture:
    """Show one bar for each named value, all in one unit."""
    from labkit.views.figures import charts

    return Picture(charts.bars(values, title, unit, digits), text.bars(values, title, unit, digits))


def lines(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float | None]],
    title: str,
    *,
    x_name: str,
    y_name: str,
    digits: int = 1,
    log: str = "",
) -> Picture:
    """Show one line for each named series over the same x; `log` holds "x", "y" or both for log scales."""
    from labkit.views.figures import charts

    figure = charts.lines(x, ys, title, x_name, y_name, log)
    return Picture(figure, text.lines(x, ys, title, x_name, y_name, digits))
