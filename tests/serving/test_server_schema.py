"""The API against its own description: each operation, with what the schema allows and what it forbids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import settings

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.handler import Options
from labkit.serving.limits import Limits
from labkit.serving.routes import create_app
from tests.serving.api_server import MODEL, Served, served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")
# The schema does not know the model: how long a prompt may be, or which tokens there are.
LEFT_OUT = [pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance]

OPTIONS = Options(limits=Limits(requests=64, queue=64, answer_tokens=4), model_name=MODEL)


with AsyncEngine(Engine(EngineConfig(MODEL, num_blocks=8))) as live:  # parametrized before a test begins
    DESCRIPTION = create_app(live, OPTIONS).openapi()
schema = schemathesis.openapi.from_dict(DESCRIPTION)


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served(OPTIONS) as site:
        yield site


def test_the_description_is_the_one_that_is_served(site: Served) -> None:
    assert httpx.get(f"{site.url}/v1/openapi.json").json() == DESCRIPTION


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True)
def test_answers_are_as_the_schema_says(case: Any, site: Served) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL  # else nothing would get beyond the name
    case.call_and_validate(base_url=site.url, timeout=60, excluded_checks=LEFT_OUT)


def test_nothing_is_left_over(site: Served) -> None:
    site.until_quiet()
    assert site.live.failure is None
