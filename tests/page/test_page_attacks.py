"""What a hostile client tries on a page that is served, in small: none of it gets anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

import app
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.front import MAX_BODY
from labkit.page.gradio_page import Page
from labkit.page.session import Lab
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits
from tests.visiting import free_port
from tests.waiting import PATIENCE, wait_for

TRIES, ALLOWED = 20, 2


@pytest.fixture(scope="module")
def served(model: LoadedModel) -> Iterator[tuple[Page, Lab]]:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64, max_num_seqs=4))) as live:
        lab = Lab(live, limits=Limits(requests=ALLOWED), clock=False, grace=0.05)
        lab.visitors.unheard = 0.2
        page = app.launch(lab, share=False, server_name="127.0.0.1", server_port=free_port(), quiet=True)
        app.add_api(page, lab, None)
        yield page, lab
        page.close(verbose=False)


@pytest.fixture
def page(served: tuple[Page, Lab]) -> Page:
    return served[0]


@pytest.fixture
def lab(served: tuple[Page, Lab]) -> Iterator[Lab]:
    """The lab, paused, so that nothing ends by itself."""
    lab = served[1]
    lab.session.live.pause()
    yield lab
    lab.session.live.resume()
    for request_id in list(lab.session.live._answers):
        lab.session.live.abort(request_id)
    wait_for(lambda: not lab.session.live.num_unfinished)


def home(page: Page) -> str:
    return f"http://127.0.0.1:{page.server_port}"


def post(page: Page, path: str, body: Any, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(home(page) + path, json=body, headers=given, timeout=PATIENCE)


def inject(page: Page, session: str, **headers: str) -> str:
    """What the form says to a prompt: "" if it was taken in."""
    body = {"data": ["hello", 5, 0, 1, "", True], "session_hash": session}
    return post(page, "/gradio_api/run/inject", body, **headers).json()["data"][0]


def ask(page: Page, name: str, argument: dict[str, Any]) -> httpx.Response:
    """What the page's own scripts ask."""
    (component,) = (
        number
        for number, block in page.blocks.items()
        if isinstance(block, gr.HTML) and block.elem_id == ("lkr-replay" if name == "hand_in" else "lk-live")
    )
    body = {"data": argument, "fn_name": name, "session_hash": "x", "component_id": component}
    return post(page, "/gradio_api/component_server", body)


def arrive(page: Page, session: str) -> str:
    """Arrive as a page does, and return the secret."""
    (number,) = (number for number, fn in page.fns.items() if fn.name == "arrive")
    body = {"data": [""], "fn_index": number, "session_hash": session}
    return post(page, "/gradio_api/run/predict", body).json()["data"][0].split()[0]


def test_a_session_for_each_call_is_one_client(page: Page, lab: Lab) -> None:
    said = [inject(page, f"forged {i}") for i in range(TRIES)]
    assert said[:ALLOWED] == [""] * ALLOWED and all("2 is the limit" in words for words in said[ALLOWED:])


def test_an_arrival_for_each_call_is_one_client(page: Page, lab: Lab) -> None:
    said = []
    for i in range(TRIES):
        secret = arrive(page, f"arrived {i}")
        said.append(inject(page, f"arrived {i}"))
        assert "does not know" in ask(page, "play", {"visitor": secret, "scenario": "uneven"}).text
        ask(page, "control", {"visitor": secret, "action": "resume"})
    assert said.count("") == ALLOWED and lab.session.live.paused
    wait_for(lambda: not lab.visitors._tabs)  # forgotten, since nobody heard from them
    assert len(lab.visitors) == 0


def test_a_header_is_no_address(page: Page, lab: Lab) -> None:
    said = [inject(page, "x", X_Forwarded_For=f"10.0.0.{i}") for i in range(TRIES)]
    assert said.count("") == ALLOWED
    body = {"model": "tiny-random", "prompt": "hello", "max_tokens": 2, "stream": True}
    statuses = []
    for i in range(TRIES):  # each is let go at once, so that only the address counts
        with httpx.stream(
            "POST", home(page) + "/v1/completions", json=body, headers={"X-Forwarded-For": f"10.0.0.{i}"}
        ) as answer:
            statuses.append(answer.status_code)
            answer.close()
    assert {call for call in statuses} <= {200, 429}


def test_a_visitor_with_a_page_has_requests_of_their_own(page: Page, lab: Lab) -> None:
    while not inject(page, "somebody without a page"):
        pass
    with httpx.stream("GET", home(page) + "/gradio_api/heartbeat/mine", timeout=PATIENCE) as line:
        lines = line.iter_lines()
        assert "ALIVE" in next(lines)
        secret = arrive(page, "mine")
        assert secret in lab.visitors and len(lab.visitors) == 1
        assert [inject(page, "mine") for _ in range(ALLOWED + 1)][:-1] == [""] * ALLOWED
        ask(page, "cancel", {"visitor": "@127.0.0.1"})  # nobody can cancel for a whole address
        assert "its host's" in ask(page, "control", {"visitor": secret, "action": "resume"}).json()
        assert lab.session.live.num_unfinished == 2 * ALLOWED
    wait_for(lambda: secret not in lab.visitors)
    lab.session.live.resume()
    wait_for(lambda: not lab.session.live.num_unfinished)


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/run/inject", "/gradio_api/component_server", "/gradio_api/queue/join"),
        *("/gradio_api/upload", "/gradio_api/call/inject", "/v1/completions", "/v1/chat/completions", "/"),
    ],
)
def test_a_foreign_page_gets_nowhere(page: Page, lab: Lab, path: str) -> None:
    foreign = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    for headers in (foreign, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}, {"Host": "evil.example"}):
        answer = httpx.post(home(page) + path, content="{}", headers=headers, timeout=PATIENCE)
        assert answer.status_code == (421 if "Host" in headers else 403)
    assert lab.session.live.num_unfinished == 0


@pytest.mark.parametrize("path", ["/", "/config", "/labkit/stream", "/health", "/metrics", "/v1/models"])
def test_a_name_of_somebody_else_reads_nothing(page: Page, path: str) -> None:
    answer = httpx.get(home(page) + path, headers={"Host": "evil.example"}, timeout=PATIENCE)
    assert answer.status_code == 421 and "--allowed-host" in answer.text


def test_no_file_is_ever_on_the_disk(page: Page) -> None:
    folder = Path(page.app.uploaded_file_dir)
    before = set(folder.glob("**/*"))
    paths = ("/gradio_api/upload", "/gradio_api/upload/", "/prefix/gradio_api/upload")
    for path in (*paths, "/gradio_api/component_server"):
        answer = httpx.post(home(page) + path, files={"files": b"x" * 100}, timeout=PATIENCE)
        assert answer.status_code == 404
    assert httpx.get(home(page) + "/gradio_api/deep_link?session_hash=x").status_code == 404
    assert set(folder.glob("**/*")) == before


def test_nobody_watches_the_traffic(page: Page) -> None:
    for path in ("/monitoring", "/monitoring/summary", "/monitoring/x"):
        assert httpx.get(home(page) + path, timeout=PATIENCE).status_code == 403


def test_a_body_is_as_large_as_a_trace_at_most(page: Page) -> None:
    answer = ask(page, "hand_in", {"size": 5, "data": "x" * MAX_BODY})
    assert answer.status_code in (400, 413)  # fastapi says the former of whatever stops a body
