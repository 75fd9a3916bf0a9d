"""What the notebooks call: one line of setup, one shared model, the engine's own source, and pictures."""

from __future__ import annotations

import functools
import inspect
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.notebook import run_first
from labkit.views.picture import Picture, bars, heatmap, lines, show, throughput, timeline, token_timeline

if TYPE_CHECKING:
    from labkit.models.load import LoadedModel

__all__ = [
    "Picture",
    "bars",
    "default_model",
    "heatmap",
    "lines",
    "setup",
    "show",
    "source",
    "throughput",
    "timeline",
    "token_timeline",
]


@functools.cache
def default_model() -> LoadedModel:
    """Load the model that all engines of a notebook share: SmolLM2-135M, on the best device there is."""
    from labkit.models.hub import find
    from labkit.models.load import load_model

    find(
        "smollm2-135m"
    )  # says what it does, with a bar, where the model has to be fetched; else it is silent
    return load_model(say=None)


def setup() -> None:
    """Load the model, and say in one line where it runs and how long a notebook takes."""
    run_first.watch()
    model = default_model()
    import torch

    where = str(model.device)
    if model.device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    else:
        where += f" ({torch.cuda.get_device_name(model.device)})"
    dtype = str(model.dtype).removeprefix("torch.")
    takes = "A notebook runs in 1 to 3 minutes and takes 45 to 60."
    print(f"labkit: {model.name} in {dtype} on {where}. {takes}")


def source(*things: Any) -> None:
    """Print the source of functions, classes or properties of the engine, each under its file's name."""
    root = Path(__file__).parents[2]
    for thing in things:
        thing = inspect.unwrap(getattr(thing, "fget", None) or thing)
        file = Path(inspect.getsourcefile(thing) or "")
        where = file.relative_to(root).as_posix() if file.is_relative_to(root) else thing.__module__
        print(f"# {where}\n{textwrap.dedent(inspect.getsource(thing))}")
