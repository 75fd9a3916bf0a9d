"""Pages of somebody else: what a browser would send for them gets nowhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from labkit.serving.guard import Guard, is_loopback


def asked(guard: Guard, method: str = "POST", **headers: str) -> int:
    """The status of an answer, 200 if the request was let in."""
    found: list[int] = []

    async def send(message: Any) -> None:
        found.append(message.get("status", 0))

    names = {name.replace("_", "-").lower().encode(): value.encode() for name, value in headers.items()}
    scope = {"type": "http", "method": method, "path": "/", "headers": list(names.items())}
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    return found[0]


async def welcome(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


def local(**options: Any) -> Guard:
    return Guard(welcome, "127.0.0.1", **options)


def everywhere(**options: Any) -> Guard:
    return Guard(welcome, "0.0.0.0", **options)


OWN = ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "LOCALHOST", "lab.localhost"]
FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.168.0.9",
    "0.0.0.0",
    "[::2]",
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("port", ["", ":7860"])
def test_on_loopback_a_server_has_the_names_of_loopback(method: str, port: str) -> None:
    assert {asked(local(), method, host=name + port) for name in OWN} == {200}
    assert {asked(local(), method, host=name + port) for name in FOREIGN} == {421}
    assert {asked(everywhere(), method, host=name + port) for name in (*OWN, *FOREIGN)} == {200}


@pytest.mark.parametrize("host", ["[", "localhost:port", "localhost@evil.example", ":80", "[::1"])
def test_a_host_that_is_none(host: str) -> None:
    assert asked(local(), "GET", host=host) in (421, 200 if host == "localhost@evil.example" else 421)
    assert asked(local(), "GET") == 200  # HTTP/1.0: no browser


def test_a_name_that_the_host_allows() -> None:
    guard = local(names=["Lab.School.example"])
    assert asked(guard, host="lab.school.example", origin="http://lab.school.example") == 200
    assert (
        asked(guard, host="127.0.0.1:7860", origin="http://lab.school.example") == 200
    )  # renamed by a proxy
    assert asked(guard, host="evil.example") == 421


@pytest.mark.parametrize("make", [local, everywhere])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program
        ({"sec_fetch_site": "same-origin", "origin": "http://127.0.0.1:7860"}, 200),
        (
            {"sec_fetch_site": "same-origin", "origin": "https://behind.a.proxy"},
            200,
        ),  # the browser knows better
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:7860"}, 403),
        ({"sec_fetch_site": "same-site", "origin": "http://127.0.0.1:8000"}, 403),
        ({"sec_fetch_site": "anything"}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://evil.example:7860"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://["}, 403),
    ],
)
def test_only_pages_of_ours_may_post(make: Any, method: str, headers: dict[str, str], status: int) -> None:
    assert asked(make(), method, host="127.0.0.1:7860", **headers) == status
    assert asked(make(), "GET", host="127.0.0.1:7860", **headers) == 200  # nothing is changed by reading


def test_a_proxy_may_leave_the_port_out() -> None:
    assert asked(local(), host="127.0.0.1", origin="http://127.0.0.1:8080") == 200
    assert asked(everywhere(), host="lab.example", origin="https://lab.example") == 200
    assert asked(everywhere(), host="lab.example:443", origin="https://lab.example") == 200
    assert asked(everywhere(), host="lab.example:443", origin="http://lab.example") == 403


def test_pages_that_may_call() -> None:
    foreign = {"host": "127.0.0.1:8000", "origin": "http://page.example", "sec_fetch_site": "cross-site"}
    assert asked(local(origins=["http://page.example"]), **foreign) == 200
    assert asked(local(origins=["*"]), **foreign) == 200
    assert asked(local(origins=["http://other.example"]), **foreign) == 403


@pytest.mark.parametrize("name", ["COLAB_RELEASE_TAG", "JUPYTERHUB_SERVICE_PREFIX"])
def test_where_the_browser_is_elsewhere_any_name_is_right(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "something")
    assert asked(local(), host="x-colab.googleusercontent.com", sec_fetch_site="same-origin") == 200
    assert asked(local(), host="x-colab.googleusercontent.com", sec_fetch_site="cross-site") == 403


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "::1", "[::1]", "127.255.0.1", "a.localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "local", "127.0.0.1.example")))
