"""The pictures of ideas are sound SVG, say what their twins say, and put words where there is room."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.notebook import pictures
from labkit.notebook.pictures import Drawing, Point
from labkit.notebook.pictures.svg import WIDTH, Sheet, width_of
from tests.visiting import SWITCHES, chromium


def measured_roofline() -> Drawing:
    """Points as near to each other as rungs of a ladder are."""
    rates = (6e9, 14e9, 47e9, 47.1e9, 54e9, 54.2e9, 53e9, 126e9, 145e9, 270e9)
    points = [Point(8.2 - 0.3 * (i > 1), rate, f"rung {i}") for i, rate in enumerate(rates)]
    return pictures.roofline("This machine", 41.7e9, 206e9, points)


DRAW: dict[str, Callable[[], Drawing]] = {
    name: getattr(pictures, name)
    for name in pictures.__all__
    if name not in ("Drawing", "Point", "roofline")
} | {"roofline": measured_roofline}  # fmt: skip
each_picture = pytest.mark.parametrize("name", DRAW)
DRAWN: dict[str, Drawing] = {}


def drawn(name: str) -> Drawing:
    if name not in DRAWN:
        DRAWN[name] = DRAW[name]()
    return DRAWN[name]


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right - 0.5
            and other.left < self.right - 0.5
            and self.top < other.bottom - 0.5
            and other.top < self.bottom - 0.5
        )

    def holds(self, other: Box) -> bool:
        return (
            self.left <= other.left + 0.5
            and self.top <= other.top + 0.5
            and self.right >= other.right - 0.5
            and self.bottom >= other.bottom - 0.5
        )


def parts(svg: str, kind: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f"{{http://www.w3.org/2000/svg}}{kind}")


def words_of(svg: str) -> dict[str, Box]:
    """All words of a picture, each with an estimate of where it is, from capitals to the foot of the line."""
    found = {}
    for i, text in enumerate(parts(svg, "text")):
        x, y, size = (float(text.attrib[key]) for key in ("x", "y", "font-size"))
        width = width_of(text.text or "", size, bold="font-weight" in text.attrib)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.attrib["text-anchor"]]
        found[f"{i}: {text.text}"] = Box(left, y - 0.75 * size, left + width, y)
    return found


def boxes_of(svg: str) -> list[Box]:
    found = []
    for rect in parts(svg, "rect"):
        x, y = (float(rect.attrib.get(key, 0)) for key in "xy")
        found.append(Box(x, y, x + float(rect.attrib["width"]), y + float(rect.attrib["height"])))
    return found


def crowded(words: dict[str, Box], boxes: list[Box]) -> list[str]:
    """What is wrong with the places of words: outside of the paper, on top of others, or across an edge."""
    paper, *boxes = boxes
    faults = [f"{word} leaves the paper" for word, box in words.items() if not paper.holds(box)]
    for (one, here), (other, there) in itertools.combinations(words.items(), 2):
        if here.meets(there):
            faults.append(f"{one} lies on {other}")
    for word, box in words.items():
        for edge in boxes:
            if edge.meets(box) and not edge.holds(box):
                faults.append(f"{word} crosses the edge of {edge}")
    return faults


@each_picture
def test_words_have_room(name: str) -> None:
    svg = drawn(name).svg
    assert crowded(words_of(svg), boxes_of(svg)) == []


def test_words_without_room_are_noticed() -> None:
    sheet = Sheet("A title", 100)
    sheet.box(20, 40, 60, 20, "too long for it")
    sheet.text(600, 90, "it goes on and on, over the edge of the paper")
    svg = sheet.drawing().svg
    assert len(crowded(words_of(svg), boxes_of(svg))) == 2


@each_picture
def test_the_twin_says_the_same_numbers(name: str) -> None:
    def numbers(text: str) -> Counter[str]:
        return Counter(re.findall(r"\d[\d,.]*\d|\d", text))

    told = drawn(name)
    shown = numbers(" ".join(text.text or "" for text in parts(told.svg, "text")))
    assert set(shown) <= set(numbers(told.twin)), set(shown) - set(numbers(told.twin))
    (title,) = parts(told.svg, "title")
    (description,) = parts(told.svg, "desc")
    assert told.twin.startswith(f"{title.text}\n\n") and len(told.twin.splitlines()) > 4
    assert description.text == told.twin == repr(told)
    assert told._repr_mimebundle_() == {"image/svg+xml": told.svg, "text/plain": told.twin}


@each_picture
def test_a_picture_is_the_same_each_time(name: str) -> None:
    assert DRAW[name]().svg == drawn(name).svg


@each_picture
def test_it_can_be_read_on_a_light_and_on_a_dark_page(name: str) -> None:
    svg = drawn(name).svg
    (style,) = parts(svg, "style")
    named = set(re.findall(r"\.([\w-]+)\{", style.text or ""))
    assert named and all(name.startswith("lk-") for name in named), "a page shares its styles"
    assert set(re.findall(r"[^{}]+(?=\{fill)", style.text or "")) <= {f".{name}" for name in named}
    paper = parts(svg, "rect")[0]
    assert float(paper.attrib["width"]) == WIDTH and paper.attrib["class"] == "lk-paper"
    for kind in ("text", "rect", "polyline", "polygon", "circle"):
        for part in parts(svg, kind):
            assert "fill" in part.attrib, "where styles are taken away, it is drawn for a light page"
            turns = part.attrib.get("class")
            assert turns is None or turns in named
            assert turns or kind in ("polyline", "polygon", "circle"), "words and boxes turn dark"


@given(
    st.lists(st.tuples(st.floats(0.01, 5000), st.floats(1e6, 1e15)), min_size=1, max_size=10),
    st.floats(1e9, 5e12),
    st.floats(1e9, 2e15),
)
def test_any_machine_and_any_points_fit_a_roofline(
    points: list[tuple[float, float]], bandwidth: float, peak: float
) -> None:
    drawing = pictures.roofline("Any", bandwidth, peak, [Point(*point, "a point") for point in points])
    paper, *_ = boxes_of(drawing.svg)
    assert all(paper.holds(box) for box in words_of(drawing.svg).values())
    for part in parts(drawing.svg, "circle"):
        x, y = float(part.attrib["cx"]), float(part.attrib["cy"])
        assert paper.left <= x <= paper.right and paper.top <= y <= paper.bottom


@pytest.mark.parametrize(
    ("bandwidth", "peak", "rate"), [(0, 1, 1), (1, -1, 1), (1, 1, 0), (float("nan"), 1, 1)]
)
def test_a_roofline_of_nothing_is_refused(bandwidth: float, peak: float, rate: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        pictures.roofline("None", bandwidth, peak, [Point(1, rate, "a point")])


MEASURE = """svg => [...svg.querySelectorAll("text")].map(text => {
  const box = text.getBBox();
  return [text.textContent, box.x, box.width];
})"""


def test_a_browser_needs_no_more_room_for_words_than_was_thought() -> None:
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        page = browser.new_page()
        for name in DRAW:
            svg = drawn(name).svg
            page.set_content(svg)
            seen: list[Any] = page.eval_on_selector("svg", MEASURE)
            for (words, left, width), box in zip(seen, words_of(svg).values(), strict=True):
                assert width <= box.right - box.left + 0.5, f"{name}: {words}"
                assert left >= box.left - 1.5
        browser.close()
