"""The live picture of a notebook, without a notebook: messages in, messages out."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

import labkit
from labkit import Engine, EngineConfig, SamplingParams
from labkit.models.load import LoadedModel
from labkit.notebook import live_view
from labkit.notebook.live_view import GONE, HOW_TO, KEEP_OPEN
from labkit.views import text
from labkit.views.assets import asset
from tests.notebook.threads import from_another_thread

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def test_without_a_page_it_is_text(engine: Engine) -> None:
    view = labkit.lab(engine)
    assert repr(view) == f"No steps yet: nothing has run.\n\n{HOW_TO}"
    assert view._repr_mimebundle_() == {"text/plain": repr(view)}
    exec(HOW_TO.removeprefix("Inject: ").replace(", then ", "; "), {"engine": engine, "labkit": labkit})
    assert repr(view) == f"{text.batch_timeline(engine.trace)}\n\n{HOW_TO}"
    assert view.widget is None and len(engine.trace) == 1


def test_the_text_is_the_same_in_every_run(model: LoadedModel) -> None:
    def once() -> str:
        engine = Engine(EngineConfig(model=model, num_blocks=48))
        engine.add_request("the same", SamplingParams(max_tokens=4))
        for _ in range(3):
            engine.step()
        return repr(labkit.lab(engine))

    assert once() == once()


@pytest.mark.parametrize("thing", [None, "tiny-random", SimpleNamespace(trace=None)])
def test_only_an_engine_will_do(thing: object) -> None:
    with pytest.raises(TypeError, match="lab takes an Engine, not"):
        labkit.lab(thing)  # type: ignore[arg-type]


def heard(view: live_view.LiveView) -> list[Any]:
    """All that a view's widget sends from now on."""
    sent: list[Any] = []
    view.widget.send = lambda content, buffers=None: sent.append((content, buffers))
    return sent


def test_a_message_and_its_answer(kernel: None, engine: Engine) -> None:
    view = labkit.lab(engine)
    sent = heard(view)
    view.widget._handle_custom_msg({"id": "v-1", "name": "pull", "question": {}}, [])
    view.widget._handle_custom_msg({"id": "v-2", "name": "inject", "question": {"prompt": ""}}, [])
    view.widget._handle_custom_msg("nonsense", [])
    view.widget._handle_custom_msg({"id": "v-3", "name": "pull"}, [])
    (first, buffers), (second, _) = sent
    assert first["id"] == "v-1" and first["answer"]["pictures"]["full"] and buffers is None
    assert second == {"id": "v-2", "answer": {"error": "The prompt is empty: type something first."}}
    json.dumps(sent)


def test_the_bundle_of_a_kernel(kernel: None, engine: Engine) -> None:
    view = labkit.lab(engine)
    bundle = view._repr_mimebundle_()
    assert list(bundle) == [WIDGET_VIEW, "text/plain"]
    assert bundle[WIDGET_VIEW]["model_id"] == view.widget.model_id
    assert bundle["text/plain"] == repr(view) and view.widget.model_id not in repr(view)
    with pytest.raises(NotImplementedError):  # IPython takes the bundle then
        view._ipython_display_()


def test_on_colab_the_widget_shows_itself(
    kernel: None, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(live_view, "in_colab", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    view = labkit.lab(engine)
    view._ipython_display_()
    assert shown == [view.widget]


def test_the_page_and_the_notebook_draw_with_the_same_files(kernel: None, engine: Engine) -> None:
    script, styles = labkit.lab(engine).widget._esm, labkit.lab(engine).widget._css
    names = ("live_feed.js", "regions.js", "communication.js", "meters.js", "words.js", "side.js")
    for name in (*names, "panel.js", "cards.js"):
        assert asset(name) in script
    assert json.dumps(asset("live_feed.html")) in script and asset("live_feed.css") in styles
    assert len(script) + len(styles) < 134_000


def test_without_anywidget_it_says_what_is_missing(
    kernel: None, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_view, "_widget_class", lambda: None)
    bundle = labkit.lab(engine)._repr_mimebundle_()
    assert list(bundle) == ["text/plain"]
    assert bundle["text/plain"].endswith("The live picture needs anywidget: pip install anywidget")


def test_old_pictures_let_go_of_their_engine(kernel: None, model: LoadedModel) -> None:
    views = [
        labkit.lab(Engine(EngineConfig(model=model, num_blocks=4, max_model_len=64)))
        for _ in range(KEEP_OPEN + 1)
    ]
    for view in views:
        assert view.widget
    assert views[0].host is None and repr(views[0]) == GONE
    assert views[0].answer({"name": "pull", "question": {}}) == {"error": GONE}
    assert all(view.host for view in views[1:])


def test_the_engine_keeps_its_thread_whichever_thread_brings_a_message(kernel: None, engine: Engine) -> None:
    async def cell() -> None:
        view, here = labkit.lab(engine), threading.get_ident()
        threads: list[int] = []
        view.widget.send = lambda content, buffers=None: threads.append(threading.get_ident())
        message = {"id": "v-1", "name": "pull", "question": {}}
        from_another_thread(lambda: view.widget._handle_custom_msg(message, []))
        assert threads == []  # this cell is still running
        await asyncio.sleep(0)
        assert threads == [here]

    asyncio.run(cell())


def test_no_thread_is_started(kernel: None, engine: Engine) -> None:
    before = threading.active_count()
    view = labkit.lab(engine)
    sent = heard(view)
    message = {"id": "1", "name": "inject", "question": {"prompt": "a", "max_tokens": 2}}
    view.widget._handle_custom_msg(message, [])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (sent and sent[-1][0]["answer"].get("busy") is False):
        view.widget._handle_custom_msg({"id": "2", "name": "pull", "question": {}}, [])
    assert threading.active_count() == before and not engine.has_unfinished
