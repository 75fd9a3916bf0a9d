"""A sheet of paper for the pictures of ideas: boxes, words, lines and arrows, as an SVG with a text twin.

A notebook shows an SVG on whatever page it lies, and some pages take styles away. So a sheet has a background
of its own and every shape says its colour itself, for a light page; the style that turns them for a dark one
names only classes of this file, because a page shares its styles among all pictures on it.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from labkit.views.style import FAINT_INK, FREE, INK, PALETTE, PAPER, tint

WIDTH = 720
MARGIN = 20
_DARK = {"paper": "#1B1E26", "ink": "#E8EAF0", "faint": "#A9B0BF", "empty": "#383E4C"}
_LIGHT = {"paper": PAPER, "ink": INK, "faint": FAINT_INK, "empty": FREE}
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"


class Drawing:
    """A drawing holds an SVG and the same facts as text.

    Args:
        svg: the picture, which a notebook and a repository's web page show.
        twin: the text that a plain terminal shows.
    """

    def __init__(self, svg: str, twin: str) -> None:
        self.svg, self.twin = svg, twin

    def __repr__(self) -> str:
        return self.twin

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/svg+xml": self.svg, "text/plain": self.twin}


class Sheet:
    """A sheet takes shapes one after the other; x goes right and y goes down, in pixels.

    A colour is the number of one of the palette (mostly a request's), or "ink", "faint", "empty" or "paper".
    """

    def __init__(self, title: str, height: float) -> None:
        self.title, self.height = title, height
        self._parts: list[str] = []
        self.text(MARGIN, 30, title, size=16, bold=True)

    def text(
        self,
        x: float,
        y: float,
        words: object,
        *,
        size: float = 13,
        color: str = "ink",
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        """Write words with their foot at y, and their start, middle or end (`anchor`) at x."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text class="lk-{color}" fill="{_LIGHT[color]}" x="{_px(x)}" y="{_px(y)}" '
            f'font-size="{_px(size)}"{weight} text-anchor="{anchor}">{escape(str(words))}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: object = "",
        *,
        color: int | str = "empty",
        size: float = 13,
        bold: bool = False,
        dashed: bool = False,
    ) -> None:
        """Draw a box with words in its middle. One of a palette's colour has an edge."""
        look = f'class="lk-{color}" fill="{_LIGHT[color]}"' if isinstance(color, str) else _of_palette(color)
        edge = ' class="lk-edge" fill="none" stroke="' + FAINT_INK + '" stroke-dasharray="3 3"'
        self._parts.append(
            f'<rect {edge if dashed else look} x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" '
            f'height="{_px(height)}" rx="3"/>'
        )
        if words != "":
            self.text(
                x + width / 2, y + height / 2 + 0.36 * size, words, size=size, bold=bold, anchor="middle"
            )

    def line(
        self,
        *points: tuple[float, float],
        color: int | str = "faint",
        width: float = 1.5,
        dashed: bool = False,
    ) -> None:
        """Draw a line through points."""
        stroke = PALETTE[color % len(PALETTE)] if isinstance(color, int) else _LIGHT[color]
        name = "" if isinstance(color, int) else f'class="lk-{color}-line" '
        path = " ".join(f"{_px(x)},{_px(y)}" for x, y in points)
        dashes = ' stroke-dasharray="3 3"' if dashed else ""
        self._parts.append(
            f'<polyline {name}points="{path}" fill="none" stroke="{stroke}" stroke-width="{_px(width)}"'
            f"{dashes}/>"
        )

    def arrow(self, *points: tuple[float, float], color: int | str = "faint", width: float = 1.5) -> None:
        """Draw a line through points with a head at its end."""
        (x0, y0), (x, y) = points[-2:]
        size, length = 5 + 1.5 * width, ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = size * (x - x0) / length, size * (y - y0) / length
        self.line(*points[:-1], (x - dx, y - dy), color=color, width=width)
        corners = (x, y), (x - dx - dy / 2, y - dy + dx / 2), (x - dx + dy / 2, y - dy - dx / 2)
        path = " ".join(f"{_px(a)},{_px(b)}" for a, b in corners)
        self._parts.append(f'<polygon {_solid(color)}points="{path}"/>')

    def dot(self, x: float, y: float, *, color: int | str = "ink", radius: float = 4) -> None:
        """Draw a small disc."""
        self._parts.append(f'<circle {_solid(color)}cx="{_px(x)}" cy="{_px(y)}" r="{_px(radius)}"/>')

    def drawing(self, *twin: str) -> Drawing:
        """Return the finished picture; its twin is the title and these lines."""
        text = "\n".join([self.title, "", *twin])
        body = "\n".join(self._parts)
        return Drawing(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{_px(self.height)}" '
            f'viewBox="0 0 {WIDTH} {_px(self.height)}" role="img" font-family="{_FONT}">\n'
            f"<title>{escape(self.title)}</title>\n<desc>{escape(text)}</desc>\n<style>{_STYLE}</style>\n"
            f'<rect class="lk-paper" fill="{PAPER}" width="{WIDTH}" height="{_px(self.height)}" rx="8"/>\n'
            f"{body}\n</svg>",
            text,
        )


def _px(number: float) -> str:
    """Write a length to a tenth of a pixel: finer ones are rounded in other ways on other machines."""
    return f"{round(number, 1) + 0.0:g}"


def _solid(color: int | str) -> str:
    """Return the colour of a shape without an edge; one of the palette is the same on any page."""
    if isinstance(color, int):
        return f'fill="{PALETTE[color % len(PALETTE)]}" '
    return f'class="lk-{color}" fill="{_LIGHT[color]}" '


def _of_palette(number: int) -> str:
    number %= len(PALETTE)
    color = PALETTE[number]
    return f'class="lk-{number}" fill="{tint(color, 0.35)}" stroke="{color}" stroke-width="1.2"'


def _shade(color: str, share: float) -> str:
    """Mix a hex colour with the dark paper, so that `share` of it is left."""
    pairs = zip(
        *([int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in (color, _DARK["paper"])), strict=True
    )
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02X}" for a, b in pairs)


_STYLE = (
    "@media (prefers-color-scheme: dark) {"
    + "".join(f".lk-{name}{{fill:{color}}}.lk-{name}-line{{stroke:{color}}}" for name, color in _DARK.items())
    + f".lk-edge{{stroke:{_DARK['faint']}}}"
    + "".join(f".lk-{i}{{fill:{_shade(color, 0.5)}}}" for i, color in enumerate(PALETTE))
    + "}"
)


# -- how wide words are ---------------------------------------------------------------------------

_NARROW, _WIDE = " .,:;'|!ijlI", "mwMW@%½—→"


def width_of(words: str, size: float = 13, *, bold: bool = False) -> float:
    """Return about how many pixels words take: never less than in DejaVu Sans, a wide font."""

    def share(char: str) -> float:
        if char in _NARROW:
            return 0.38
        if char in _WIDE:
            return 1.0
        if char.isupper():
            return 0.74
        return 0.45 if char in "frt()[]{}-/" else 0.65

    return size * sum(map(share, words)) * (1.12 if bold else 1)
