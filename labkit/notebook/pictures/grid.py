"""Notebook 09: the grid of eight bits, and what an outlier does to it."""

from __future__ import annotations

from labkit.notebook.pictures.svg import MARGIN, WIDTH, Drawing, Sheet

_LEVELS = 127
_ROW = (0.80, -0.312, 0.051, 0.417, -1.27, 0.604, -0.09, 0.003)
_OUTLIER = 10.0  # times as large as the largest of them


def int8_grid() -> Drawing:
    """Draw what eight bits can give back, for a row of eight numbers, and with an outlier among them."""
    largest = max(map(abs, _ROW))
    sheet = Sheet("Eight bits are a grid: a number comes back as its nearest point", 344)
    left, right = MARGIN + 20.0, WIDTH - MARGIN - 20.0
    twin = []

    def at(value: float, reach: float) -> float:
        return round((left + right) / 2 + value / reach * (right - left) / 2, 1)

    sheet.text(
        MARGIN,
        62,
        f"A row of {len(_ROW)} numbers, from {-largest} to {max(_ROW)}: the largest becomes {_LEVELS}",
    )
    sheet.line((left, 86), (right, 86))
    near = 0.1
    sheet.box(at(-near, largest), 76, at(near, largest) - at(-near, largest), 20, dashed=True)
    for value in _ROW:
        sheet.dot(at(value, largest), 86, color=0)
    sheet.line((at(-near, largest), 96), (left, 126), color="faint", width=1, dashed=True)
    sheet.line((at(near, largest), 96), (right, 126), color="faint", width=1, dashed=True)

    y = 130.0
    for size in (largest, _OUTLIER * largest):
        scale = size / _LEVELS
        name = f"scale {largest:g} / {_LEVELS} = {scale:.2f}"
        if size > largest:
            name = f"with a {size:g} in the row: scale {scale:.2f}"
        sheet.text((left + right) / 2, y + 12, f"The middle, larger: {name}", anchor="middle", bold=True)
        twin.append(f"{name}, a step of the grid")
        line = y + 62
        sheet.line((left, line), (right, line))
        steps = round(near / scale)
        for n in range(-steps, steps + 1):
            x = at(n * scale, near)
            sheet.line((x, line - 5), (x, line + 5), color="ink", width=2)
            if n in (-steps, 0, steps):
                sheet.text(x, line + 22, f"{n * scale:.1f}", size=11, color="faint", anchor="middle")
        for value in _ROW:
            if abs(value) > near:
                continue
            back = round(value / scale) * scale
            x, target = at(value, near), at(back, near)
            sheet.dot(x, line - 24, color=0)
            sheet.text(x, line - 32, f"{value:g}", size=12, anchor="middle")
            sheet.arrow((x, line - 19), (target, line - 5), color=0)
            twin.append(f"  {value:g} comes back as {back:.2f}".replace("-0.00", "0.00"))
        y += 104
    return sheet.drawing(
        f"A row of {len(_ROW)} numbers, from {-largest} to {max(_ROW)}: the largest becomes {_LEVELS}",
        "the row: " + ", ".join(f"{value:g}" for value in _ROW),
        f"The middle, larger: from {-near} over 0.0 to {near}",
        *twin,
    )
