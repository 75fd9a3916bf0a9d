"""The projector view: the address by which others join, its QR code, and the view itself in a browser."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import segno
from hypothesis import given
from hypothesis import strategies as st

from labkit.page import joining
from labkit.page.joining import Joining, Served, address_of, lan_address, qr_code
from labkit.page.session import Lab
from labkit.sampling_params import SamplingParams
from tests.visiting import FIND, HOSTILE, Visitor

pytest_plugins = ["tests.visiting_fixtures"]

EVERYWHERE = Served("0.0.0.0", "http://0.0.0.0:7860/")
SHARED = Served("127.0.0.1", "http://127.0.0.1:7860/", "https://abc.gradio.live")
ALONE = Served("127.0.0.1", "http://127.0.0.1:7860/")
LOCAL = ("http://127.0.0.1:7860/", "http://localhost:7860/", "http://0.0.0.0:7860/", "http://[::1]:7860/")
LONG = SamplingParams(max_tokens=250, ignore_eos=True)


# -- the address ----------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "lan_address", lambda: "192.168.178.21")


@pytest.mark.parametrize("shown", [*LOCAL, "", "nonsense", "http://[", "http://a:99999/"])
def test_an_address_of_this_machine_alone_is_never_shown(network: None, shown: str) -> None:
    assert address_of(shown, EVERYWHERE) == "http://192.168.178.21:7860"
    assert address_of(shown, Served("::", "https://[::]:7861/")) == "https://192.168.178.21:7861"
    assert address_of(shown, SHARED) == address_of(
        shown, EVERYWHERE._replace(share_url=SHARED.share_url + "/")
    )
    assert address_of(shown, SHARED) == "https://abc.gradio.live"
    assert address_of(shown, ALONE) == address_of(shown, Served()) == ""
    assert joining.joining(shown, ALONE) == Joining("", 0, "")


@pytest.mark.parametrize(
    ("shown", "address"),
    [
        ("http://10.0.0.5:7860/?host=secret&view=projector#x", "http://10.0.0.5:7860"),
        ("https://me:word@lab.example.org/class/", "https://lab.example.org/class"),
        ("http://[fd00::5]:7860/", "http://[fd00::5]:7860"),
    ],
)
@pytest.mark.parametrize("served", [EVERYWHERE, SHARED, ALONE, Served()])
def test_the_address_in_the_browser_goes_before_all_others(
    network: None, shown: str, address: str, served: Served
) -> None:
    assert address_of(shown, served) == address


@pytest.mark.parametrize(
    "shown",
    [
        "javascript:alert(1)",
        "file://host/x",
        'http://a"><img src=x>/',
        f"http://a/{HOSTILE}",
        "http://a/" + "x" * 300,
    ],
)
def test_what_is_no_plain_address_is_left_out(shown: str) -> None:
    assert address_of(shown, SHARED) == SHARED.share_url


@given(st.text(max_size=300) | st.text("htps:/[]@.#?:0a%", max_size=40).map("http://".__add__))
def test_anything_may_be_asked(shown: str) -> None:
    assert re.fullmatch(r"https?://[\w.:\[\]/~-]+", address_of(shown, SHARED), re.ASCII)


def test_without_a_way_out_the_machine_asks_its_own_network_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise OSError("Network is unreachable")

    def card(address: str, family: int = socket.AF_INET) -> SimpleNamespace:
        return SimpleNamespace(address=address, family=family)

    cards = {"lo": [card("127.0.0.1")], "wlan0": [card("fe80::1", socket.AF_INET6), card("10.42.0.1")]}
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(joining.psutil, "net_if_addrs", lambda: cards)
    assert lan_address() == "10.42.0.1"
    monkeypatch.setattr(joining.psutil, "net_if_addrs", lambda: {"lo": cards["lo"]})
    assert lan_address() == ""


# -- the code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["http://10.0.0.5:7860", "https://" + "x" * (joining.LONGEST - 8)])
def test_the_code_is_that_of_the_address(address: str) -> None:
    size, path = qr_code(address)
    assert modules(path) == dark(address) and size == len(segno.make(address, error="m", micro=False).matrix)
    assert re.fullmatch(r"(M\d+ \d+h1v1h-1z)+", path), "nothing but squares"
    assert modules(path) != dark(address[:-1] + "1")


def modules(path: str) -> set[tuple[int, int]]:
    return {(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)}


def dark(address: str) -> set[tuple[int, int]]:
    rows = segno.make(address, error="m", micro=False).matrix
    return {(x, y) for y, row in enumerate(rows) for x, module in enumerate(row) if module}


# -- in a browser ---------------------------------------------------------------------------------

# What is cut off at the window's edge.
OUTSIDE = """\
[...document.querySelectorAll("#lk-live :is(figure, canvas[role], .lk-pause), .lk-join, .lk-join svg")]
  .filter((e) => {
    if (e.matches(".lk-far")) return false; // there is no other pool
    const { width, left, top, right, bottom } = e.getBoundingClientRect();
    return width < 40 || left < 0 || top < 0 || right > innerWidth || bottom > innerHeight;
  }).map((e) => e.outerHTML.slice(0, 80))"""
SMALLEST = """\
Math.min(...[...document.querySelectorAll("#lk-live :is(button, h2, li, select), .lk-join :is(b, a)")]
  .filter((e) => e.offsetParent)
  .map((e) => parseFloat(getComputedStyle(e).fontSize) * (e.currentCSSZoom ?? 1)))"""
# The words at the rows of the timeline, which are what it writes last.
ROWS = """(() => {
  const words = [], canvas = document.querySelector("[data-picture=timeline]"), ctx = canvas.getContext("2d");
  const pen = new Proxy(ctx, {
    get: (it, key) => {
      if (key === "fillText") return (text) => words.push(text);
      return typeof it[key] === "function" ? it[key].bind(it) : it[key];
    },
    set: (it, key, value) => { it[key] = value; return true; },
  });
  const theme = lab.themeOf(document.querySelector(".lk"), lab.state);
  lab.drawTimeline(pen, lab.state, theme, canvas.clientWidth, canvas.clientHeight);
  return words.slice(-lab.state.lanes.size);
})()"""
# Where on the screen a page is, and its number.
POINTED = """(() => {
  const canvas = document.querySelector("[data-picture=pages]");
  const { left, top, width } = canvas.getBoundingClientRect(), zoom = width / canvas.clientWidth;
  const grid = lab.blockGrid(lab.state, canvas.clientWidth, canvas.clientHeight), { columns, size } = grid;
  return [left + zoom * (grid.left + 2.5 * size), top + zoom * (grid.top + 1.5 * size), columns + 2];
})()"""

# Remembers for each token that flies the page where it ends, and the pages into which tokens went.
FOLLOW = """
const pages = document.querySelector("[data-picture=pages]");
window.flown = [];
new MutationObserver((changes) => {
  const { left, top, width } = pages.getBoundingClientRect(), zoom = width / pages.clientWidth;
  for (const dot of changes.flatMap(({ addedNodes }) => [...addedNodes])) {
    if (dot.className !== "lk-flying") continue;
    const { e, f } = new DOMMatrix(dot.getAnimations()[0].effect.getKeyframes()[1].transform);
    const place = [(e + 4 - left) / zoom, (f + 4 - top) / zoom];
    const page = lab.blockAt(lab.state, pages.clientWidth, pages.clientHeight, ...place);
    window.flown.push([page, lab.state.landed.map(({ block }) => block)]);
  }
}).observe(document.body, { childList: true });
"""


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(1280, 800, "light"), (1920, 1080, "dark")], ids=["1280", "1920"]
)
def test_a_room_sees_the_pictures_and_how_to_join(
    come: Callable[..., Visitor],
    house: tuple[Lab, str],
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    height: int,
    scheme: Any,
) -> None:
    monkeypatch.setattr(joining, "_EVERYWHERE", ("0.0.0.0", "127.0.0.1"))  # as with --host 0.0.0.0
    monkeypatch.setattr(joining, "lan_address", lambda: "192.168.178.21")
    address = f"http://192.168.178.21:{house[1].rpartition(':')[2]}"
    host = come(f"?host={lab.host_key}&ask=nothing", width=width, height=height, color_scheme=scheme)
    host.page.click(".lk-project")
    host.page.wait_for_selector(".lk-join svg")
    try:
        assert host.page.locator(".lk-join-address").evaluate("(it) => it.textContent") == address
        assert host.page.get_by_role("img", name=f"QR code of {address}").is_visible()
        assert modules(host.page.locator(".lk-join path").get_attribute("d")) == dark(address)
        assert "view=projector" in host.page.url and "ask=nothing" in host.page.url
        assert lab.host_key not in host.page.url + host.page.locator("#lk-projector").inner_html()
        for gone in (".lk-title", "#lk-form", "#lk-requests", "#lk-side", ".lk-host", ".tab-wrapper"):
            assert host.page.locator(gone).first.is_hidden(), gone

        lab.session.live.speed = 5
        for name in ("Ada", "<b>Bob</b>", "A name that is far too long for a row", ""):
            lab.session.submissions.inject("", "hello", LONG, name=name)
        host.until("lab.state.tables.length === 4 && lab.state.step > 2")
        who = lab.visitors.arrive("another tab")
        lab.visitors.rename(who, "Chi")
        lab.control(who, "pause")
        host.page.wait_for_selector(".lk-paused-by >> text=by Chi")
        assert host.look(OUTSIDE) == [] and host.look(SMALLEST) >= height / 45
        assert host.look("document.documentElement.scrollHeight <= innerHeight")
        ada, bob, long, none = host.look(ROWS)
        assert ada.startswith("Ada ") and bob.startswith("<b>Bob</b> ") and none.isdigit()
        assert long.startswith("A name that") and "\u2026" in long
        assert host.page.locator("#lk-page b >> text=Bob").count() == 0
        x, y, block = host.look(POINTED)
        host.page.mouse.move(x, y)
        host.until("lab.state.hover.block === it", block)

        host.page.reload()
        host.page.wait_for_selector(".lk-join svg")
        host.page.keyboard.press("Escape")
        host.page.wait_for_selector("#lk-form >> visible=true")
        assert "view" not in host.page.url and host.page.locator(".lk-join").is_hidden()
        host.page.click(".lk-project")
        host.page.click(".lk-join-back a")
        host.page.wait_for_selector(".lk-host >> visible=true")
        assert not host.look(ROWS)[0].startswith("Ada")
    finally:
        lab.session.live.resume()


def test_a_token_flies_into_its_page_on_a_projector_too(come: Callable[..., Visitor], lab: Lab) -> None:
    pupil = come("?view=projector", width=1280, height=800)
    pupil.page.evaluate(f"() => {{ {FIND} {FOLLOW} }}")
    lab.session.live.speed = 2
    lab.session.submissions.inject("", "hello", LONG)
    pupil.until("window.flown.length >= 3")
    assert all(page in landed for page, landed in pupil.look("window.flown"))


def test_a_lab_that_only_this_machine_can_open_says_so(come: Callable[..., Visitor]) -> None:
    pupil = come("?view=projector", width=1280, height=800)
    pupil.page.wait_for_selector(".lk-join-none >> visible=true")
    assert pupil.page.locator(".lk-join svg").count() == 0 and "127.0.0.1" not in pupil.page.inner_text(
        ".lk-join"
    )
