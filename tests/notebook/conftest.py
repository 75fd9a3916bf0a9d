"""A small engine, and a notebook's kernel without a notebook."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labkit import Engine, EngineConfig
from labkit.models.load import LoadedModel, load_model
from labkit.notebook import live_view


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def engine(model: LoadedModel) -> Engine:
    return Engine(EngineConfig(model=model, num_blocks=48, max_num_seqs=4))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a kernel: widgets are made, and nobody looks at them."""
    monkeypatch.setattr(live_view, "_has_page", lambda: True)
    yield
    live_view.LiveView._open.clear()
