"""A real browser for the tests of the page, and people in it who type, click and look."""

from __future__ import annotations

import os
import shutil
import socket
from typing import Any

import pytest

PATIENCE = 30  # seconds until a test gives up; nothing is decided by it
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # pages do without the rest of the world
]
HOSTILE = '<img src=x onerror="window.hacked=1"><b>bold</b> ${window.hacked=1} {{constructor}} `'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- a browser ------------------------------------------------------------------------------------


def chromium() -> str:
    """A Chromium on this machine. Skips the test if there is none, and fails it in CI."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path:
        return path
    reason = "no Chromium found: run `apt-get install chromium`, or set CHROMIUM=path"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Person:
    """A person with a page open, who remembers everything that goes wrong on it."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.problems: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))

    def _listen(self, message: Any) -> None:
        elsewhere = "net::ERR_NAME_NOT_RESOLVED" in message.text or "https://" in message.text
        if message.type == "error" and not elsewhere:
            self.problems.append(message.text)


class Visitor(Person):
    """A person with the lab open, who types, clicks and looks."""

    def __init__(self, context: Any, address: str) -> None:
        super().__init__(context)
        self.page.goto(address)
        self.until("lab?.state.meta && lab.visitor()")

    def until(self, condition: str, argument: Any = None) -> None:
        """Wait until a JavaScript condition over `lab` (what the page keeps) and `it` holds."""
        self.page.wait_for_function(f"(it) => {{ {FIND} return {condition}; }}", arg=argument, polling=50)

    def look(self, expression: str, argument: Any = None) -> Any:
        return self.page.evaluate(f"(it) => {{ {FIND} return {expression}; }}", argument)

    def fill(self, prompt: str | None = None, max_tokens: object = None, temperature: object = 0) -> None:
        if prompt is not None:
            self.page.fill("#lk-prompt textarea", prompt)
        if max_tokens is not None:
            self.page.fill("#lk-max-tokens input", str(max_tokens))
        self.page.fill("#lk-temperature input", str(temperature))

    def inject(self, prompt: str, max_tokens: int = 8) -> str:
        """Hand a request in and return its id, read off its card."""
        before = self.page.locator(".lk-card.lk-mine").count()
        self.fill(prompt, max_tokens)
        self.page.click("#lk-inject")
        self.until("document.querySelectorAll('.lk-card.lk-mine').length > it", before)
        return self.page.locator(".lk-card.lk-mine").first.get_attribute("data-request")

    def card(self, request_id: str) -> Any:
        return self.page.locator(f'.lk-card[data-request="{request_id}"]')

    def text(self, request_id: str) -> str:
        return self.card(request_id).locator(".lk-text").evaluate("element => element.textContent")

    def finished(self, request_id: str, reason: str = "length") -> str:
        """Wait for a card to say that its request ended so, and return its text."""
        self.page.wait_for_selector(f'.lk-card[data-request="{request_id}"][data-status="{reason}"]')
        return self.text(request_id)


FIND = "const lab = [...document.querySelectorAll('#lk-live *')].find((e) => e.labkit)?.labkit;"
