"""A closer look at one step, or at one page: from the trace, and the tokens of the answers still known.

Blocks are numbers and the trace holds no prompts, so tokens come from the outputs that `AsyncEngine` keeps.
"""

from __future__ import annotations

from typing import Any

from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import Row, StepRecord
from labkit.trace.trace import Trace
from labkit.views.live_feed import Decode, looks, pack_bits, words_of

_LOOK_BACK = 2_000  # steps, to find who had a page last


def step_facts(live: AsyncEngine, step: int) -> dict[str, Any]:
    """The batch, the block tables and the queue of one step, ready for JSON.

    The tables are as they were while the step ran: who finished in it still holds pages.

    Raises:
        ValueError: if the trace does not hold that step (any more).
    """
    trace = live.engine.trace
    record, state = trace.at(step), trace.state(step)
    decode = live.engine.model.tokenizer.decode
    facts = {
        "step": step,
        "ms": round(1000 * record.seconds, 3),
        "rows": [
            [
                row.request_id,
                *looks(row.request_id),
                row.kind[0],
                row.start,
                row.num_tokens,
                decode(list(row.sampled)),
                *_drafts(row, decode),
            ]
            for row in record.rows
        ],
        "tables": [[name, state.computed.get(name, 0), table] for name, table in state.tables.items()],
        "cached": pack_bits(state.cached, trace.meta.num_blocks),
        "queue": [[name, *looks(name)] for name in state.queue],
        "preempted": [[name, *looks(name), len(blocks)] for name, blocks in record.preempted],
        "ended": [
            [finish.request_id, *looks(finish.request_id), finish.reason] for finish in record.finished
        ],
        "blocked": record.blocked,
        "free": record.free_blocks,
    }
    if record.returned:
        facts["returned"] = record.returned
    if record.held_back:
        facts["held_back"] = record.held_back
    return facts


def _drafts(row: Row, decode: Decode) -> tuple[Any, ...]:
    """How many tokens were drafted, how many of them were right, and all of them as text."""
    if not row.drafted:
        return ()
    return len(row.drafted), row.num_accepted, words_of(row.drafted, decode)


def page_facts(live: AsyncEngine, block: int, step: int | None = None) -> dict[str, Any]:
    """Who owns a page, where in their block tables, and the tokens in it, each as text.

    Without a step, as things are after the latest one. A page without owners tells of the last one that it
    had. `tokens` is None where the answer is too old to be remembered.

    Raises:
        ValueError: for a page that the pool does not have, or a step that the trace does not hold.
    """
    trace = live.engine.trace
    if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < trace.meta.num_blocks:
        raise ValueError(f"block must be between 0 and {trace.meta.num_blocks - 1}, not {block!r}")
    records = trace.records
    if not records:
        return {"block": block, "owners": [], "cached": False, "last": None, "tokens": None}
    state = trace.state(records[-1].step, after=True) if step is None else trace.state(step)
    size = trace.meta.block_size
    owners = [
        [name, table.index(block), max(0, min(size, state.computed.get(name, 0) - table.index(block) * size))]
        for name, table in state.tables.items()
        if block in table
    ]
    cached = block in state.cached
    last = None if owners else _last_owner(trace, block, records[-1].step if step is None else step)
    known = max(owners, key=lambda owner: owner[2]) if owners else (*last, size) if last and cached else None
    record = None if step is None else trace.at(step)
    return {
        "block": block,
        "owners": owners,
        "cached": cached,
        "last": last,
        "tokens": _tokens(live, known[0], known[1] * size, known[2], record) if known else None,
    }


def _last_owner(trace: Trace, block: int, step: int) -> tuple[str, int] | None:
    """Who gave this page back last, before the end of a step, and where in their table it was."""
    for record in reversed(trace.records[-_LOOK_BACK:]):
        if record.step > step:
            continue
        if owner := _gave_back(record, block):
            return owner
        for name, blocks in record.returned:
            if block in blocks:
                return name, trace.state(record.step).tables[name].index(block)
    return None


def _gave_back(record: StepRecord, block: int) -> tuple[str, int] | None:
    given = [(finish.request_id, finish.blocks) for finish in reversed(record.finished)]
    for name, blocks in (*given, *reversed(record.preempted)):
        if block in blocks:
            return name, blocks.index(block)
    return None


def _tokens(
    live: AsyncEngine, request_id: str, start: int, count: int, record: StepRecord | None
) -> list[str] | None:
    """The tokens of a request from `start` on, after the latest step or during that of the record."""
    try:
        output = live.output(request_id)
    except KeyError:
        return None
    ids = output.prompt_token_ids + output.token_ids
    for row in record.rows if record else ():
        if row.request_id == request_id and row.drafted:  # what it guessed, right or wrong
            ids = [*ids[: row.start + 1], *row.drafted]
    return words_of(ids[start : start + count], live.engine.model.tokenizer.decode)
