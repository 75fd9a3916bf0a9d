"""Notebook 05: how a step's token budget is shared out."""

from __future__ import annotations

from labkit.notebook.pictures.runs import Lengths, run
from labkit.notebook.pictures.svg import MARGIN, Drawing, Sheet

_REQUESTS = (*[Lengths(4, 24)] * 4, Lengths(96, 8, step=6))
_FIRST, _LAST, _BUDGET = 4, 15, 16


def step_budget() -> Drawing:
    """Draw the steps in which a long prompt joins four answers: computed whole, and in chunks."""
    sizes = {"num_blocks": 512, "block_size": 4, "max_num_seqs": 8}
    whole = run(_REQUESTS, max_num_batched_tokens=128, enable_chunked_prefill=False, **sizes).trace
    chunks = run(_REQUESTS, max_num_batched_tokens=_BUDGET, **sizes).trace
    sheet = Sheet("A long prompt joins four answers: the tokens of each step", 356)
    scale, width, bottom, twin = 2.2, 24, 300.0, []
    for left, trace, name in (
        (MARGIN, whole, "computed whole"),
        (MARGIN + 350, chunks, f"a budget of {_BUDGET} tokens"),
    ):
        sheet.text(left, 62, name, bold=True)
        twin.append(name)
        for step in range(_FIRST, _LAST):
            record = trace.at(step)
            x, y = left + (step - _FIRST) * (width + 4), bottom
            newcomer = sum(row.num_tokens for row in record.rows if row.request_id == "4")
            answers = record.total_tokens - newcomer
            for tokens, color in ((answers, 0), (newcomer, 1)):
                y -= scale * tokens
                if tokens:
                    sheet.box(x, y, width, scale * tokens, color=color)
            sheet.text(x + width / 2, y - 5, record.total_tokens, size=11, anchor="middle")
            sheet.text(x + width / 2, bottom + 16, step, size=11, color="faint", anchor="middle")
            twin.append(
                f"  step {step}: {record.total_tokens} tokens, {answers} of the answers "
                f"and {newcomer} of the newcomer"
            )
    x, top = MARGIN + 350, bottom - scale * _BUDGET
    sheet.line((x - 8, top), (x + 11 * (width + 4), top), color="ink", dashed=True)
    sheet.box(MARGIN, 330, 14, 12, color=1)
    sheet.text(MARGIN + 20, 341, "the newcomer, a prompt of 96 tokens", size=12, color="faint")
    sheet.box(MARGIN + 350, 330, 14, 12, color=0)
    sheet.text(MARGIN + 370, 341, "four answers, a token each", size=12, color="faint")
    return sheet.drawing(*twin, "the newcomer is a prompt of 96 tokens; the answers get a token each")
