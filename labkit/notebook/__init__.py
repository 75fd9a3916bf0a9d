"""What the notebooks call: one line of setup, one shared model, and pictures that carry their text twin.

A picture is shown as a plotly figure where the front end can draw one, and as text everywhere else (a plain
terminal, a web page of a repository, a screen reader). Both stand in the same output.
"""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.views import text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from labkit.models.load import LoadedModel
    from labkit.trace.trace import Trace

_MIMETYPE = "application/vnd.plotly.v1+json"


class Picture:
    """A figure and the same facts as text.

    Args:
        figure: for plotly.
        twin: what a plain terminal shows.
    """

    def __init__(self, figure: Figure, twin: str) -> None:
        self.figure, self.twin = figure, twin

    def __repr__(self) -> str:
        return self.twin

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": self.twin}
        if in_colab():  # which draws no plotly but from HTML
            bundle["text/html"] = self.figure.to_html(include_plotlyjs="cdn", full_html=False)
        else:
            bundle[_MIMETYPE] = self.figure.to_plotly_json() | {"config": {"displaylogo": False}}
        return bundle


def in_colab() -> bool:
    return "google.colab" in sys.modules


def show(*pictures: Any) -> None:
    """Show pictures in a notebook, or their text where there is none."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        sys.modules["IPython"].display.display(*pictures)
    else:
        for picture in pictures:
            print(picture)


def timeline(trace: Trace, **options: Any) -> Picture:
    """What each request did in each step; options as for `labkit.views.batch_timeline`."""
    from labkit.views import batch_timeline

    return Picture(batch_timeline(trace, **options), text.batch_timeline(trace, **options))


def heatmap(trace: Trace, step: int | None = None) -> Picture:
    """The pages during a step: whose each is, and how full."""
    from labkit.views import block_heatmap

    return Picture(block_heatmap(trace, step), text.block_heatmap(trace, step))


def throughput(trace: Trace, **options: Any) -> Picture:
    """Tokens per step or second, KV usage, running and waiting."""
    from labkit import views

    return Picture(views.throughput(trace, **options), text.throughput(trace, **options))


def bars(values: Mapping[str, float], title: str, *, unit: str = "", digits: int = 0) -> Picture:
    """One bar for each named value, in one unit."""
    from labkit.views import charts

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
    """One line for each named series over the same x; `log` holds "x", "y" or both for a log scale."""
    from labkit.views import charts

    figure = charts.lines(x, ys, title, x_name, y_name, log)
    return Picture(figure, text.lines(x, ys, title, x_name, y_name, digits))


@functools.cache
def default_model() -> LoadedModel:
    """The model that all engines of a notebook share: SmolLM2-135M, on the best device here."""
    from labkit.models.load import load_model

    return load_model(say=None)


def setup() -> None:
    """Make ready, and say in one line what was found here and how long a notebook takes with it."""
    model = default_model()
    import torch

    where = str(model.device)
    if model.device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    else:
        where += f" ({torch.cuda.get_device_name(model.device)})"
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"labkit: {model.name} in {dtype} on {where}. A notebook takes 1 to 3 minutes to run, 20 to read.")


def source(*things: Any) -> None:
    """Print the engine's own source of functions, classes or properties, and the file that each stands in."""
    root = Path(__file__).parents[2]
    for thing in things:
        thing = inspect.unwrap(getattr(thing, "fget", None) or thing)
        file = Path(inspect.getsourcefile(thing) or "")
        where = file.relative_to(root).as_posix() if file.is_relative_to(root) else thing.__module__
        print(f"# {where}\n{textwrap.dedent(inspect.getsource(thing))}")
