"""Notebook 01: where weights and KV cache lie, and what one step moves."""

from __future__ import annotations

import dataclasses

from labkit.analysis.roofline import MODELS
from labkit.notebook.pictures.svg import MARGIN, WIDTH, Drawing, Sheet


def what_moves(seen: int = 98, rows: int = 32, long: int = 1000) -> Drawing:
    """Draw what SmolLM2-135M in fp32 moves in a decode step.

    Args:
        seen: tokens whose keys and values the one row reads.
        rows, long: the rows of a second step, and the tokens that each of them reads.
    """
    model = dataclasses.replace(MODELS["smollm2-135m"], weight_bytes=4, kv_value_bytes=4)
    weights, token = model.bytes / 1e6, model.kv_bytes_per_token / 1e6
    few, many = seen * token, rows * long * token
    sheet = Sheet("Where everything lies, and what one step moves", 400)

    sheet.box(MARGIN, 52, 224, 190, dashed=True)
    sheet.text(MARGIN + 12, 74, "memory: large and slow", bold=True)
    sheet.box(MARGIN + 12, 86, 200, 80, f"weights: {weights:.0f} MB", color=0)
    sheet.box(MARGIN + 12, 178, 200, 50, f"KV cache: {1000 * token:.0f} KB a token", color=2)
    sheet.box(510, 52, 190, 190, dashed=True)
    sheet.text(522, 74, "processor: small, fast", bold=True)
    sheet.box(522, 86, 166, 80, "multiplies", color="empty")
    sheet.box(522, 178, 166, 50, "one new token", color=1)
    sheet.arrow((248, 126), (506, 126), color=0, width=9)
    sheet.text(376, 106, f"{weights:.0f} MB", anchor="middle")
    sheet.text(376, 152, "all of them, every step", size=12, color="faint", anchor="middle")
    sheet.arrow((248, 192), (506, 192), color=2, width=2)
    sheet.text(376, 184, f"{few:.1f} MB: {seen} tokens", anchor="middle")
    sheet.arrow((506, 216), (248, 216), color=2)
    sheet.text(376, 234, f"{1000 * token:.0f} KB: its own", size=12, color="faint", anchor="middle")

    scale = (WIDTH - 2 * MARGIN) / (weights + many)
    steps = ((1, seen, few), (rows, long, many))
    y = 280
    for count, tokens, moved in steps:
        who = "one row" if count == 1 else f"{count} rows"
        sheet.text(
            MARGIN, y, f"A step of {who}, {tokens:,} tokens each: {weights + moved:,.0f} MB, "
            f"{(weights + moved) / count:,.0f} MB for each token that comes out"
        )  # fmt: skip
        sheet.box(MARGIN, y + 10, scale * weights, 24, "weights", color=0)
        words = "keys and values" if moved > weights / 2 else ""
        sheet.box(MARGIN + scale * weights, y + 10, max(2, scale * moved), 24, words, color=2)
        y += 60
    return sheet.drawing(
        "memory, large and slow, holds:",
        f"  weights    {weights:.0f} MB: all of them are read in every step",
        f"  KV cache   {1000 * token:.0f} KB a token: a step reads {few:.1f} MB for a row of {seen} tokens, "
        "and writes its own",
        "the processor, small and fast, multiplies and makes one new token",
        f"A step of one row, {seen:,} tokens each: {weights + few:,.0f} MB, {weights + few:,.0f} MB for each "
        "token that comes out",
        f"A step of {rows} rows, {long:,} tokens each: {weights + many:,.0f} MB, "
        f"{(weights + many) / rows:,.0f} MB for each token that comes out: {weights:.0f} MB of weights, "
        f"{many:,.0f} MB of keys and values",
    )
