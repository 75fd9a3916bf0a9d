"""Pictures of a trace. They need neither an engine nor a model, and never torch.

The figures that users call are here, and their text twins under the same names in `labkit.views.text`. Plotly
is imported when the first figure is drawn. In this folder:

- `facts/` holds what a trace shows, worked out once as plain objects;
- `figures/` draws these facts with plotly, `text.py` writes them, and `style.py` is the look that all share;
- `picture.py` pairs each figure with its text twin, for notebooks and exercises;
- `replay_data.py` and `perfetto.py` export a whole trace, to the web page's replay and to a trace viewer, and
  `run_page.py` packs the replay with its trace into one file;
- `live_feed.py`, `live_numbers.py`, `events.py` and `inspect.py` tell a browser what an engine does now;
  `wire.py` names the rows that travel there, and `static/`, which `assets.py` reads, draws them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import labkit.views.text as text
from labkit.trace.trace import Trace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from labkit.views.facts.token_timeline import Clock

__all__ = ["batch_timeline", "block_heatmap", "text", "throughput", "token_timeline"]


def block_heatmap(trace: Trace, step: int | None = None) -> Figure:
    """Draw the pool's blocks during a step (None: the latest): who owns each, and how full it is.

    Raises:
        ValueError: if the trace does not hold that step.
    """
    from labkit.views.figures import block_heatmap as figure

    return figure.block_heatmap(trace, step)


def batch_timeline(trace: Trace, *, first: int | None = None, last: int | None = None) -> Figure:
    """Draw what each request did in each step, from `first` to `last` (None: all that the trace holds).

    Raises:
        ValueError: if the trace holds no step within these limits.
    """
    from labkit.views.figures import batch_timeline as figure

    return figure.batch_timeline(trace, first=first, last=last)


def throughput(trace: Trace, *, window: float | None = None) -> Figure:
    """Draw tokens per second (per step, if the trace has no clock), KV usage, and who runs and waits.

    Rates are means over the last `window` seconds of work, or steps if there is no clock (None: a fortieth
    of the run), and over one step at least.

    Raises:
        ValueError: if `window` is not positive.
    """
    from labkit.views.figures import throughput as figure

    return figure.throughput(trace, window=window)


def token_timeline(trace: Trace, clock: Clock = "tokens") -> Figure:
    """Draw when each token came out, and shade the longest gap between two.

    The clock counts "tokens" computed, "steps", or "seconds" of work.

    Raises:
        ValueError: if there is no such clock.
    """
    from labkit.views.figures import token_timeline as figure

    return figure.token_timeline(trace, clock)
