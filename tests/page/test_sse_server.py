"""The page's stream on a real server: where it is, and where it is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr
import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.gradio_page import build, serve
from labkit.page.session import Lab
from labkit.page.sse import PATH
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from tests.page.watching import run, until
from tests.waiting import PATIENCE, wait_for

FOUR = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def lab(model: LoadedModel) -> Iterator[Lab]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=14, block_size=4, max_num_seqs=5))) as live:
        lab = Lab(live)
        wait_for(lambda: not live.busy)
        yield lab
        lab.close()


def events(address: str, count: int = 1) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """The first events of a stream, and the answer that they came in."""
    got: list[dict[str, Any]] = []
    with httpx.stream("GET", address, timeout=PATIENCE) as response:
        if response.status_code == 200:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    got.append(json.loads(line[6:]))
                if len(got) == count:
                    break
    return response, got


def test_the_route_of_a_page_that_is_served(lab: Lab) -> None:
    page = serve(lab, share=False, quiet=True, root_path="/some/where", server_name="127.0.0.1")
    try:
        home = f"http://127.0.0.1:{page.server_port}"
        request_id = lab.session.submissions.inject("me", "hello", FOUR)
        wait_for(lambda: not lab.session.live.busy)
        for address in (home + PATH, f"{home}/some/where{PATH}"):  # a proxy may cut it off, or not
            response, got = events(address)
            assert response.status_code == 200 and "content-encoding" not in response.headers
            assert [card["id"] for card in got[0]["cards"]["items"]] == [request_id]
        wait_for(lambda: not page.broadcast._readers)
        assert httpx.post(home + PATH).status_code in (404, 405)
        assert httpx.get(home + PATH + "/more").status_code == 404
        assert httpx.get(home + "/config").status_code == 200
        with httpx.stream("GET", home + PATH, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            assert next(lines) == "retry: 1000"
            page.close(verbose=False)
            assert len(list(lines)) == 2, "the stream ends when the page is closed"
    finally:
        page.close(verbose=False)
    assert not page.server.thread.is_alive()


def test_where_one_must_log_in_there_is_no_open_stream(lab: Lab) -> None:
    page = serve(lab, share=False, quiet=True, auth=("me", "secret"), server_name="127.0.0.1")
    try:
        assert events(f"http://127.0.0.1:{page.server_port}{PATH}")[0].status_code == 404
    finally:
        page.close(verbose=False)


def test_a_page_that_is_mounted_elsewhere_has_none(lab: Lab) -> None:
    app = gr.mount_gradio_app(FastAPI(), build(lab), path="/lab", ssr_mode=False)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

    async def test() -> None:
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        response, _ = await asyncio.to_thread(events, f"http://127.0.0.1:{port}/lab{PATH}")
        assert response.status_code == 404
        server.should_exit = True
        await serving

    run(test)
