"""Contrast of the colours, by the formula of WCAG 2, and hues that colour-blind people can tell apart."""

from __future__ import annotations

import itertools
import re

import pytest

from labkit.views import style
from labkit.views.assets import asset

CSS = asset("live_feed.css")
# Linear RGB as people see it who lack one kind of cone (Viénot, Brettel and Mollon 1999).
BLIND = {
    "protan": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deutan": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


def variables(theme: str) -> dict[str, str]:
    root, dark = re.findall(r"(?:^:root|^\.dark) \{(.*?)\n\}", CSS, re.S | re.M)
    found = dict(re.findall(r"--lk-([a-z-]+): (#[0-9a-f]{6})", root))
    return found | dict(re.findall(r"--lk-([a-z-]+): (#[0-9a-f]{6})", dark)) if theme == "dark" else found


def linear(color: str) -> list[float]:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(color), strict=True))

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_edges_are_seen(theme: str) -> None:
    colors = variables(theme)
    for text in ("ink", "muted", "bad", "accent"):
        for ground in ("paper", "ground"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    assert contrast(colors["accent-ink"], colors["accent"]) >= 4.5
    assert contrast(colors["ink"], colors["soft"]) >= 4.5
    for mark in ("edge", "usage", "waiting"):  # of controls, and what is drawn
        assert contrast(colors[mark], colors["paper"]) >= 3, mark


@pytest.mark.parametrize("kind", [None, *BLIND])
def test_neighbours_in_the_palette_differ(kind: str | None) -> None:
    def seen(color: str) -> list[float]:
        rgb = linear(color)
        if kind:
            rgb = [sum(w * c for w, c in zip(row, rgb, strict=True)) for row in BLIND[kind]]
        return [max(0.0, c) ** (1 / 2.2) for c in rgb]

    cycle = [*style.PALETTE, style.PALETTE[0]]
    for one, other in itertools.pairwise(cycle):
        apart = sum((a - b) ** 2 for a, b in zip(seen(one), seen(other), strict=True)) ** 0.5
        assert apart > 0.12, (kind, one, other, apart)


def test_the_contrast_formula() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
