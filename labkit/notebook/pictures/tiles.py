"""Notebook 08: the tiles of flash attention, and the memories of a GPU."""

from __future__ import annotations

from labkit.analysis.devices import GPUS
from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet

_SHARED_KB = 64  # of one multiprocessor of a T4: CUDA C++ Programming Guide, compute capability 7.5


def attention_tiles(tokens: int = 512, tile: int = 64, at: tuple[int, int] = (5, 3)) -> Drawing:
    """Draw the scores of one head cut into tiles, under a causal mask, and where each thing lies.

    Args:
        tokens: length of the prompt, a multiple of `tile`.
        tile: queries, and keys, of a tile.
        at: row and column of the tile that is being computed.
    """
    gpu, n = GPUS["T4"], tokens // tile
    done = n * (n + 1) // 2
    sheet = Sheet(f"Tiles of attention: {tokens:,} queries, {tokens:,} keys, one head", 400)
    side, left, top = 29.0, 96.0, 92.0
    sheet.text(left + n * side / 2, 62, "keys and values", anchor="middle")
    sheet.text(MARGIN, top + 90, "queries")
    for i in range(n):
        sheet.box(left + i * side + 1, 70, side - 2, 14, color=2 if i == at[1] else "empty")
        sheet.box(left - 22, top + i * side + 1, 14, side - 2, color=1 if i == at[0] else "empty")
        for j in range(n):
            x, y = left + j * side + 1, top + i * side + 1
            if j > i:
                sheet.box(x, y, side - 2, side - 2, dashed=True)
            else:
                color: int | str = 0 if (i, j) == at else "empty"
                sheet.box(x, y, side - 2, side - 2, "½" if i == j else "", color=color)
    lines = (
        f"{n} x {n} tiles of {tile} x {tile} scores",
        f"{done} are computed, one after the other",
        f"{n} of them, on the diagonal (½), half masked",
        f"{n * n - done} hold later keys: left out (dashed)",
    )
    for i, line in enumerate(lines):
        sheet.text(MARGIN, top + n * side + 20 + i * 16, line, size=12, color="faint" if i else "ink")

    x = 390.0
    score = tile * tile * 4 / 1024
    sheet.box(x, 56, 310, 118, dashed=True)
    sheet.text(x + 12, 78, f"beside the processor: {_SHARED_KB} KB, fast", bold=True)
    sheet.box(x + 12, 88, 88, 34, "queries", color=1)
    sheet.box(x + 106, 88, 88, 34, "keys, values", color=2, size=12)
    sheet.box(x + 200, 88, 98, 34, "one tile", color=0)
    sheet.text(x + 12, 142, f"a tile of scores: {score:.0f} KB in fp32", size=12)
    sheet.text(x + 12, 160, "and m, l, a for each query", size=12)
    sheet.box(x, 218, 310, 118, dashed=True)
    sheet.text(
        x + 12, 240, f"the GPU's memory: {gpu.memory / 1e9:.0f} GB, {gpu.bandwidth / 1e9:.0f} GB/s", bold=True
    )
    sheet.box(x + 12, 250, 88, 34, "queries", color=1)
    sheet.box(x + 106, 250, 88, 34, "keys, values", color=2, size=12)
    sheet.box(x + 200, 250, 98, 34, "results", color=3)
    every = tokens * tokens * 4 / 2**20
    sheet.text(x + 12, 304, f"all scores would be {every:.0f} MB a head:", size=12)
    sheet.text(x + 12, 322, "they are never there", size=12)
    for place, color in ((56, 1), (150, 2)):
        sheet.arrow((x + place, 214), (x + place, 178), color=color, width=2)
    sheet.arrow((x + 249, 178), (x + 249, 214), color=3, width=2)
    return sheet.drawing(
        *lines,
        f"beside the processor: {_SHARED_KB} KB, fast: the queries of a row of tiles; then keys and values, "
        f"and one tile of scores ({score:.0f} KB in fp32), tile by tile; and m, l, a for each query",
        f"the GPU's memory: {gpu.memory / 1e9:.0f} GB, {gpu.bandwidth / 1e9:.0f} GB/s (a T4): queries, keys, "
        f"values and results; all scores would be {every:.0f} MB a head, and are never there",
    )
