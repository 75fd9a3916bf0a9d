"""The race tab: the same requests under two or three settings, then side by side on one clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from labkit import views
from labkit.page.race.queue import BusyError, RaceTrack
from labkit.page.race.workloads import COURSES, SETTINGS, WORDS
from labkit.trace.trace import Trace
from labkit.views.assets import asset, script

if TYPE_CHECKING:
    from labkit.models.load import LoadedModel

_GLUE = """
const ask = async (name, argument) => {
  const late = new Promise((resolve) => setTimeout(resolve, 20000));
  try {
    return JSON.parse(await Promise.race([server[name](argument), late]));
  } catch (error) {
    return null;
  }
};
element.race = labkit.race(element.querySelector(".lkr"), ask);
watch("value", () => element.race.started(props.value || ""));
"""
ASKED = {"uneven": ("static", "continuous"), "pool": COURSES["pool"].settings}  # settings, by workload
_LINE = """
const line = element.querySelector("p");
const say = () => { line.textContent = props.value || ""; };
say();
watch("value", say);
"""


def build_race_tab(
    model: LoadedModel, *, keep: Callable[[str, Trace], object], closed: Callable[[], str] = lambda: ""
) -> gr.HTML:
    """Add the race to the Blocks that is being built. The page must have the variables of `live_feed.css`.

    Only one race runs at a time, on engines of its own. Everybody sees how far it is and what its result is.
    It ends early if the visitor who started it asks for that, or is gone.

    Args:
        model: the model to run; its weights are shared.
        keep: a function that is called with a name and the trace of each setting when a race is over, on the
            race's thread.
        closed: a function that says why no race can be started at present; "" if one can.

    Returns:
        The component that shows it.
    """
    track = RaceTrack(model, keep)

    def status(question: Any) -> str:
        return _answer(track.status(_text(question, "owner")))

    def stop(question: Any) -> str:
        return _answer(track.stop(_text(question, "owner")))

    def lanes(question: Any) -> str:
        return _answer(track.lanes())

    def race(question: Any) -> str:
        number = question.get("race") if isinstance(question, dict) else None
        return _answer(track.packed(number) if isinstance(number, int) else None)

    def start(course: str | None, settings: list[str] | None) -> tuple[str, Any]:
        if why := closed():
            return why, gr.skip()
        try:
            return "", track.start(course or "", settings or [])
        except (ValueError, BusyError) as error:
            return str(error), gr.skip()

    def ask(course: str, settings: Sequence[str]) -> tuple[Any, ...]:
        return course, list(settings), COURSES[course].look, *start(course, list(settings))

    def suggest(course: str) -> tuple[str, list[str]]:
        chosen = COURSES.get(course)
        return (chosen.look, list(chosen.settings)) if chosen else ("", [])

    def draw(name: str | None) -> tuple[Any, ...]:
        latest = track.latest()
        if latest is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        results = {result.setting.name: result for result in latest.results}
        chosen = name if name in results else next(iter(results))
        trace = results[chosen].trace
        which = gr.Dropdown(choices=list(results), value=chosen)
        rates = views.throughput(trace).update_traces(
            line_shape="hv", selector={"type": "scatter"}
        )  # a step is one: it has no slope
        plots = (gr.Plot(figure, visible=True) for figure in (views.batch_timeline(trace), rates))
        return which, *plots, ""

    bare: dict[str, Any] = {"apply_default_css": False, "padding": False}
    line = bare | {"html_template": "<p></p>", "js_on_load": _LINE}
    first = next(iter(COURSES))
    with gr.Column(elem_id="lkr-choices"):
        course = gr.Radio(
            [(chosen.title, name) for name, chosen in COURSES.items()],
            value=first,
            label="Workload",
            elem_id="lkr-course",
        )
        settings = gr.CheckboxGroup(
            list(SETTINGS),
            value=list(COURSES[first].settings),
            label="Two or three settings",
            elem_id="lkr-settings",
        )
    with gr.Row(elem_id="lkr-go", equal_height=False):
        button = gr.Button("Race", variant="primary", elem_id="lkr-start", scale=0, min_width=140)
        with gr.Column(min_width=240):
            look = gr.HTML(COURSES[first].look, elem_id="lkr-look", **line)
            meaning = gr.HTML(_meaning(COURSES[first].settings), elem_id="lkr-meaning", **line)
    refused = gr.HTML(elem_id="lkr-refused", **line | {"html_template": '<p role="alert"></p>'})
    scripts = ("live_feed.js", "replay_data.js", "race_live.js", "race.js")
    view = gr.HTML(
        html_template=f"<style>{asset('replay.css')}</style>{asset('race.html')}",
        js_on_load=script(*scripts) + _GLUE,
        server_functions=[status, stop, lanes, race],
        elem_id="lkr-race",
        **bare,
    )
    with gr.Accordion("Figures to zoom into", open=False, elem_id="lkr-figures") as figures:
        with gr.Row(equal_height=False):
            which = gr.Dropdown([], label="Setting", interactive=True, elem_id="lkr-which", min_width=200)
            again = gr.Button("Draw the latest race", elem_id="lkr-draw", min_width=160)
        none = gr.HTML("No race yet. Its figures are drawn here once it has run.", elem_id="lkr-none", **line)
        timeline = gr.Plot(label="Batch timeline", show_label=False, visible=False)
        rates = gr.Plot(label="Throughput", show_label=False, visible=False)
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_name": False}
    button.click(start, [course, settings], [refused, view], **quick)
    course.input(suggest, course, [look, settings], **quick)
    for name, names in ASKED.items():  # pressed by a button elsewhere on the page
        asked = gr.Button(name, elem_id=f"lkr-ask-{name}", elem_classes="lkr-asked")
        chosen = [course, settings, look, refused, view]
        asked.click(partial(ask, name, names), None, chosen, **quick)
    settings.change(_meaning, settings, meaning, **quick)
    drawn: dict[str, Any] = {
        "inputs": which,
        "outputs": [which, timeline, rates, none],
        "concurrency_limit": 2,
    }
    gr.on([figures.expand, again.click], draw, api_name=False, **drawn)
    which.input(draw, api_name=False, **drawn)
    return view


def _meaning(names: Sequence[str] | None) -> str:
    """What the chosen settings mean, in a line."""
    return " · ".join(f"{name}: {WORDS[name]}" for name in SETTINGS if name in (names or ()))


def _answer(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _text(question: Any, name: str) -> str:
    """A field of what a browser asks, which may be anything."""
    value = question.get(name) if isinstance(question, dict) else None
    return value if isinstance(value, str) else ""
