"""A page of another origin that calls the API from a real browser, and reads a stream."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from labkit.serving.handler import Options
from tests.serving.api_server import Served, ask, served

pytest_plugins = ["tests.visiting_fixtures"]

READ = """async ([url, body]) => {
    const headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"};
    const answer = await fetch(url, {method: "POST", headers, body: JSON.stringify(body)});
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    const pieces = [];
    for (let piece; !(piece = await reader.read()).done;) pieces.push(piece.value);
    return [answer.status, answer.headers.get("X-Request-Id"), pieces.join("")];
}"""


class Empty(http.server.BaseHTTPRequestHandler):
    """A site of one page, with nothing on it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def home() -> Iterator[str]:
    """The origin of that site: another port is another origin."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_browser_lets_such_a_page_call_and_no_other(browser: Any, home: str) -> None:
    def read(site: Served, **fields: Any) -> list[Any]:
        return page.evaluate(READ, [f"{site.url}/v1/completions", ask(max_tokens=4) | fields])

    context = browser.new_context()
    page = context.new_page()
    page.goto(home)
    with served(Options(cors=[home], api_key="secret")) as site:
        status, request_id, text = read(site, stream=True)
        assert status == 200 and request_id and text.endswith("data: [DONE]\n\n")
        status, _, text = read(site, max_tokens=0)
        assert status == 400 and "max_tokens must be at least 1" in text
    with (
        served(Options(cors=["http://example.org"], api_key="secret")) as site,
        pytest.raises(Exception, match="Failed to fetch"),
    ):
        read(site, stream=True)
    context.close()
