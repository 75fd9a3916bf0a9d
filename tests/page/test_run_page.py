"""A run as one file in a real browser, without a network: it tells what the replay tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import labkit
from labkit.page.replay_tab import build_replay_tab
from labkit.trace.trace import Trace
from labkit.views import run_page
from tests.tabs import HOSTILE, Looker, Person, browser, served  # noqa: F401
from tests.views.stories import busy, draft_story, run, sent, story

TRACES = {
    "busy": busy(),
    "story": story(),
    "drafts": draft_story(),
    "sent": sent(busy()),
    "sent, no clock": sent(story()),
    "hostile": run([(0, HOSTILE, 5, 3), (0, "</script><!--\u2028b", 6, 9)]),
    "long": run([(0, str(i), 9, 70 + i) for i in range(3)], num_blocks=99),  # more steps than travel at once
    "no clock, many pages": run([(0, str(i), 3 + 5 * i, 9) for i in range(6)], num_blocks=6000),
}
# All that the replay says in words, for those who do not see its pictures.
TOLD = """() => {
  const root = document.querySelector(".lkr"), find = (name) => [...root.querySelectorAll(name)];
  const words = ".lkr-headline, .lkr-where, .lkr-now, h2, figcaption p, .lkr-legend li, .lkr-lists figure";
  return [...find(words).map((element) => element.innerText),
    ...find("canvas[data-picture]").map((canvas) => `${canvas.role} ${canvas.ariaLabel}`),
    ...find(".lkr-transport *").map((it) => `${it.ariaLabel} ${it.title} ${it.ariaValueText}`)];
}"""


class Reader(Person):
    """A person who opens a page from a disk, with the network off. `asked` is what the page asks for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:  # noqa: F811
        super().__init__(browser.new_context(offline=True, **options))
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def at(self, step: int, frame: Any = None) -> None:
        """Wait until a step is on show."""
        (frame or self.page).wait_for_selector(f'.lkr[data-drawn="{step}"]')


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{i}.html" for i, name in enumerate(TRACES)}
    for name, path in paths.items():
        labkit.export_html(TRACES[name], path, title=f"{name}: {HOSTILE}")
    return paths


@pytest.fixture
def read(browser: Any, files: dict[str, Path]) -> Iterator[Callable[..., Reader]]:  # noqa: F811
    people: list[Reader] = []

    def arrive(name: str, **options: Any) -> Reader:
        people.append(Reader(browser, files[name], **options))
        people[-1].at(TRACES[name][0].step)
        return people[-1]

    yield arrive
    for person in people:
        person.context.close()
    assert [problem for person in people for problem in person.problems] == []
    assert all(url.startswith("file:") for person in people for url in person.asked)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(lambda: build_replay_tab(lambda: TRACES)) as address:
        yield address


@pytest.mark.parametrize("name", [name for name in TRACES if name != "long"])
def test_it_says_at_every_step_what_the_replay_says(
    name: str,
    read: Callable[..., Reader],
    browser: Any,  # noqa: F811
    address: str,
) -> None:
    me, other = read(name), Looker(browser, address, "replay")
    other.page.select_option(".lkr-source", f"s:{name}")
    trace = TRACES[name]
    other.until(
        "it.data()?.count === arg[0] && it.data().lanes.length === arg[1]", [len(trace), lanes(trace)]
    )
    other.page.click(".lkr-first")
    for record in trace:
        if record is not trace[0]:
            me.page.keyboard.press("ArrowRight")  # without a click before it
            other.page.click(".lkr-forward")
        me.at(record.step)
        other.page.wait_for_selector(f'.lkr[data-drawn="{record.step}"]')
        assert me.page.evaluate(TOLD) == other.page.evaluate(TOLD)
    assert other.problems == []
    other.context.close()
    assert (
        me.page.locator("img, script[src], .lkr b").count() == 0 and me.page.evaluate("window.hacked") is None
    )
    assert me.page.inner_text("h1") == me.page.title() == f"{name}: {HOSTILE}"
    assert me.asked == [me.page.url]


def lanes(trace: Trace) -> int:
    return len({arrival.request_id for record in trace for arrival in record.arrived})


def test_what_processes_send_has_a_strip_and_words(read: Callable[..., Reader]) -> None:
    height = "document.querySelector('[data-picture=meters]').clientHeight"
    label = "document.querySelector('[data-picture=meters]').ariaLabel"
    me, other, timeless = read("sent"), read("busy"), read("sent, no clock")
    record, first = TRACES["sent"][0], TRACES["sent, no clock"][0]
    per_layer, elsewhere = record.sent_in_layers, record.sent_elsewhere
    words = f"each process sent {per_layer} bytes in layers, {elsewhere} bytes elsewhere"
    words += ", 2.50 ms (25% of the step)."
    assert per_layer == 800 and me.page.inner_text(".lkr-now").endswith(words)
    assert me.page.evaluate(label).endswith("; communication: 25%")
    assert timeless.page.inner_text(".lkr-now").endswith(
        f"{first.sent_in_layers} bytes in layers, {first.sent_elsewhere} bytes elsewhere."
    )
    assert timeless.page.evaluate(label).endswith("; communication: 0%")
    assert "sent" not in other.page.inner_text(".lkr-now")
    assert "communication" not in other.page.evaluate(label)
    assert (me.page.evaluate(height), other.page.evaluate(height)) == (184, 138)


def test_it_jumps_to_any_step(read: Callable[..., Reader]) -> None:
    me, last = read("long"), TRACES["long"][-1].step
    assert last > 70
    for key, step in (("End", last), ("ArrowLeft", last - 1), ("Home", 0), ("ArrowRight", 1)):
        me.page.keyboard.press(key)
        me.at(step)
        assert me.page.inner_text(".lkr-now").startswith(f"Step {step}: ")
    for step in (50, 31, 32, 64, 63):
        me.page.fill(".lkr-scrub", str(step))
        me.at(step)


def test_all_keys_and_the_pointer(read: Callable[..., Reader]) -> None:
    me, last = read("busy"), TRACES["busy"][-1].step
    for key, step in (
        ("End", last),
        ("ArrowLeft", last - 1),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
    ):
        me.page.keyboard.press(key)
        me.at(step)
    me.page.keyboard.press(" ")
    assert me.page.inner_text(".lkr-play") == "Pause"
    me.page.wait_for_selector('.lkr:not([data-drawn="1"])')
    me.page.keyboard.press(" ")
    assert me.page.inner_text(".lkr-play") == "Play"
    me.page.focus(".lkr-speed")
    me.page.keyboard.press("ArrowDown")  # means the speed, and not the step
    assert me.page.input_value(".lkr-speed") == "20" and me.page.inner_text(".lkr-play") == "Play"
    for picture in ("strip", "meters", "lanes"):
        box = me.page.locator(f'[data-picture="{picture}"]').bounding_box()
        me.page.mouse.click(box["x"] + box["width"] - 10, box["y"] + 20)
        me.page.wait_for_selector('.lkr:not([data-drawn="0"])')
        me.page.mouse.click(box["x"] + 48, box["y"] + 20)
        me.at(0)
    assert me.page.is_hidden(".lkr-bar")  # there is no lab to ask for another trace


def test_it_is_light_or_dark_and_nothing_moves_by_itself(read: Callable[..., Reader]) -> None:
    me = read("busy", color_scheme="light", reduced_motion="reduce")
    painted = "() => document.querySelector('[data-picture=\"lanes\"]').toDataURL()"
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light, paper = me.page.evaluate(painted), me.page.evaluate(ground)
    me.page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    me.page.wait_for_selector("body.dark")
    me.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert me.page.evaluate(painted) != light and me.page.evaluate(ground) != paper
    assert me.page.evaluate("document.getAnimations().length") == 0
    me.at(0)


@pytest.mark.parametrize("width", [320, 800, 1920])
def test_it_fits_any_width(read: Callable[..., Reader], width: int) -> None:
    me = read("hostile", viewport={"width": width, "height": 700})
    assert me.page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_runs_in_the_frame_of_a_learning_platform(
    browser: Any,  # noqa: F811
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    outer = tmp_path / "course.html"
    outer.write_text(
        f'<iframe sandbox="allow-scripts" width=900 height=700 src="{files["story"].as_uri()}"></iframe>'
    )
    me = Reader(browser, outer)
    frame = me.page.frames[1]
    me.at(3, frame)
    frame.click(".lkr-forward")
    me.at(4, frame)
    assert me.problems == [] and len(me.asked) == 2
    me.context.close()


def test_no_other_script_runs_in_it(read: Callable[..., Reader]) -> None:
    me = read("story")
    hack = "Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' })"
    me.page.evaluate(f"document.body.append({hack})")
    assert me.page.evaluate("window.hacked") is None
    assert "Content Security Policy" in me.problems.pop()


def test_without_scripts_it_says_what_it_is(browser: Any, files: dict[str, Path]) -> None:  # noqa: F811
    me = Reader(browser, files["busy"], java_script_enabled=False)
    assert "7 requests in 26 steps" in me.page.inner_text("noscript")
    me.context.close()


def test_the_replay_saves_it(browser: Any, address: str, tmp_path: Path) -> None:  # noqa: F811
    me = Looker(browser, address, "replay")
    me.until("document.querySelector('.lkr').dataset.drawn")
    with me.page.expect_download() as got:
        me.page.click('[data-save="page"]')
    assert got.value.suggested_filename == "labkit.run.html"
    got.value.save_as(tmp_path / "run.html")
    assert (tmp_path / "run.html").read_text() == run_page.page(TRACES["busy"])
    assert me.problems == []
    me.context.close()


def test_the_replay_says_that_a_run_is_too_long(
    browser: Any,  # noqa: F811
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_page, "MAX_BYTES", 10)
    me = Looker(browser, address, "replay")
    me.until("document.querySelector('.lkr').dataset.drawn")
    me.page.click('[data-save="page"]')
    me.until("document.querySelector('.lkr-headline').textContent.startsWith('Not saved: trace is too long')")
    me.context.close()
