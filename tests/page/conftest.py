"""The model that all tests of the page run on, and labs: one that people visit, and one that nobody does."""

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
from labkit.serving.limits import Limits
from tests.visiting import Visitor, free_port


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def own(model: LoadedModel) -> Iterator[Lab]:
    """A lab without a page, in which nothing depends on how long a step takes."""
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=128, speculative_gate=False))) as live:
        own = Lab(live)
        yield own
        own.close()


@pytest.fixture(scope="module")
def house(model: LoadedModel, request: pytest.FixtureRequest) -> Iterator[tuple[Lab, str]]:
    """A lab that is served, and its address. A module that needs more pages says so with `NUM_BLOCKS`."""
    sizes = {
        "num_blocks": getattr(request.module, "NUM_BLOCKS", 96),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
    }
    config = EngineConfig(model=model, speculative_gate=False, **sizes)
    with AsyncEngine(Engine(config)) as live:
        lab = Lab(live, grace=0.2, limits=Limits(requests=40, answer_tokens=300))
        port = free_port()
        demo = app.launch(lab, share=False, server_port=port, quiet=True)
        yield lab, f"http://127.0.0.1:{port}"
        demo.close(verbose=False)


@pytest.fixture
def lab(house: tuple[Lab, str]) -> Iterator[Lab]:
    """The lab, as it was started, and idle."""
    lab = house[0]
    yield lab
    lab.change(lab.base, running="cancel")
    lab._played = ""
    lab.session.live.speed = None


@pytest.fixture
def come(browser: Any, house: tuple[Lab, str], lab: Lab) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def arrive(query: str = "", width: int = 1600, height: int = 900, **options: Any) -> Visitor:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        visitors.append(Visitor(context, house[1] + query))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
    assert [problem for visitor in visitors for problem in visitor.problems] == []
