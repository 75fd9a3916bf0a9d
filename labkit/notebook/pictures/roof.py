"""Notebook 07: the roofline, of a GPU on paper or of this machine as measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from labkit.analysis.devices import GPUS
from labkit.analysis.roofline import MODELS, StepWork
from labkit.notebook.pictures.svg import Drawing, Sheet
from labkit.views.style import plural

_LEFT, _RIGHT, _TOP, _BOTTOM = 104.0, 396.0, 66.0, 330.0


class Point(NamedTuple):
    """Something that runs: operations for each byte it moves, operations per second, and its name."""

    intensity: float
    rate: float
    name: str


def roofline(title: str, bandwidth: float, peak: float, points: Sequence[Point]) -> Drawing:
    """Draw what a machine can do at best, on logarithmic axes, and where some points lie below it.

    Args:
        title: the heading.
        bandwidth, peak: bytes and operations per second of the machine.
        points: what runs; they are numbered in the picture, and named beside it.

    Raises:
        ValueError: bandwidth, peak, or a number of a point is not above 0.
    """
    if not all(value > 0 for value in (bandwidth, peak, *(v for p in points for v in p[:2]))):
        raise ValueError("bandwidth, peak, and the intensity and rate of each point must be above 0")
    ridge = peak / bandwidth
    xs, ys = [ridge, *(p.intensity for p in points)], [peak, *(p.rate for p in points)]
    low_x, high_x = math.floor(math.log10(min(xs)) - 0.2), math.ceil(math.log10(max(xs)) + 0.3)
    low_y, high_y = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)) + 0.1)

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x = _LEFT + (math.log10(intensity) - low_x) / (high_x - low_x) * (_RIGHT - _LEFT)
        y = _BOTTOM - (math.log10(rate) - low_y) / (high_y - low_y) * (_BOTTOM - _TOP)
        return round(x, 1), round(y, 1)

    sheet = Sheet(title, 396)
    for power in range(low_x, high_x + 1):
        x, _ = at(10.0**power, 10.0**low_y)
        sheet.line((x, _TOP), (x, _BOTTOM), color="empty", width=1)
        sheet.text(x, _BOTTOM + 16, _short(10.0**power), size=11, color="faint", anchor="middle")
    for power in range(low_y, high_y + 1):
        _, y = at(10.0**low_x, 10.0**power)
        sheet.line((_LEFT, y), (_RIGHT, y), color="empty", width=1)
        sheet.text(_LEFT - 6, y + 4, _rate(10.0**power), size=11, color="faint", anchor="end")
    start = max(10.0**low_x, 10.0**low_y / bandwidth)
    sheet.line(at(start, start * bandwidth), at(ridge, peak), color=5, width=2.5)
    sheet.line(at(ridge, peak), at(10.0**high_x, peak), color=0, width=2.5)
    below = "operations for each byte that is moved"
    sheet.text(_LEFT, _BOTTOM + 36, below, size=12, color="faint")

    x, y = 420.0, 82.0
    sheet.text(x, y, f"slope: {bandwidth / 1e9:,.0f} GB/s of memory")
    sheet.text(x, y + 18, f"roof: {_rate(peak)}")
    sheet.text(x, y + 36, f"they meet at {_short(ridge)} a byte")
    twin = [
        f"across, {below}: " + ", ".join(_short(10.0**power) for power in range(low_x, high_x + 1)),
        "up: " + ", ".join(_rate(10.0**power) for power in range(low_y, high_y + 1)),
        f"slope: {bandwidth / 1e9:,.0f} GB/s of memory; roof: {_rate(peak)}; they meet at {_short(ridge)}",
    ]
    y += 64
    places = [at(point.intensity, point.rate) for point in points]
    for number, (px, py), (left, foot) in zip(
        range(1, 1 + len(points)), places, _labels(places), strict=True
    ):
        sheet.line((left + 2, foot - 4), (px, py), color="faint", width=1)
        sheet.dot(px, py, radius=3.5)
        sheet.text(left, foot, number, size=11, bold=True, anchor="end")
    for number, point in enumerate(points, 1):
        share = point.rate / min(peak, point.intensity * bandwidth)
        told, numbers = f"{number}  {point.name}", f"{_short(point.intensity)} a byte, {_rate(point.rate)}"
        if share < 0.995:
            numbers += f", {share:.0%} of its roof"
        sheet.text(x, y, told, size=12, bold=True)
        sheet.text(x + 14, y + 15, numbers, size=11, color="faint")
        twin.append(f"{told}: {numbers}")
        y += 34 if len(points) < 8 else 28
    sheet.height = max(396, y)
    return sheet.drawing(*twin)


def _labels(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return where the numbers go: in a column to the left of points near each other, as they lie."""
    found: dict[int, tuple[float, float]] = {}
    across = sorted(range(len(places)), key=lambda i: places[i])
    while across:
        group = [across.pop(0)]
        while across and places[across[0]][0] - places[group[-1]][0] < 40:
            group.append(across.pop(0))
        left = places[group[0]][0] - 15
        group.sort(key=lambda i: places[i][1])
        feet: list[float] = []
        for i in group:
            feet.append(max(places[i][1] - 3, feet[-1] + 13 if feet else 0))
        shift = sum(foot - places[i][1] for foot, i in zip(feet, group, strict=True)) / len(group)
        shift = max(min(shift, feet[0] - _TOP), feet[-1] - _BOTTOM)  # the column stays beside the chart
        found |= {i: (left, foot - shift) for i, foot in zip(group, feet, strict=True)}
    return [found[i] for i in range(len(places))]


def _rate(rate: float) -> str:
    unit, size = next(((u, s) for u, s in (("T", 1e12), ("G", 1e9)) if rate >= s), ("M", 1e6))
    return f"{_short(rate / size)} {unit}FLOP/s"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def roofline_of_a_t4(context: int = 500, bandwidth: float = 320e9) -> Drawing:
    """Draw the roofline of a T4 on paper, with SmolLM2 in half precision, each step at its best.

    Args:
        context: tokens in the cache of each row that decodes.
        bandwidth: bytes per second; NVIDIA's white paper on Turing has 320 GB/s, its data sheet 300.
    """
    peak, model = GPUS["T4"].flops, MODELS["smollm2-135m"]
    keys = context + 1
    steps = {plural(n, "row"): StepWork(n, n, n, n * keys, n * keys) for n in (1, 8, 64)}
    steps["512 of a prompt"] = StepWork.of_rows((0,), (512,), 1)
    points = []
    for name, step in steps.items():
        work = model.work(step)
        rate = work.operations / work.seconds(bandwidth, peak)
        points.append(Point(work.operations / work.bytes, rate, name))
    return roofline("The roofline of a T4: the most that a step can reach", bandwidth, peak, points)
