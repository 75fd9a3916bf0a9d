"""The live picture and the sliders in a real JupyterLab, in a real browser.

One notebook on one kernel, whose cells the tests run as they need them; each test leaves the engine idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from visiting import HOSTILE, PATIENCE, free_port
from visiting_fixtures import browser  # noqa: F401

from labkit import Engine, EngineConfig, SamplingParams
from labkit.models.chat import as_chat
from labkit.views import style

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
pytest.importorskip("anywidget", reason="anywidget is not installed")

import nbformat

ROOT = Path(__file__).parents[2]
CELLS = {
    "lab": """
import labkit
from labkit import Engine, EngineConfig, SamplingParams, notebook
from labkit.notebook.live_view import what_if
engine = Engine(EngineConfig(model="tiny-random", num_blocks=48, max_num_seqs=4))
labkit.lab(engine)""",
    "steps": """
engine.add_request("from a cell", SamplingParams(max_tokens=8), request_id="cell")
for _ in range(8):
    record = engine.step()""",
    "slow": """
import pathlib, time
while not pathlib.Path("go").exists():
    time.sleep(0.02)""",
    "what if": """
calls = []
def pages(tokens=32, size=16):
    calls.append((tokens, size))
    return notebook.bars({"pages": -(-tokens // size)}, f"{tokens} tokens in pages of {size}")
what_if(pages, tokens=(16, 64, 16), size=[8, 16])""",
    "calls": "print(calls)",
    "colab": """
import sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
shown = what_if(pages, tokens=(16, 64, 16))
shown""",
    "again": "shown._controls['tokens'].value = 64",
}
FIND = "const lab = document.querySelector('.lkw')?.labkit;"


class Notebook:
    """Somebody who has the notebook open, runs its cells and uses what they show."""

    def __init__(self, browser: Any, address: str) -> None:  # noqa: F811
        self.context = browser.new_context(viewport={"width": 1280, "height": 1250})
        self.page = self.context.new_page()
        self.page.set_default_timeout(3 * PATIENCE * 1000)  # a kernel has to import torch
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.route(lambda url: not url.startswith(address), self._elsewhere)
        self.fetched: list[str] = []
        self.address = f"{address}/doc/tree/widgets.ipynb"
        self.open()

    def _elsewhere(self, route: Any) -> None:
        """The page must do without anything that is not on this machine, but for plotly's own address."""
        if not route.request.url.startswith("https://cdn.plot.ly/"):
            return route.abort()
        import plotly

        self.fetched.append(route.request.url)
        path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        return route.fulfill(path=path, content_type="text/javascript")

    def open(self) -> None:
        self.page.goto(self.address)
        self.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext")
        self.page.evaluate(
            """async () => {
              const { context, sessionContext } = jupyterapp.shell.currentWidget;
              await Promise.all([context.ready, sessionContext.ready]);
            }"""
        )

    def run(self, name: str) -> None:
        """Run a cell and wait until it is done."""
        self.begin(name)
        self.page.evaluate("() => window.ran")

    def begin(self, name: str) -> None:
        self.page.evaluate(
            """(place) => {
              const notebook = jupyterapp.shell.currentWidget.content;
              notebook.activeCellIndex = place;
              notebook.deselectAll();
              window.ran = jupyterapp.commands.execute("notebook:run-cell");
            }""",
            list(CELLS).index(name),
        )

    def command(self, name: str, **options: Any) -> None:
        self.page.evaluate("([name, options]) => jupyterapp.commands.execute(name, options)", [name, options])

    def cell(self, name: str) -> Any:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(list(CELLS).index(name))

    def until(self, condition: str, argument: Any = None) -> None:
        """Wait until a JavaScript condition over `lab` (what the picture keeps) and `it` holds."""
        self.page.wait_for_function(f"(it) => {{ {FIND} return {condition}; }}", arg=argument, polling=50)

    def look(self, expression: str, argument: Any = None) -> Any:
        return self.page.evaluate(f"(it) => {{ {FIND} return {expression}; }}", argument)

    def type(self, prompt: str, max_tokens: object) -> None:
        self.page.fill(".lkw [name=max_tokens]", str(max_tokens))
        self.page.fill(".lkw [name=prompt]", prompt)
        self.page.press(".lkw [name=prompt]", "Enter")

    def inject(self, prompt: str, max_tokens: object = 8) -> None:
        """Hand a request in, and wait for its card, or for the sentence that says why not."""
        cards = self.page.locator(".lkw .lk-card").count()
        self.type(prompt, max_tokens)
        self.until(
            "document.querySelectorAll('.lkw .lk-card').length > it"
            " || document.querySelector('.lkw-message').textContent",
            cards,
        )

    def idle(self) -> None:
        self.until("!lab.state.tables.length && !lab.state.queue.length && !lab.live.paused")

    def card(self, request_id: str) -> Any:
        return self.page.locator(f'.lkw .lk-card[data-request="{request_id}"]')

    def colors(self, picture: str) -> set[str]:
        """The colours of a canvas, those of at least ten pixels."""
        found = self.look(
            """(() => {
              const canvas = document.querySelector(`.lkw canvas[data-picture="${it}"]`), counts = {};
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              for (let i = 0; i < data.length; i += 4) {
                if (data[i + 3] < 255) continue;
                const color = "#" + [0, 1, 2].map((k) => data[i + k].toString(16).padStart(2, "0")).join("");
                counts[color] = (counts[color] || 0) + 1;
              }
              return Object.keys(counts).filter((color) => counts[color] >= 10);
            })()""",
            picture,
        )
        return {color.upper() for color in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook is."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[str]:
    """A JupyterLab of its own, with nothing of whoever runs the tests in it."""
    home, port = tmp_path_factory.mktemp("jupyter"), free_port()
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS.values()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    written = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(written, folder / "widgets.ipynb")
    news = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    options = {
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": "True",
        "ServerApp.port": str(port),
        "ServerApp.port_retries": "0",
        "ServerApp.root_dir": str(folder),
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *given],
        env=os.environ
        | {name: str(home / folder) for name, folder in folders.items()}
        | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=(home / "log").open("w"),
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 3 * PATIENCE
        while not _answers(address):
            assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/status", timeout=5):
            return True
    except OSError:
        return False


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
    me.page.click(".lkw .lk-step")  # whatever is done next, the sentence is gone
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
