"""A browser, a lab to look at, and people who come by: fixtures for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import app
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.page.session import Lab
from labkit.serving.async_engine import AsyncEngine
from tests.visiting import SWITCHES, Visitor, chromium, free_port
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture(scope="module")
def shown(model: LoadedModel) -> Iterator[tuple[AsyncEngine, str]]:
    """An engine with a page on it, and the page's address."""
    config = EngineConfig(model=model, num_blocks=48, max_num_seqs=16, max_num_batched_tokens=256)
    with AsyncEngine(Engine(config)) as live:
        port = free_port()
        demo = app.launch(Lab(live, grace=0.2), share=False, server_port=port, quiet=True)
        yield live, f"http://127.0.0.1:{port}"
        demo.close(verbose=False)


@pytest.fixture
def live(shown: tuple[AsyncEngine, str]) -> Iterator[AsyncEngine]:
    """The engine, at full speed, and left idle for the next test."""
    live = shown[0]
    yield live
    live.speed = None
    live.resume()
    for request_id in list(live.engine.outputs):
        live.abort(request_id)
    wait_for(lambda: not live.busy)


@pytest.fixture
def visit(
    browser: Any, shown: tuple[AsyncEngine, str], live: AsyncEngine
) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def arrive(width: int = 1600, height: int = 900, **options: Any) -> Visitor:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        visitors.append(Visitor(context, shown[1]))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
    assert [problem for visitor in visitors for problem in visitor.problems] == []
