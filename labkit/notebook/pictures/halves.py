"""Notebook 14: two products shared by two processes, columns first and then rows, with one sum behind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet

Matrix = Sequence[Sequence[int]]
_X = (1, 2)
_FIRST: Matrix = ((2, -1, 1, 0), (1, 1, -1, 2))  # from 2 numbers to 4
_SECOND: Matrix = ((1, 0), (0, 2), (3, 1), (1, -1))  # and back
_CELL = 26


def column_then_row() -> Drawing:
    """Draw x through two matrices with a function between them, on two processes of which each has half."""
    sheet = Sheet("Two processes, half of both matrices each: columns first, then rows", 386)
    inner = len(_SECOND)
    twin, partial = [f"x = {_told(_X)}, known to both"], []
    left = (MARGIN, 116, 256, 376, 494)  # x, the first half, what comes out, the second half, its result
    heads = ("x", "half the columns", "own numbers", "half the rows", "part of the sum")
    for x, words in zip(left, heads, strict=True):
        sheet.text(x, 62, words, size=12, color="faint")
    for process in range(2):
        own = range(process * inner // 2, (process + 1) * inner // 2)
        first = [[row[i] for i in own] for row in _FIRST]
        second = [list(_SECOND[i]) for i in own]
        hidden = [max(0, number) for number in _times(_X, first)]  # ReLU: each number by itself
        sums = _times(hidden, second)
        partial.append(sums)
        y = 84.0 + 130 * process
        sheet.text(MARGIN, y + 76, f"process {process}", bold=True)
        for x, matrix in zip(left, ([_X], first, [hidden], second, [sums]), strict=True):
            _matrix(sheet, x, y + 26 - _CELL * len(matrix) / 2, matrix, process)
        for x, then in pairwise(left):
            sheet.arrow((_right(x, 2) + 6, y + 26), (then - 6, y + 26))
        sheet.text((_right(left[1], 2) + left[2]) / 2, y + 14, "max(0, ·)", size=11, anchor="middle")
        twin += [
            f"process {process} has columns {own[0]} and {own[1]} of the first matrix: {_told(first)}",
            f"  max(0, x times these): {_told(hidden)}, of which the other process knows none",
            f"  it has rows {own[0]} and {own[1]} of the second matrix: {_told(second)}",
            f"  its numbers times these: {_told(sums)}, a part of the sum",
        ]
    whole = [a + b for a, b in zip(*partial, strict=True)]
    x = _right(left[4], 2)
    for process in range(2):
        y = 110.0 + 130 * process
        sheet.arrow((x + 6, y), (x + 32, y), (x + 32, 175 + (-14 if process == 0 else 14)))
    sheet.box(x + 16, 162, 32, 26, "sum", color="paper", size=12, bold=True)
    sheet.arrow((x + 48, 175), (x + 68, 175))
    _matrix(sheet, x + 74, 175 - _CELL / 2, [whole], 2)
    lines = (
        "Between the two products nobody needs what the other has.",
        f"After them, one sum: {len(whole)} numbers from each process, and both go on with {_told(whole)}.",
        f"Rows first: {inner} numbers to add between the products, and {len(whole)} to collect behind them.",
    )
    for number, line in enumerate(lines):
        sheet.text(MARGIN, 330 + 20 * number, line)
    return sheet.drawing(*twin, *lines)


def _times(x: Sequence[int], matrix: Matrix) -> list[int]:
    return [sum(a * row[i] for a, row in zip(x, matrix, strict=True)) for i in range(len(matrix[0]))]


def _told(numbers: Sequence[int] | Matrix) -> str:
    """Numbers in brackets; the rows of a matrix one after the other."""
    rows = [_told(row) if isinstance(row, Sequence) else str(row) for row in numbers]
    return f"({', '.join(rows)})"


def _right(left: float, columns: int) -> float:
    return left + _CELL * columns


def _matrix(sheet: Sheet, left: float, top: float, matrix: Matrix, color: int) -> None:
    for i, row in enumerate(matrix):
        for j, number in enumerate(row):
            sheet.box(left + _CELL * j, top + _CELL * i, _CELL, _CELL, number, color=color)
