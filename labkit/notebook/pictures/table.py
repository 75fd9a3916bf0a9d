"""Notebook 03: a block table."""

from __future__ import annotations

from labkit.notebook.pictures.runs import Lengths, run
from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet
from labkit.views.style import color_index

_PAGES, _SIZE, _STEP = 12, 4, 7
_REQUESTS = (Lengths(6, 12), Lengths(3, 4), Lengths(2, 9, step=1))


def _top(page: int) -> float:
    """Return where a page begins in the picture."""
    return 72 + page * 20.0


def block_table() -> Drawing:
    """Draw the block tables of a real run, and the pages to which they point."""
    trace = run(_REQUESTS, num_blocks=_PAGES, block_size=_SIZE, max_num_seqs=4).trace
    state = trace.state(_STEP)
    filled = state.filled
    sheet = Sheet("A block table says where a request's tokens lie", 346)
    sheet.text(MARGIN, 62, "block tables", bold=True)
    sheet.text(430, 62, f"the pool: {_PAGES} pages of {_SIZE} slots", bold=True)

    twin, y = [], 84.0
    for name, table in state.tables.items():
        color = color_index(name)
        tokens = state.computed[name]
        sheet.text(MARGIN, y + 4, f"request {name}, {tokens} tokens")
        twin.append(f"request {name}, {tokens} tokens in pages {table}")
        y += 14
        for entry, page in enumerate(table):
            first, last = entry * _SIZE, min(tokens, (entry + 1) * _SIZE) - 1
            held = f"tokens {first} to {last}" if first < last else f"token {first}"
            sheet.box(MARGIN, y, 130, 24, held, color=color, size=12)
            sheet.box(MARGIN + 134, y, 70, 24, f"page {page}", color=color, size=12)
            sheet.arrow((MARGIN + 208, y + 12), (424, _top(page) + 9), color=color)
            twin.append(f"  entry {entry}, {held}: page {page}")
            y += 27
        y += 22
    for page in range(_PAGES):
        owner, top = state.owners.get(page, ("",))[0], _top(page)
        sheet.text(430, top + 13, f"page {page}", size=12)
        for slot in range(_SIZE):
            used = owner and slot < filled.get(page, 0)
            sheet.box(490 + slot * 52, top, 50, 18, color=color_index(owner) if used else "empty")
    free = [page for page in range(_PAGES) if page not in state.owners]
    sheet.text(
        MARGIN,
        330,
        "Any free page will do: pages of one request need not lie side by side.",
        size=12,
        color="faint",
    )
    return sheet.drawing(
        f"the pool: {_PAGES} pages of {_SIZE} slots, step {_STEP} of a real run",
        *twin,
        f"free: pages {free}",
        "Any free page will do: pages of one request need not lie side by side.",
    )
