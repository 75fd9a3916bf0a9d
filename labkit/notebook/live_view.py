"""Notebook controls: the live picture of an engine, and sliders that ask "what if".

The page asks and the kernel answers. The engine works for the picture only inside an answer, and only for a
moment: there is no thread, nothing is pushed, and a kernel that is busy with a cell answers later.
Where no page asks (in a plain terminal, or a notebook that runs without a browser), both are text.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import io
import itertools
import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.engine import Engine
from labkit.notebook.host import Host
from labkit.views import text
from labkit.views.assets import asset, script
from labkit.views.picture import Picture, in_colab

if TYPE_CHECKING:
    import ipywidgets
    from plotly.graph_objects import Figure

KEEP_OPEN = 4  # pictures that hold on to their engine, whose KV cache is large
SCRIPTS = (
    *("live_feed.js", "regions.js", "token_flow.js", "lane_labels.js", "communication.js", "meters.js"),
    *("two_pools.js", "words.js", "side.js", "address.js", "joins.js", "panel.js", "cards.js", "widget.js"),
)
HOW_TO = 'Inject: engine.add_request("The sea is", labkit.SamplingParams(max_tokens=16)), then engine.step()'
GONE = "This picture has let go of its engine, because others were opened since. Run its cell again."

_VIEW = "application/vnd.jupyter.widget-view+json"


def lab(engine: Engine) -> LiveView:
    """The live picture of an engine: inject, run, pause, step, and watch. Make it the last line of a cell.

    It steps the engine only after a button in it was pressed, and stops when nothing is left to do. Steps
    that cells run, before and after, are shown as well.

    Raises:
        TypeError: for anything but an `Engine`.
    """
    if not isinstance(engine, Engine):
        raise TypeError(f"lab takes an Engine, not {type(engine).__name__}")
    return LiveView(engine)


# -- the page's side ------------------------------------------------------------------------------


class _Home:
    """Has things done on the thread that made it, after what that thread is doing.

    JupyterLab may hand messages to another thread while a cell runs, but an engine works on one at a time.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._loop: asyncio.AbstractEventLoop | None = None
        with contextlib.suppress(RuntimeError):  # without a loop, nobody calls from another thread
            self._loop = asyncio.get_running_loop()

    def do(self, act: Callable[[], object]) -> None:
        if self._loop is None or threading.get_ident() == self._thread:
            act()
        else:
            self._loop.call_soon_threadsafe(act)


@functools.cache
def _script() -> str:
    """The widget's JavaScript: files that the page of the lab uses too, and one of its own."""
    parts = {"LIVE": "live_feed.html", "SIDE": "side.html", "WIDGET": "widget.html"}
    markup = "".join(f"const {name} = {json.dumps(asset(file))};\n" for name, file in parts.items())
    return markup + script(*SCRIPTS)


@functools.cache
def _widget_class() -> type | None:
    """The class of the widgets; None if anywidget is not installed."""
    try:
        from anywidget import AnyWidget
    except ImportError:
        return None

    class LabWidget(AnyWidget):
        _esm = _script()
        _css = asset("live_feed.css") + asset("widget.css")

    return LabWidget


def _has_page() -> bool:
    """Whether there may be a page: in a kernel, but not in a terminal. Nobody can know whether one looks."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class _View:
    """Something that a notebook shows as a widget, and any other place as text."""

    _widget: ipywidgets.DOMWidget | None = None

    @property
    def widget(self) -> ipywidgets.DOMWidget | None:
        """The widget, made when it is first shown; None where it cannot be."""
        if self._widget is None and _has_page():
            self._widget = self._make()
        return self._widget

    def _make(self) -> ipywidgets.DOMWidget | None:
        raise NotImplementedError

    def _fallback(self) -> dict[str, Any]:
        return {"text/plain": repr(self)}

    def _ipython_display_(self) -> None:
        if not in_colab() or self.widget is None:
            raise NotImplementedError  # IPython asks for the bundle then
        sys.modules["IPython"].display.display(self.widget)  # Colab shows widgets in this way alone
        self._displayed()

    def _displayed(self) -> None:
        """Show what Colab shows only once the widget is there."""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        if self.widget is None:
            return self._fallback()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return {_VIEW: view, **self._fallback()}


class LiveView(_View):
    """The live picture, as `lab` returns it. As text: the timeline so far, and how to go on."""

    _open: ClassVar[list[LiveView]] = []

    def __init__(self, engine: Engine) -> None:
        self.host: Host | None = Host(engine)
        self._home = _Home()

    def __repr__(self) -> str:
        if self.host is None:
            return GONE
        lines = [text.batch_timeline(self.host.engine.trace), "", HOW_TO]
        if _has_page() and _widget_class() is None:
            lines.append("The live picture needs anywidget: pip install anywidget")
        return "\n".join(lines)

    def _make(self) -> ipywidgets.DOMWidget | None:
        kind = _widget_class()
        if kind is None:
            return None
        widget = kind()
        widget.on_msg(self._receive)
        self._open.append(self)
        while len(self._open) > KEEP_OPEN:
            self._open.pop(0).host = None
        return widget

    def _receive(self, widget: ipywidgets.DOMWidget, message: Any, buffers: object) -> None:
        if isinstance(message, dict) and isinstance(message.get("question"), dict):
            self._home.do(lambda: widget.send({"id": message.get("id"), "answer": self.answer(message)}))

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a message of the page."""
        if self.host is None:
            return {"error": GONE}
        return self.host.answer(str(message.get("name")), message["question"])


# -- what if --------------------------------------------------------------------------------------


def what_if(function: Callable[..., Any], /, **ranges: Sequence[Any]) -> WhatIf:
    """A slider or a list for each argument of a function, and beneath them what it returns.

    They begin with the argument's default, or with the first of the range. The function is called once when
    the cell runs, and again when a slider is let go; it returns a `notebook.Picture` or text. Make it the
    last line of a cell.

    Args:
        function: a function that is called with the arguments by name.
        ranges: for each argument a tuple `(lowest, highest)` or `(lowest, highest, step)` of numbers, or a
            list of choices.

    Raises:
        ValueError: for a range that is neither.
    """
    return WhatIf(function, ranges)


class WhatIf(_View):
    """Sliders and the result beneath them, as `what_if` returns them. As text: the first result."""

    _count = itertools.count()

    def __init__(self, function: Callable[..., Any], ranges: Mapping[str, Sequence[Any]]) -> None:
        self._function, self._ranges = function, ranges
        parameters = inspect.signature(function).parameters
        self._values = {
            name: _first(name, choices, parameters[name].default if name in parameters else None)
            for name, choices in ranges.items()
        }
        self._home = _Home()
        self._due = False
        self._printed, self._result = self._call()

    def _call(self) -> tuple[str, Any]:
        """Call the function; returns what it prints, and what it returns."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            result = self._function(**self._values)
        return printed.getvalue(), result

    def __repr__(self) -> str:
        words = "" if self._result is None else str(self._result)
        return (self._printed + words).rstrip("\n")

    def _fallback(self) -> dict[str, Any]:
        bundle = self._result._repr_mimebundle_() if isinstance(self._result, Picture) else {}
        return bundle | {"text/plain": repr(self)}

    def _make(self) -> ipywidgets.DOMWidget:
        import ipywidgets

        self._controls = {
            name: _control(name, choices, self._values[name]) for name, choices in self._ranges.items()
        }
        for control in self._controls.values():
            control.observe(self._changed, "value")
        self._below = ipywidgets.Output()
        row = ipywidgets.Layout(display="flex", flex_flow="row wrap")
        box = ipywidgets.VBox([ipywidgets.Box(list(self._controls.values()), layout=row), self._below])
        if not in_colab():
            self._displayed()
        return box

    def _changed(self, _: object) -> None:
        if not self._due:  # else one call follows all changes that come while the kernel is busy
            self._due = True
            self._home.do(self._again)

    def _again(self) -> None:
        self._due = False
        values = {name: control.value for name, control in self._controls.items()}
        if values == self._values:
            return
        self._values = values
        try:
            self._printed, self._result = self._call()
        except Exception as error:
            own = error.__traceback__.tb_next.tb_next  # the function's own frames, without these two
            lines = traceback.format_exception(type(error), error, own)
            kind, words = type(error).__name__, str(error)
            self._put([{"output_type": "error", "ename": kind, "evalue": words, "traceback": lines}])
        else:
            self._displayed()

    def _displayed(self) -> None:
        """Put the result beneath the sliders."""
        words, picture, outputs = repr(self), self._result, []
        if isinstance(picture, Picture):
            words = self._printed
            height = picture.figure.layout.height or 450
            self._below.layout.min_height = f"{height}px"  # keeps the place while the next one is drawn
            outputs = [{"output_type": "display_data", "data": picture._repr_mimebundle_(), "metadata": {}}]
            if in_colab():
                html = _drawn_late(picture.figure, f"labkit-what-if-{next(self._count)}")
                outputs[0]["data"] = {"text/html": html, "text/plain": picture.twin}
        if words:
            outputs.insert(0, {"output_type": "stream", "name": "stdout", "text": words})
        self._put(outputs)

    def _put(self, outputs: list[dict[str, Any]]) -> None:
        if not in_colab():
            self._below.outputs = tuple(outputs)  # all at once: nothing flickers
            return
        display = sys.modules["IPython"].display
        with self._below:
            display.clear_output(wait=True)
            for output in outputs:
                words = output.get("text") or "".join(output.get("traceback", ()))
                display.display(output.get("data") or {"text/plain": words}, raw=True)


def _first(name: str, choices: Sequence[Any], default: Any) -> Any:
    """The value to begin with. Raises ValueError for a range that is neither."""
    if isinstance(choices, list) and choices:
        return default if default in choices else choices[0]
    if not isinstance(choices, tuple) or len(choices) not in (2, 3) or not all(map(_is_number, choices)):
        raise ValueError(
            f"{name} must be a tuple of numbers, (lowest, highest) or (lowest, highest, step), or a list of "
            f"choices, not {choices!r}"
        )
    low, high, *step = choices
    if low >= high or any(s <= 0 for s in step):
        raise ValueError(f"{name} must go up from its lowest to its highest value, not {choices!r}")
    return default if _is_number(default) and low <= default <= high else low


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _control(name: str, choices: Sequence[Any], value: Any) -> ipywidgets.DOMWidget:
    """A slider, or a list to choose from."""
    import ipywidgets

    looks = {"description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if isinstance(choices, list):
        return ipywidgets.Dropdown(options=[(str(c), c) for c in choices], value=value, **looks)
    low, high, *step = choices
    whole = all(isinstance(number, int) for number in (*choices, value))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    pitch = step[0] if step else 1 if whole else (high - low) / 100
    # One call for each slider that is let go, and none on the way there.
    return kind(value=value, min=low, max=high, step=pitch, continuous_update=False, **looks)


def _drawn_late(figure: Figure, place: str) -> str:
    """A figure as HTML that waits for plotly, because scripts in Colab's output widgets do not wait."""
    from plotly.offline import get_plotlyjs_version

    address = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
    drawing = figure.to_json().replace("<", "\\u003c")  # nothing in it ends the script
    return f"""<div id="{place}"></div>
<script>(() => {{
  const figure = {drawing};
  const looks = {{ displaylogo: false, responsive: true }};
  const draw = () => Plotly.newPlot("{place}", figure.data, figure.layout, looks);
  if (window.Plotly) return draw();
  const script = document.createElement("script");
  script.src = "{address}";
  script.onload = draw;
  document.head.append(script);
}})();</script>"""
