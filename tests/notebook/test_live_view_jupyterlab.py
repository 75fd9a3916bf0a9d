"""The live picture and the sliders in a real JupyterLab, in a real browser.

One notebook on one kernel, whose cells the tests run as they need them; each test leaves the engine idle.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit import Engine, EngineConfig, SamplingParams
from labkit.models.chat import as_chat
from labkit.views import style
from tests.notebook.in_jupyterlab import CELLS, Notebook, jupyterlab
from tests.visiting import HOSTILE, PATIENCE
from tests.visiting_fixtures import browser  # noqa: F401

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
pytest.importorskip("anywidget", reason="anywidget is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook is."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[str]:
    with jupyterlab(tmp_path_factory.mktemp("jupyter"), folder) as address:
        yield address


@pytest.fixture(scope="module")
def opened(browser: Any, address: str) -> Iterator[Notebook]:  # noqa: F811
    me = Notebook(browser, address)
    me.run("lab")
    me.until("lab?.state.meta")
    yield me
    me.context.close()
    assert me.problems == []


@pytest.fixture
def me(opened: Notebook) -> Iterator[Notebook]:
    """The notebook, and an engine that nobody has paused."""
    yield opened
    opened.page.keyboard.press("Escape")


def test_inject_run_and_read_the_answer(me: Notebook) -> None:
    assert me.page.inner_text(".lkw .lk-facts").startswith("tiny-random · float32 on ")
    blank = me.colors("pages") | me.colors("timeline")
    assert not blank & set(style.PALETTE)
    me.inject("Why is the sky blue?", 24)
    me.card("0").wait_for()
    me.page.wait_for_selector('.lkw .lk-card[data-request="0"][data-status="length"]')
    engine = Engine(EngineConfig(model="tiny-random", num_blocks=48))
    engine.add_request(as_chat(engine.model.tokenizer, "Why is the sky blue?"), SamplingParams(max_tokens=24))
    while engine.has_unfinished:
        engine.step()
    assert me.card("0").locator(".lk-text").text_content() == engine.outputs["0"].text
    me.idle()
    assert me.look("lab.state.step") == 23
    assert style.color_of("0").upper() in me.colors("timeline")
    assert len(me.colors("meters")) > 2


def test_pause_step_and_run(me: Notebook) -> None:
    me.page.click(".lkw .lk-pause")
    me.until("lab.live.paused")
    before = me.look("lab.state.step")
    me.inject("One", 6)
    me.inject("Two", 6)
    me.until("lab.state.plan?.rows.length === 2")
    assert me.look("lab.state.step") == before
    assert "Will compute" in me.page.inner_text(".lkw .lk-step-lead")
    for step in (1, 2, 3):
        me.page.click(".lkw .lk-step")
        me.until("lab.state.step === it", before + step)
    me.until("lab.state.drawn === lab.state.step")
    assert {style.color_of("1").upper(), style.color_of("2").upper()} <= me.colors("pages")
    assert me.page.inner_text(".lkw .lk-pause") == "Run"
    me.page.click(".lkw .lk-pause")
    me.idle()
    assert me.look("lab.state.step") == before + 6
    assert me.page.inner_text(".lkw .lk-pause") == "Pause"


def test_two_steps_a_second(me: Notebook) -> None:
    me.page.select_option(".lkw .lk-speed", "2")
    begin = time.monotonic()
    me.inject("Slowly", 4)
    me.idle()
    assert time.monotonic() - begin >= 1.5
    me.page.select_option(".lkw .lk-speed", "")
    me.until("lab.live.speed === null")


@pytest.mark.parametrize(
    ("prompt", "most", "words"),
    [("  ", 8, "The prompt is empty"), ("Why?", 0, "at least 1, not 0"), ("a " * 900, 8, "tokens, but max")],
)
def test_what_cannot_be_is_said_in_a_sentence(me: Notebook, prompt: str, most: int, words: str) -> None:
    cards = me.page.locator(".lkw .lk-card").count()
    me.inject(prompt, most)
    assert words in me.page.inner_text('.lkw [role="alert"].lkw-message')
    assert me.page.locator(".lkw .lk-card").count() == cards
    me.page.click(".lkw .lk-step")  # the next action, of any kind, removes the sentence
    me.until("!document.querySelector('.lkw-message').textContent")
    me.page.click(".lkw .lk-pause")
    me.idle()


def test_what_is_typed_stays_text(me: Notebook) -> None:
    me.inject(HOSTILE, 3)
    me.idle()
    assert me.page.locator(".lkw .lk-prompt").first.text_content() == HOSTILE
    assert me.page.locator("img[src=x], .lkw b").count() == 0
    assert me.look("window.hacked") is None


def test_the_keys_of_the_notebook_are_not_meant(me: Notebook) -> None:
    me.page.fill(".lkw [name=prompt]", "")
    me.page.click(".lkw [name=prompt]")
    me.page.keyboard.type("add bbd")  # would add and delete cells
    assert me.page.input_value(".lkw [name=prompt]") == "add bbd"
    assert me.page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS)


def test_keys_for_the_pictures(me: Notebook) -> None:
    me.page.click('.lkw canvas[data-picture="timeline"]', position={"x": 60, "y": 8})
    me.until("lab.state.selected.step >= 0")
    step = me.look("lab.state.selected.step")
    me.page.keyboard.press("ArrowRight")
    me.until("lab.state.past?.step === it", step + 1)
    assert f"Step {step + 1}" in me.page.inner_text(".lkw .lk-step-title")
    me.page.keyboard.press("Escape")
    me.until("!lab.state.past && lab.state.selected.step === undefined")
    me.page.keyboard.press(" ")
    me.until("lab.live.paused")
    me.page.keyboard.press(" ")
    me.until("!lab.live.paused")


def test_one_question_at_a_time_and_silence_when_idle(me: Notebook) -> None:
    me.look(
        """(() => {
          window.most = 0;
          const watch = () => { window.most = Math.max(window.most, lab.log.sent - lab.log.answered); };
          window.watching = setInterval(watch, 1);
        })()"""
    )
    me.inject("Ask", 12)
    me.idle()
    assert me.look("clearInterval(window.watching) ?? window.most") == 1
    me.page.mouse.move(640, 20)  # away from the picture
    me.until("performance.now() > (window.later ??= performance.now() + 3500)")  # it may look on for a while
    before = me.look("lab.log")
    me.page.wait_for_timeout(800)
    assert me.look("lab.log") == before and before["sent"] == before["answered"]


def test_steps_of_another_cell_are_shown(me: Notebook) -> None:
    before = me.look("lab.state.step")
    me.run("steps")
    me.page.hover(".lkw .lk-summary")  # somebody comes by
    me.until("lab.state.step === it", before + 8)
    assert me.card("cell").locator(".lk-prompt").text_content() == "from a cell"
    assert me.card("cell").get_attribute("data-status") == "length"


def test_a_busy_kernel_answers_later(me: Notebook, folder: Path) -> None:
    before = me.look("lab.state.step")
    me.begin("slow")
    me.type("Later", 3)
    me.page.wait_for_selector(".lkw .lkw-busy:visible")
    assert me.look("lab.log.sent - lab.log.answered") == 1 and me.look("lab.state.step") == before
    (folder / "go").touch()
    me.until("lab.state.step === it", before + 3)
    me.idle()
    assert not me.page.is_visible(".lkw .lkw-busy")


def test_dark_and_light(me: Notebook) -> None:
    light = me.colors("timeline")
    me.command("apputils:change-theme", theme="JupyterLab Dark")
    me.page.wait_for_selector(".lkw.dark")
    me.until("document.querySelector('.lkw canvas[data-swatch]').width > 0")
    me.page.wait_for_timeout(200)
    dark = me.colors("timeline")
    assert style.color_of("0").upper() in light - dark
    me.command("apputils:change-theme", theme="JupyterLab Light")
    me.page.wait_for_selector(".lkw:not(.dark)")
    me.page.wait_for_timeout(200)
    assert me.colors("timeline") == light


def test_what_if(me: Notebook) -> None:
    me.run("what if")
    cell = me.cell("what if")
    title = cell.locator(".gtitle")
    title.wait_for()
    assert title.text_content() == "32 tokens in pages of 16"
    handle = cell.locator(".noUi-handle")
    handle.focus()
    me.page.keyboard.press("ArrowRight")
    _reads(me, title, "48 tokens in pages of 16")
    cell.locator("select").select_option("8")
    _reads(me, title, "48 tokens in pages of 8")
    start, track = handle.bounding_box(), cell.locator(".noUi-base").bounding_box()
    me.page.mouse.move(start["x"] + 5, start["y"] + 5)
    me.page.mouse.down()
    for share in (0.6, 0.4, 0.2, 0.0):  # no call on the way
        me.page.mouse.move(track["x"] + share * track["width"], start["y"] + 5)
    me.page.mouse.up()
    _reads(me, title, "16 tokens in pages of 8")
    me.run("calls")
    assert "[(32, 16), (48, 16), (48, 8), (16, 8)]" in me.cell("calls").inner_text()
    assert cell.locator(".js-plotly-plot").count() == 1


def _reads(me: Notebook, title: Any, words: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while title.all_text_contents() != [words]:
        assert time.monotonic() < deadline, title.all_text_contents()
        me.page.wait_for_timeout(50)


def test_reload(me: Notebook) -> None:
    before = me.look("[lab.state.step, [...lab.state.lanes.keys()]]")
    texts = me.page.locator(".lkw .lk-text").all_text_contents()
    me.command("docmanager:save")
    me.open()
    me.until("lab?.state.meta")
    me.until("lab.state.step === it", before[0])
    assert me.look("[lab.state.step, [...lab.state.lanes.keys()]]") == before
    assert me.page.locator(".lkw .lk-text").all_text_contents() == texts
    me.inject("After it", 3)
    me.until("lab.state.step === it", before[0] + 3)
    me.idle()


def test_the_saved_notebook_is_small_and_holds_no_state(me: Notebook, address: str) -> None:
    me.command("docmanager:save")
    with urllib.request.urlopen(f"{address}/api/contents/widgets.ipynb") as answer:
        saved = json.load(answer)["content"]
    assert "widgets" not in saved["metadata"]
    (output,) = saved["cells"][0]["outputs"]
    assert output["data"]["text/plain"].startswith("No steps yet")
    assert len(json.dumps(saved)) < 60_000


def test_what_colab_gets_draws(me: Notebook) -> None:
    me.look("delete window.Plotly")  # which JupyterLab's own has left there
    me.run("colab")
    title = me.cell("colab").locator(".gtitle")
    _reads(me, title, "32 tokens in pages of 16")
    me.run("again")
    _reads(me, title, "64 tokens in pages of 16")
    assert len(me.fetched) == 1  # the second picture finds plotly there
