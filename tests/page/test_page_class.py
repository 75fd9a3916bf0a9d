"""The page in a real browser: a class that uses it, and how it looks."""

from __future__ import annotations

from collections.abc import Callable

from labkit.page.session import Lab
from tests.visiting import FIND, HOSTILE, Visitor
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]


# -- a class --------------------------------------------------------------------------------------


def test_names_and_limits(come: Callable[..., Visitor], lab: Lab) -> None:
    me, other = come(), come()
    lab.session.live.pause()
    me.page.fill(".lk-who-name", "Ada <b>")
    me.page.press(".lk-who-name", "Enter")
    wait_for(lambda: "Ada <b>" in lab.visitors._names.values())
    request_id = me.inject(HOSTILE, max_tokens=4)
    other.page.wait_for_selector(f'.lk-card[data-request="{request_id}"]')
    assert other.card(request_id).locator(".lk-you").inner_text() == "Ada <b>"
    assert me.card(request_id).locator(".lk-you").inner_text() == "yours"
    assert other.page.locator(".lk-card b").count() == 0 and other.look("window.hacked") is None
    me.fill("hello", max_tokens=301)
    me.page.click("#lk-inject")
    me.until("document.querySelector('#lk-message p').textContent.includes('the limit of this lab is 300')")
    for count in (9, 17, 25, 33):
        me.fill("hello", max_tokens=4)
        me.page.click("#lk-inject-8")
        me.until("document.querySelectorAll('.lk-card.lk-mine').length === it", count)
    me.page.click("#lk-inject-8")
    me.until("document.querySelector('#lk-message p').textContent.includes('40 is the limit')")
    assert lab.session.live.num_unfinished == 33


def test_a_reload_loses_nothing(come: Callable[..., Visitor], lab: Lab) -> None:
    lab.visitors.grace = 30
    try:
        me = come()
        lab.session.live.speed = 20
        request_id = me.inject("hello", max_tokens=300)
        me.page.reload()
        me.until("lab?.state.meta && lab.visitor()")
        me.page.wait_for_selector(f'.lk-card.lk-mine[data-request="{request_id}"]')
        assert not lab.session.live.output(request_id).finished
        me.card(request_id).locator(".lk-cancel").click()
        me.finished(request_id, "abort")
    finally:
        lab.visitors.grace = 0.2


# -- looks ----------------------------------------------------------------------------------------


def test_every_control_has_a_name_and_every_canvas_a_text(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come()
    for panel in ("Presets", "Engine", "Prompt"):
        me.page.click(f".lk-what >> text={panel}")
        nameless = me.look(NAMELESS)
        assert nameless == [], panel


NAMELESS = """[...document.querySelectorAll("#lk-page :is(button, input, select, textarea, canvas[role])")]
  .filter((e) => e.offsetParent && !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length
    || e.closest("label"))).map((e) => e.outerHTML.slice(0, 120))"""


def test_a_narrow_screen_cuts_no_name_and_forced_colours_keep_those_of_requests(
    come: Callable[..., Visitor], lab: Lab
) -> None:
    me = come(width=320, height=700, forced_colors="active")
    me.page.wait_for_selector(".lk-numbers dt >> visible=true")
    cut = (
        "[...document.querySelectorAll('.lk-numbers dt')].filter((e) => e.scrollWidth > e.clientWidth).length"
    )
    assert me.look(cut) == 0
    me.finished(me.inject("hello", max_tokens=2))
    square = me.look(
        "getComputedStyle(document.querySelector('.lk-card .lk-name'), '::before').backgroundColor"
    )
    assert square not in ("rgb(255, 255, 255)", "rgb(0, 0, 0)", "rgba(0, 0, 0, 0)")


def test_nothing_jumps_while_it_runs(come: Callable[..., Visitor], lab: Lab) -> None:
    me = come(width=1280, height=800)
    places = (
        "[...document.querySelectorAll('#lk-live figure, .lk-numbers > div, #lk-form')].map((e) => {"
        " const b = e.getBoundingClientRect(); return [b.x, b.y, b.width].map(Math.round); })"
    )
    before = me.look(places)
    lab.session.live.speed = 10
    me.fill("word " * 10, max_tokens=40)
    me.page.click("#lk-inject-8")
    me.until("document.querySelectorAll('.lk-card.lk-mine').length === 8")
    for _ in range(5):
        me.until("lab.state.drawn > it", me.look("lab.state.drawn"))
        assert me.look(places) == before
    lab.session.live.speed = None
    wait_for(lambda: not lab.session.live.num_unfinished)
    me.until("lab.state.owners.size === 0")
    assert me.look(places) == before


def test_a_thousand_pages_and_sixteen_requests_are_drawn_often(
    come: Callable[..., Visitor], lab: Lab, record_property: Callable[[str, object], None]
) -> None:
    lab.change({"num_blocks": 1024, "max_num_seqs": 16})
    me = come()
    lab.session.live.speed = 30
    me.fill("word " * 30, max_tokens=120)
    for _ in range(2):
        me.page.click("#lk-inject-8")
    me.until("lab.state.tables.length > 8")
    frames = me.page.evaluate(
        f"async () => {{ {FIND} const before = lab.state.frames, begin = performance.now();"
        " await new Promise((done) => setTimeout(done, 1500));"
        " return 1000 * (lab.state.frames - before) / (performance.now() - begin); }"
    )
    record_property("frames per second", round(frames, 1))
    print(f"{frames:.1f} frames a second")
    assert frames > 2  # ten where nothing else runs on the machine
