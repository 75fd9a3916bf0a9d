"""The race tab in a real browser: choose, run, watch, compare; and two people at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import pytest

from labkit.models.load import LoadedModel
from labkit.page.race.tab import build_race_tab
from labkit.page.race.workloads import COURSES, SETTINGS
from labkit.trace.trace import Trace
from tests.page.race.slow_race import SlowRace
from tests.tabs import Looker, browser, served  # noqa: F401

KEPT: dict[str, Trace] = {}


@pytest.fixture(scope="module")
def address(model: LoadedModel) -> Iterator[str]:
    with served(lambda: build_race_tab(model, keep=KEPT.__setitem__)) as address:
        yield address


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Looker]]:  # noqa: F811
    people: list[Looker] = []

    def arrive(**options: Any) -> Looker:
        people.append(Looker(browser, address, "race", **options))
        people[-1].until("it.status() && it.shown() === it.status().race")  # the last race, if there was one
        return people[-1]

    yield arrive
    for person in people:
        person.context.close()
    assert [problem for person in people for problem in person.problems] == []


PAINTED = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height - 30);
  let some = false, grey = true;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] < 64) continue; // too faint to have a colour
    const colour = data.slice(i, i + 3);
    some = true;
    if (Math.max(...colour) - Math.min(...colour) > 40) grey = false;
  }
  return { some, grey };
}"""


def run_race(me: Looker) -> None:
    before = me.look("it.shown()")
    me.page.click("#lkr-start")
    me.until("it.shown() > arg && !it.status().running", before)


def test_choose_race_and_compare(visit: Callable[..., Looker]) -> None:
    me = visit()
    assert me.page.is_visible(".lkr-empty") == (not me.look("it.shown()"))  # a second try finds one
    run_race(me)
    assert me.page.is_hidden(".lkr-empty") and me.page.is_hidden(".lkr-running")
    assert me.page.inner_text(".lkr-check") == "✓ All three gave the same 169 tokens."
    names = me.page.locator(".lkr-track h3").all_inner_texts()
    assert names == me.page.locator(".lkr-card h3").all_inner_texts() == ["naive", "static", "continuous"]
    traces = [KEPT[f"Race {me.look('it.shown()')}, Uneven lengths: {name}"] for name in names]
    steps = [me.page.locator(".lkr-card").nth(i).locator("dd").nth(2).inner_text() for i in range(3)]
    assert steps[:2] == [str(len(trace)) for trace in traces[:2]]
    assert steps[2].split() == [str(len(traces[2])), "best"]
    me.page.select_option(".lkr-speed", "6")
    me.until("it.now() === it.length()")  # it plays by itself, once
    ends = me.page.locator(".lkr-track .lkr-numbers").all_inner_texts()
    assert all(text.startswith("done after ") and text.endswith("s, 169 tokens") for text in ends)


def test_nothing_plays_by_itself_for_those_who_want_no_motion(visit: Callable[..., Looker]) -> None:
    me = visit(reduced_motion="reduce")
    if not me.look("it.shown()"):
        run_race(me)
    me.until("it.shown() && it.now() === it.length()")
    assert me.page.inner_text(".lkr-play") == "Play again"


def test_the_verdict_stands_above_the_pictures(visit: Callable[..., Looker]) -> None:
    me = visit()
    run_race(me)
    said = me.page.inner_text(".lkr-verdict p >> nth=0")
    assert said.startswith("Static batching took 1.5 times as many steps as continuous batching: 62 rather")
    assert " Why: In static batches, " in said
    tops = [me.page.locator(name).first.bounding_box()["y"] for name in (".lkr-verdict", ".lkr-track")]
    assert tops == sorted(tops)


def test_one_clock_for_all(visit: Callable[..., Looker]) -> None:
    me = visit()
    if not me.look("it.shown()"):
        run_race(me)
    me.until("it.shown()")
    assert me.page.input_value(".lkr-unit") == "steps"
    me.until("it.length() === 169")  # the steps of naive
    me.page.evaluate("document.querySelector('.lkr-play').getAttribute('aria-pressed') === 'true' "
                     "&& document.querySelector('.lkr-play').click()")  # fmt: skip
    me.page.locator(".lkr-scrub").evaluate("(e) => { e.value = 250; e.dispatchEvent(new Event('input')); }")
    me.until("Math.abs(it.now() - 42.25) < 1e-6")
    trace = me.look("it.tracks()[0].data.steps.sampled.slice(0, 42)")
    said = "document.querySelectorAll('.lkr-track .lkr-numbers')[arg[0]].innerText.startsWith(arg[1])"
    me.until(said, [0, f"{sum(trace)} of 169 tokens; 1 running, "])  # the page writes a few times a second
    me.until(said, [2, "done after 42 steps, 169 tokens"])
    box = me.page.locator(".lkr-track canvas").first.bounding_box()
    me.page.mouse.click(box["x"] + box["width"] - 7, box["y"] + 20)
    me.until("it.now() > 168")
    assert me.page.inner_text(".lkr-where").startswith("step 16")


def test_a_workload_brings_its_settings_and_what_to_look_for(visit: Callable[..., Looker]) -> None:
    me = visit()
    me.page.click(f"text={COURSES['pool'].title}")
    me.until("document.querySelector('#lkr-look p').textContent.startsWith(arg)", COURSES["pool"].look[:30])
    me.until("document.querySelectorAll('#lkr-settings input:checked').length === 2")
    run_race(me)
    names = me.page.locator(".lkr-track h3").all_inner_texts()
    assert names == sorted(COURSES["pool"].settings, key=list(SETTINGS).index)
    assert me.page.inner_text(".lkr-check").startswith("✓ Both gave the same ")


def test_drafts_have_a_legend_where_somebody_drafts(visit: Callable[..., Looker]) -> None:
    me = visit()
    run_race(me)
    assert me.page.is_hidden(".lkr-drafts")
    me.page.click(f"text={COURSES['copy'].title}")
    me.until("document.querySelectorAll('#lkr-settings input:checked').length === 2")
    run_race(me)
    assert me.page.is_visible(".lkr-drafts")
    assert me.page.locator(".lkr-track h3").all_inner_texts() == list(COURSES["copy"].settings)
    assert me.page.inner_text(".lkr-check") == "✓ Both gave the same 128 tokens."
    me.until(
        "((canvas) => canvas.getContext('2d').getImageData(4, canvas.height / 2, 1, 1).data[3] === 255)"
        "(document.querySelector('.lkr-drafts canvas'))"
    )


def test_too_many_settings_are_refused_in_words(visit: Callable[..., Looker]) -> None:
    me = visit()
    me.page.locator("#lkr-settings input").last.check()
    me.page.click("#lkr-start")
    me.until("document.querySelector('#lkr-refused p').textContent.startsWith('Choose two or three')")
    assert not me.look("it.status().running")


def test_two_people_and_one_race(visit: Callable[..., Looker], monkeypatch: pytest.MonkeyPatch) -> None:
    me, other = visit(), visit()
    slow = SlowRace(monkeypatch)
    me.page.click("#lkr-start")
    me.page.wait_for_selector(".lkr-stop:visible")
    me.until("document.querySelector('.lkr-progress').value === 0.4")
    words = me.page.inner_text(".lkr-words")
    assert words.startswith("Uneven lengths: static (2 of 3), step 17, 5 of 12 requests answered, about ")
    assert words.endswith(" s left")
    other.until("it.status().running")
    other.until("!document.querySelector('.lkr-running').hidden")
    assert other.page.inner_text(".lkr-words").startswith("Somebody's race is being run. Uneven")
    assert other.page.is_hidden(".lkr-stop")
    for person in (me, other):  # the recorded race stands there, greyed, until this one has steps
        person.until("document.querySelectorAll('.lkr-live .lkr-track').length === 3")
        figures = person.page.locator(".lkr-live .lkr-numbers").all_inner_texts()
        assert figures == [f"its turn comes; recorded: {steps} steps" for steps in (169, 62, 42)]
        drawn = person.page.locator(".lkr-live canvas").first.evaluate(PAINTED)
        assert drawn["some"] and drawn["grey"], "drawn, and in no request's colour"
    other.page.click("#lkr-start")
    other.until("document.querySelector('#lkr-refused p').textContent.startsWith('A race is being run: ')")
    assert me.look("it.status().running")
    me.page.click(".lkr-stop")
    me.until("!document.querySelector('.lkr-failure').hidden")
    assert me.page.inner_text(".lkr-failure") == "The race was stopped in static, after 17 steps."
    me.until("!document.querySelector('.lkr-live-tracks').children.length")
    other.until("!it.status().running")
    assert other.page.is_hidden(".lkr-failure")
    assert not slow.go.is_set()


def test_figures_that_are_open_are_drawn_when_a_race_is_over(visit: Callable[..., Looker]) -> None:
    me = visit()
    me.page.click("text=Figures to zoom into")
    if not me.look("it.shown()"):
        me.page.wait_for_selector("#lkr-none:has-text('No race yet')")
        assert me.page.locator("#lkr-figures .plot-container:visible").count() == 0, "no empty frames"
    run_race(me)
    me.until("document.querySelectorAll('#lkr-figures .js-plotly-plot').length === 2")
    me.until("!document.querySelector('#lkr-none p').textContent")


def test_figures_to_zoom_into(visit: Callable[..., Looker]) -> None:
    me = visit()
    if not me.look("it.shown()"):
        run_race(me)
    me.page.click("text=Figures to zoom into")  # which draws them
    me.page.wait_for_selector("#lkr-figures .js-plotly-plot >> nth=1")
    me.until("document.querySelectorAll('#lkr-figures .js-plotly-plot').length === 2")


@pytest.mark.parametrize("width", [400, 1920])
def test_it_fits_any_width(visit: Callable[..., Looker], width: int) -> None:
    me = visit(viewport={"width": width, "height": 900}, color_scheme="dark")
    if not me.look("it.shown()"):
        run_race(me)
    me.until("it.shown()")
    assert me.look("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("junk", [None, 5, "text", [], {}, {"owner": 5, "race": "x"}, {"race": 10**9}])
def test_nonsense_is_answered(model: LoadedModel, junk: Any) -> None:
    with gr.Blocks():
        view = build_race_tab(model, keep=KEPT.__setitem__)
    assert json.loads(view.status(junk))["mine"] is False
    assert json.loads(view.stop(junk)) is False
    assert json.loads(view.race(junk)) is None
