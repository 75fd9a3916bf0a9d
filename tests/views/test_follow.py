"""The page in a real browser, and what tells it of updates: one stream for all, or answers without one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import pytest
import uvicorn
from fastapi import FastAPI

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.gradio_page import Page, build, serve
from labkit.page.session import Lab
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from tests.visiting import Visitor, free_port
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]


@pytest.fixture(scope="module")
def page(model: LoadedModel) -> Iterator[Page]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=48, max_num_seqs=8))) as live:
        page = serve(Lab(live, grace=0.2), share=False, quiet=True, server_port=free_port())
        yield page
        page.close(verbose=False)


@pytest.fixture
def come(browser: Any, page: Page) -> Iterator[Callable[[], Visitor]]:
    visitors: list[Visitor] = []

    def arrive() -> Visitor:
        context = browser.new_context(viewport={"width": 1600, "height": 900})
        context.add_init_script(COUNTED)
        visitors.append(Visitor(context, f"http://127.0.0.1:{page.server_port}"))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
    assert [problem for visitor in visitors for problem in visitor.problems] == []
    lab = page.lab
    lab.change({}, running="cancel")
    wait_for(lambda: not page.broadcast._readers)


# Counts the streams that were opened, and what else was asked.
COUNTED = """
window.opened = []; window.asked = [];
window.EventSource = class extends EventSource { constructor(...all) { super(...all); opened.push(this); } };
const fetched = window.fetch;
window.fetch = (url, options) => {
  if (options?.body) asked.push(String(options.body));
  return fetched(url, options);
};
"""
FOLLOWS = "opened.filter((source) => source.url.endsWith('/labkit/stream'))"
HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def hears(me: Visitor, page: Page, text: str = "hello") -> None:
    """A request that somebody else hands in is seen from its beginning to its end."""
    session = page.lab.session
    request_id = session.submissions.inject("somebody else", text, SamplingParams(max_tokens=4))
    wait_for(lambda: session.live.output(request_id).finished)
    output = session.live.output(request_id)
    assert me.finished(request_id, output.finish_reason) == output.text


def test_everybody_follows_one_stream_and_asks_for_nothing(come: Callable[[], Visitor], page: Page) -> None:
    me, other = come(), come()
    mine = me.inject("hello", max_tokens=4)
    for visitor in (me, other):
        text = visitor.finished(mine)
        assert text == page.lab.session.live.output(mine).text
        assert visitor.look(f"{FOLLOWS}.length") == 1
        assert not visitor.look("asked.some((body) => body.includes('pull'))")
    assert other.page.locator(".lk-mine").count() == 0 and me.page.locator(".lk-mine").count() == 1
    late = come()
    assert late.finished(mine) == text and late.page.locator(".lk-mine").count() == 0
    secret = me.look("lab.visitor()")
    assert secret in page.lab.visitors and " " not in secret
    assert not late.look("document.documentElement.outerHTML.includes(it)", secret)


def test_a_tab_that_nobody_looks_at_hears_nothing_and_catches_up(
    come: Callable[[], Visitor], page: Page
) -> None:
    me = come()
    hears(me, page)
    me.page.evaluate("document.activeElement.blur()")
    me.page.keyboard.press("ArrowDown")
    selected = me.look("lab.state.selected.request")
    assert selected is not None
    cards = me.page.locator(".lk-card").count()
    for leave, come_back in (
        (lambda: me.page.evaluate(HIDE, True), lambda: me.page.evaluate(HIDE, False)),
        (lambda: me.page.click("role=tab[name=Race]"), lambda: me.page.click("role=tab[name=Live]")),
    ):
        leave()
        wait_for(lambda: not page.broadcast._readers)
        step = me.look("lab.state.step")
        request_id = page.lab.session.submissions.inject(
            "somebody else", "meanwhile", SamplingParams(max_tokens=3)
        )
        wait_for(lambda: not page.lab.session.live.busy)
        assert me.look("lab.state.step") == step
        come_back()
        me.page.wait_for_selector(f'.lk-card[data-request="{request_id}"]')
        me.until("lab.state.step === it", page.lab.session.live.records()[-1].step)
        cards += 1
        assert me.page.locator(".lk-card").count() == cards
        assert me.page.locator(".lk-card").first.get_attribute("data-request") == request_id
        assert me.look("lab.state.selected.request") == selected, "it was forgotten what was selected"
        steps = me.look("lab.state.steps.map((step) => step.step)")
        assert steps == sorted(set(steps))
        logged = me.page.locator(".lk-log > li").count()
        assert logged == me.look("lab.state.events.length")
        hears(me, page)
        cards += 1


def test_a_page_that_was_let_go_comes_back(come: Callable[[], Visitor], page: Page) -> None:
    me = come()
    mine = me.inject("hello", max_tokens=4)
    me.finished(mine)
    loop = page.broadcast._loop
    loop.call_soon_threadsafe(page.broadcast._let_go)
    me.page.wait_for_selector(".lk-lost")
    me.page.wait_for_selector(".lk:not(.lk-lost)")
    assert me.page.locator(".lk-card.lk-mine").count() == 1
    hears(me, page)
    page.lab.change({"max_num_seqs": 3}, running="cancel")
    me.until("lab.state.meta.max_num_seqs === 3")
    assert me.page.locator(".lk-card").count() == 0
    hears(me, page)


def test_a_mounted_page_asks(browser: Any, model: LoadedModel) -> None:
    port = free_port()
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=48, max_num_seqs=8))) as live:
        page = build(Lab(live, grace=0.2))
        app = gr.mount_gradio_app(FastAPI(), page, path="/lab", ssr_mode=False, footer_links=[])
        server = uvicorn.Server(
            uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        context = browser.new_context(viewport={"width": 1600, "height": 900})
        context.add_init_script(COUNTED)
        me = Visitor(context, f"http://127.0.0.1:{port}/lab/")
        mine = me.inject("hello", max_tokens=4)
        assert me.finished(mine) == live.output(mine).text
        hears(me, page)
        assert me.look("asked.some((body) => body.includes('pull'))") and me.look(f"{FOLLOWS}.length") == 1
        assert me.page.locator(".lk-mine").count() == 1 and not page.broadcast._readers
        page.lab.change({"max_num_seqs": 3}, running="cancel")
        me.until("lab.state.meta.max_num_seqs === 3")
        assert me.page.locator(".lk-card").count() == 0
        hears(me, page)
        assert all("404" in problem for problem in me.problems), me.problems
        context.close()
        server.should_exit = True
        thread.join(30)
        page.close(verbose=False)
