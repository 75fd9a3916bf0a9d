"""Windows onto a trace: plotly figures here, the same facts as text in `labkit.views.text`.

Each of the three takes a `labkit.trace.Trace` and needs neither engine nor model. Plotly is imported when
the first figure is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import labkit.views.text as text
from labkit.trace.trace import Trace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["batch_timeline", "block_heatmap", "text", "throughput"]


def block_heatmap(trace: Trace, step: int | None = None) -> Figure:
    """The pool's blocks during a step (None: the latest): who owns each, and how full it is.

    Raises:
        ValueError: if the trace does not hold that step.
    """
    from labkit.views import heatmap

    return heatmap.block_heatmap(trace, step)


def batch_timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> Figure:
    """What each request did in each step, from step `first` to step `last` (None: all that the trace holds).

    Raises:
        ValueError: if the trace holds no step within these limits.
    """
    from labkit.views import figures

    return figures.batch_timeline(trace, first=first, last=last)


def throughput(trace: Trace, *, window: float | None = None) -> Figure:
    """Tokens per second (per step, if the trace has no clock), KV usage, and requests running and waiting.

    Rates are means over the last `window` seconds of work, or steps if there is no clock (None: a fortieth
    of the run), and over one step at least.

    Raises:
        ValueError: if `window` is not positive.
    """
    from labkit.views import figures

    return figures.throughput(trace, window=window)
