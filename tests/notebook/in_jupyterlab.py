"""A JupyterLab with one notebook, and a person who has it open."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.visiting import PATIENCE, free_port

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
    """A person who has the notebook open, runs its cells and uses what they show."""

    def __init__(self, browser: Any, address: str) -> None:
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


@contextmanager
def jupyterlab(home: Path, folder: Path) -> Iterator[str]:
    """A JupyterLab of its own on a folder, without the settings of the machine; gives its address."""
    port = free_port()
    import nbformat

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
