"""Notebook 00: one turn of the engine's loop."""

from __future__ import annotations

from labkit.notebook.pictures.runs import Lengths, run
from labkit.notebook.pictures.svg import MARGIN, WIDTH, Drawing, Sheet
from labkit.views.style import color_index, plural

_REQUESTS = (Lengths(9, 12), Lengths(5, 6), Lengths(3, 16), Lengths(30, 6, step=4))
_STEP = 4


def one_turn() -> Drawing:
    """Draw a step of a real run: the plan, the flat batch, the pass, the pages, and what comes out."""
    trace = run(_REQUESTS, num_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=16).trace
    record = trace.at(_STEP)
    owners = trace.state(_STEP).owners
    rows = record.rows
    sheet = Sheet("One turn of the engine's loop", 424)
    left, right = 150, WIDTH - 60
    inner = right - left

    def stage(number: int, y: float, name: str, below: str) -> None:
        sheet.text(MARGIN, y, f"{number} {name}", bold=True)
        sheet.text(MARGIN, y + 17, below, size=12, color="faint")

    stage(1, 72, "plan", "who, how many?")
    width = inner / len(rows)
    for i, row in enumerate(rows):
        words = f"request {row.request_id}: {row.num_tokens}"
        sheet.box(left + i * width + 3, 56, width - 6, 34, words, color=color_index(row.request_id))

    stage(2, 126, "batch", "one flat row")
    cells = [row.request_id for row in rows for _ in range(row.num_tokens)]
    width = inner / len(cells)
    for i, name in enumerate(cells):
        sheet.box(left + i * width + 1, 114, width - 2, 26, name, color=color_index(name), size=12)

    stage(3, 184, "pass", "once for all")
    sheet.arrow((left + inner / 2, 142), (left + inner / 2, 160))
    sheet.box(
        left + 3, 164, inner - 6, 46, "the model: all weights are read once, for every token of the row"
    )

    stage(4, 252, "keep", "keys and values")
    sheet.arrow((left + inner / 2, 212), (left + inner / 2, 230))
    width = inner / trace.meta.num_blocks
    for block in range(trace.meta.num_blocks):
        owner = owners.get(block, ("",))[0]
        color = color_index(owner) if owner else "empty"
        sheet.box(left + block * width + 1, 236, width - 2, 26, owner, color=color, size=10)
    sheet.text(
        left + 3, 280, f"{trace.meta.num_blocks} pages of the KV cache, by owner", size=12, color="faint"
    )

    stage(5, 322, "tokens", "to their readers")
    sheet.arrow((left + inner / 2, 284), (left + inner / 2, 302))
    width = inner / len(rows)
    for i, row in enumerate(rows):
        words = plural(len(row.sampled), "token") if row.sampled else "none yet"
        color = color_index(row.request_id) if row.sampled else "empty"
        sheet.box(left + i * width + 3, 306, width - 6, 34, words, color=color)
    sheet.text(
        left + 3, 358, "A prompt that is not computed to its end gives no token yet.", size=12, color="faint"
    )

    x = right + 30
    sheet.arrow((right, 323), (x, 323), (x, 73), (right + 2, 73), width=2)
    sheet.text(left + 3, 398, "Then the next turn begins: whoever came meanwhile is in its plan.", size=13)
    return sheet.drawing(
        f"Step {_STEP} of a real run computes {record.total_tokens} tokens; {record.total_sampled} come out.",
        "1 plan    " + "; ".join(f"request {row.request_id}: {row.num_tokens}" for row in rows),
        "2 batch   one flat row, each token by its owner: " + " ".join(cells),
        "3 pass    the model: all weights are read once, for every token of the row",
        f"4 keep    {trace.meta.num_blocks} pages of the KV cache, by owner: "
        + " ".join(owners.get(block, (".",))[0] for block in range(trace.meta.num_blocks)),
        "5 tokens  "
        + "; ".join(
            f"request {row.request_id}: {plural(len(row.sampled), 'token') if row.sampled else 'none yet'}"
            for row in rows
        ),
        "Then the next turn begins: whoever came meanwhile is in its plan.",
    )
