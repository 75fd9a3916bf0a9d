"""The page in a real browser behind proxies, and over a network with gaps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import app
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.gradio_page import Page
from labkit.page.session import Lab
from labkit.serving.asgi import beside
from labkit.serving.async_engine import AsyncEngine
from tests.page.program import program
from tests.page.proxies import Network, nginx
from tests.visiting import Visitor, free_port
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]


@pytest.fixture
def open_lab(model: LoadedModel) -> Iterator[Callable[..., Page]]:
    """A function that serves a lab with its API, as `app.py` does."""
    pages: list[Page] = []

    def serve(port: int | None = None, **options: Any) -> Page:
        config = EngineConfig(model=model, num_blocks=128, max_num_seqs=4)
        lab = Lab(AsyncEngine(Engine(config)), grace=60)
        front = functools.partial(beside, app.api_of(lab, None))
        port = port or free_port()
        pages.append(app.launch(lab, share=False, quiet=True, server_port=port, front=front, **options))
        return pages[-1]

    yield serve
    for page in pages:
        page.close(verbose=False)
        page.lab.session.live.close()


@pytest.fixture
def go(browser: Any) -> Iterator[Callable[[str], Visitor]]:
    contexts: list[Any] = []

    def arrive(address: str) -> Visitor:
        contexts.append(browser.new_context(viewport={"width": 1600, "height": 900}))
        return Visitor(contexts[-1], address)

    yield arrive
    for context in contexts:
        context.close()


# -- proxies --------------------------------------------------------------------------------------

HELD_BACK = (
    "location / {{ proxy_pass http://127.0.0.1:{port}; proxy_set_header Host $host; proxy_buffering on; "
    "proxy_ignore_headers X-Accel-Buffering; proxy_buffers 64 64k; proxy_buffer_size 64k; "
    "gzip on; gzip_types text/event-stream; }}"
)


@pytest.mark.parametrize(
    ("rules", "path", "root"),
    [
        ("location / {{ proxy_pass http://127.0.0.1:{port}; proxy_set_header Host $host; }}", "/", None),
        ("location /lab/ {{ proxy_pass http://127.0.0.1:{port}/; }}", "/lab/", "/lab"),
        ("location /lab/ {{ proxy_pass http://127.0.0.1:{port}; }}", "/lab/", "/lab"),
    ],
    ids=["the port is lost", "stripped prefix", "kept prefix"],
)
def test_behind_a_real_nginx(
    open_lab: Callable[..., Page],
    go: Callable[[str], Visitor],
    tmp_path: Path,
    rules: str,
    path: str,
    root: str | None,
) -> None:
    page = open_lab(root_path=root)
    with nginx(tmp_path, rules.format(port=page.server_port)) as address:
        me = go(address + path)
        mine = me.inject("hello", max_tokens=8)
        assert me.finished(mine) == page.lab.session.live.output(mine).text
        assert page.broadcast._readers, "it follows the stream"
        me.page.click(".lk-pause")
        wait_for(lambda: page.lab.session.live.paused)
        models = httpx.get(f"{address}{path}v1/models", timeout=60)
        assert models.json()["data"][0]["id"] == "tiny-random"
        me.context.close()


def test_a_proxy_that_holds_everything_back_is_noticed(
    open_lab: Callable[..., Page], go: Callable[[str], Visitor], tmp_path: Path
) -> None:
    page = open_lab()
    with nginx(tmp_path, HELD_BACK.format(port=page.server_port)) as address:
        me = go(address)
        mine = me.inject("hello", max_tokens=8)
        assert me.finished(mine) == page.lab.session.live.output(mine).text
        me.context.close()


# -- gaps -----------------------------------------------------------------------------------------


def test_after_a_gap_a_page_is_known_again(
    open_lab: Callable[..., Page], go: Callable[[str], Visitor]
) -> None:
    page = open_lab()
    lab, network = page.lab, Network(page.server_port)
    try:
        me = go(f"http://127.0.0.1:{network.port}")
        lab.session.live.speed = 2
        mine = me.inject("hello", max_tokens=400)
        secret = me.look("lab.visitor()")
        network.cut()
        wait_for(lambda: not len(lab.visitors))
        me.page.wait_for_selector(".lk-lost")
        network.mend()
        me.page.wait_for_selector(".lk:not(.lk-lost)")
        wait_for(lambda: len(lab.visitors) == 1)
        assert me.look("lab.visitor()") == secret and not lab.visitors._ends
        me.card(mine).locator(".lk-cancel").click()
        me.finished(mine, "abort")
        other = me.inject("hello again", max_tokens=400)
        assert me.card(other).locator(".lk-you").inner_text() == "yours"
        lab.visitors.grace = 0.1
        me.context.close()
        wait_for(lambda: lab.session.live.output(other).finish_reason == "abort")
    finally:
        network.close()


def test_after_a_restart_of_the_lab_a_page_is_at_home_in_the_new_one(go: Callable[[str], Visitor]) -> None:
    port = free_port()
    with program(port=port) as (_, address):
        me = go(address)
        me.finished(me.inject("hello", max_tokens=4))
        secret = me.look("lab.visitor()")
    me.page.wait_for_selector(".lk-lost")
    with program(port=port):
        me.until("lab.visitor() !== it", secret)  # the new lab has never given this secret to anybody
        me.until("!document.querySelector('.lk-card')")
        mine = me.inject("hello again", max_tokens=4)
        me.finished(mine)
        assert me.card(mine).locator(".lk-you").inner_text() == "yours"
        me.page.click(".lk-pause")
        me.page.wait_for_selector(".lk-paused")
