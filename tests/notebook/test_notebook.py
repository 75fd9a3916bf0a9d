"""Notebooks call pictures with their text, one line of setup, and the source of the engine."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from IPython.core.formatters import DisplayFormatter

import labkit
from labkit import exercises, notebook
from labkit.core.block_pool import BlockPool
from labkit.core.scheduler import Scheduler
from labkit.sampling_params import SamplingParams
from labkit.trace.trace import Trace
from labkit.views import text
from labkit.views.picture import Picture, in_colab

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def trace() -> Trace:
    engine = labkit.Engine(labkit.EngineConfig(model="tiny-random", num_blocks=16, block_size=4))
    for prompt in ("one request", "and another"):
        engine.add_request(prompt, SamplingParams(max_tokens=5))
    while engine.has_unfinished:
        engine.step()
    return engine.trace


def pictures(trace: Trace) -> dict[str, Picture]:
    curve = {"a": [1.0, 2.0], "b": [2.0, None]}
    return {
        "timeline": notebook.timeline(trace),
        "part of a timeline": notebook.timeline(trace, first=1, last=3),
        "heatmap": notebook.heatmap(trace),
        "heatmap of a step": notebook.heatmap(trace, 2),
        "throughput": notebook.throughput(trace),
        "token timeline": notebook.token_timeline(trace),
        "token timeline in seconds": notebook.token_timeline(trace, "seconds"),
        "bars": notebook.bars({"a": 1, "b": 2}, "Bars", unit="pages"),
        "lines": notebook.lines([1, 2], curve, "Lines", x_name="x", y_name="y", log="xy"),
    }


def test_every_picture_is_a_figure_and_its_text_in_one_output(trace: Trace) -> None:
    for name, picture in pictures(trace).items():
        data, _ = DisplayFormatter().format(picture)
        assert set(data) == {PLOTLY, "text/plain"}, name
        json.dumps(data, allow_nan=False)  # or the notebook would be no JSON
        assert data[PLOTLY]["data"] and data[PLOTLY]["layout"]["template"], name
        assert len(data["text/plain"].splitlines()) > 2, name
        assert repr(picture) == data["text/plain"]


def test_pictures_of_a_trace_are_those_of_its_views(trace: Trace) -> None:
    from labkit import views

    assert repr(notebook.timeline(trace, first=1)) == text.batch_timeline(trace, first=1)
    assert repr(notebook.heatmap(trace, 2)) == text.block_heatmap(trace, 2)
    assert repr(notebook.heatmap(trace)) != repr(notebook.heatmap(trace, 2))
    assert notebook.heatmap(trace, 2).figure == views.block_heatmap(trace, 2)
    assert notebook.timeline(trace, last=2).figure == views.batch_timeline(trace, last=2)
    assert repr(notebook.throughput(trace, window=1.0)) == text.throughput(trace, window=1.0)
    assert repr(notebook.token_timeline(trace, "steps")) == text.token_timeline(trace, "steps")
    assert notebook.token_timeline(trace).figure == views.token_timeline(trace)


def test_in_colab_a_picture_is_html_that_loads_plotly_from_a_server(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not in_colab()
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert in_colab()
    for name, picture in pictures(trace).items():
        data, _ = DisplayFormatter().format(picture)
        assert set(data) == {"text/html", "text/plain"}, name
        html = data["text/html"]
        assert "Plotly.newPlot" in html and "cdn.plot.ly" in html and "<html" not in html
        assert len(html) < 100_000  # plotly itself, 4 MB of it, is not inside


def test_a_picture_is_shown_as_text_where_there_is_no_notebook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = notebook.bars({"a": 1}, "Bars")
    notebook.show(picture, picture)
    assert capsys.readouterr().out == f"{picture.twin}\n" * 2
    monkeypatch.delitem(sys.modules, "IPython")
    notebook.show(picture)
    assert capsys.readouterr().out == f"{picture.twin}\n"


def test_a_picture_is_displayed_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    display = SimpleNamespace(display=lambda *pictures: shown.extend(pictures))
    ipython = SimpleNamespace(get_ipython=lambda: True, display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    picture = notebook.bars({"a": 1}, "Bars")
    notebook.show(picture)
    assert shown == [picture]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", "smollm2 in float32 on cpu (3 threads)."),
        ("cuda:0", "smollm2 in float32 on cuda:0 (Tesla T4)."),
    ],
)
def test_setup_says_in_one_line_what_is_here(
    device: str, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(name="smollm2", device=torch.device(device), dtype=torch.float32)
    monkeypatch.setattr(notebook, "default_model", lambda: model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert labkit.setup() is None
    out, err = capfd.readouterr()
    assert out.startswith(f"labkit: {said} ") and out.count("\n") == 1 and out.endswith(".\n")
    assert err == ""


def test_the_shared_model_is_loaded_once_and_only_a_download_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("labkit.models.hub.find", lambda name, **options: calls.append({name: options}))
    monkeypatch.setattr(
        "labkit.models.load.load_model", lambda *_, **options: calls.append(options) or object()
    )
    notebook.default_model.cache_clear()
    try:
        assert notebook.default_model() is notebook.default_model()
    finally:
        notebook.default_model.cache_clear()
    assert calls == [{"smollm2-135m": {}}, {"say": None}], (
        "`find` tells of a download, unless it is asked not to"
    )


def test_source_prints_the_engines_own_lines_under_their_file(capsys: pytest.CaptureFixture[str]) -> None:
    notebook.source(BlockPool.allocate)
    out = capsys.readouterr().out
    assert out.startswith("# labkit/core/block_pool.py\ndef allocate(self")  # not indented as in its class
    notebook.source(Scheduler, exercises.find)
    out = capsys.readouterr().out
    assert (
        out.startswith("# labkit/core/scheduler.py\nclass Scheduler")
        and "\n# labkit/exercises/__init__.py\ndef " in out
    )


def test_source_prints_a_property_and_what_is_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    notebook.source(Scheduler.has_unfinished, notebook.default_model)
    out = capsys.readouterr().out
    assert "# labkit/core/scheduler.py\n@property\ndef has_unfinished" in out
    assert "# labkit/notebook/__init__.py\n@functools.cache\ndef default_model" in out


def test_source_of_something_from_elsewhere_names_its_module_and_no_path(
    capsys: pytest.CaptureFixture[str],
) -> None:
    notebook.source(json.dumps)
    assert capsys.readouterr().out.startswith("# json\ndef dumps")
