"""Notebook 12: the three walls of one GPU."""

from __future__ import annotations

import dataclasses

from labkit.analysis.capacity import GPUS, MODELS, Roofline, StepWork
from labkit.notebook.pictures.svg import MARGIN, WIDTH, Drawing, Sheet
from labkit.views.style import plural

_BLOCK = 16


def three_walls(context: int = 500) -> Drawing:
    """Draw the memory of a T4 with an 8-billion model in it, and what a step of more and more rows takes.

    Args:
        context: tokens in the cache of each row.
    """
    model = dataclasses.replace(MODELS["llama-3.1-8b"], weight_bytes=1)
    gpu = GPUS["T4"]
    clock = Roofline(gpu, model, overhead=0.005)
    tokens = clock.num_blocks() * _BLOCK
    cache = tokens * model.kv_bytes_per_token
    most = tokens // context
    sheet = Sheet("One T4, 8 billion weights of one byte: three walls", 372)
    twin = []

    sheet.text(MARGIN, 62, "Memory: pages for so many tokens, then the queue grows", bold=True)
    scale = (WIDTH - 2 * MARGIN) / gpu.memory
    parts = (
        (f"weights: {model.bytes / 1e9:.1f} GB", model.bytes, 0),
        (f"{tokens:,} tokens: {cache / 1e9:.1f} GB", cache, 2),
        (f"{(gpu.memory - model.bytes - cache) / 1e9:.1f} GB", gpu.memory - model.bytes - cache, "empty"),
    )
    x = float(MARGIN)
    for words, size, color in parts:
        sheet.box(x, 74, scale * size - 2, 34, words, color=color, size=12)
        x += scale * size
    told = f"That is {most} rows of {context} tokens. The last part stays free."
    sheet.text(MARGIN, 126, told, size=12, color="faint")
    twin += [
        "Memory: pages for so many tokens, then the queue grows",
        *(f"  {words}" for words, *_ in parts),
        f"  {told}",
    ]

    heading = "Time of a step: what is read, and the arithmetic, which goes on beside it"
    sheet.text(MARGIN, 164, heading, bold=True)
    twin.append(heading)
    steps = {
        plural(rows, "row"): StepWork(rows, rows, rows, context * rows, context * rows)
        for rows in (1, 32, most)
    }
    steps["512 of a prompt"] = StepWork.of_rows((0,), (512,), 1)
    left, y = MARGIN + 116.0, 178.0
    longest = max(clock(step) for step in steps.values())
    scale = (WIDTH - MARGIN - left - 90) / longest
    for name, step in steps.items():
        weights = model.bytes / gpu.bandwidth
        keys = model.work(step).bytes / gpu.bandwidth - weights
        sums = model.work(step).operations / gpu.flops
        sheet.text(MARGIN, y + 20, name, size=12)
        sheet.box(left, y, scale * weights, 15, color=0)
        sheet.box(left + scale * weights, y, max(1, scale * keys), 15, color=2)
        sheet.box(left, y + 17, max(1, scale * sums), 9, color=5)
        total = f"{1e3 * clock(step):.0f} ms"
        sheet.text(left + scale * max(weights + keys, sums) + 8, y + 16, total, size=12)
        twin.append(
            f"  {name}: weights {1e3 * weights:.0f} ms, keys and values {1e3 * keys:.0f} ms; arithmetic "
            f"{1e3 * sums:.0f} ms; with 5 ms for the rest: {total}"
        )
        y += 38
    x = float(MARGIN)
    for words, color in (("weights", 0), ("keys and values", 2), ("arithmetic", 5)):
        sheet.box(x, y + 8, 14, 12, color=color)
        sheet.text(x + 20, y + 19, words, size=12, color="faint")
        x += 130
    sheet.text(x + 10, y + 19, "and 5 ms for all else", size=12, color="faint")
    return sheet.drawing(*twin)
