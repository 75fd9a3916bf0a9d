"""Notebook 11: an open and a closed loop of clients, while a server stands still."""

from __future__ import annotations

from collections import deque

from labkit.analysis.capacity import Replica, Settings
from labkit.core.request import Request
from labkit.notebook.pictures.svg import MARGIN, WIDTH, Drawing, Sheet
from labkit.sampling_params import SamplingParams

_COUNT, _SEATS, _ANSWER, _EVERY, _CLIENTS = 9, 2, 4, 2.5, 2
_STALL_AT, _STALL = 6, 8.0


def _serve(clients: int | None) -> tuple[list[tuple[float, float, float]], float]:
    """Serve requests with the real scheduler.

    Returns:
        When each was sent, got its first token, and ended, in seconds; and when the long step began.
    """
    steps = iter(range(10_000))
    replica = Replica(
        Settings(64, 4, _SEATS), lambda _: 1.0 + (_STALL if next(steps) == _STALL_AT else 0.0), trace=True
    )
    todo = deque(_EVERY * i for i in range(_COUNT))
    sent: list[float] = []
    now = 0.0
    while todo or replica.num_unfinished:
        while todo and (todo[0] <= now if clients is None else replica.num_unfinished < clients):
            todo.popleft()
            replica.add(Request(str(len(sent)), [0] * 4, SamplingParams(max_tokens=_ANSWER)), now)
            sent.append(now)
        now += 0.5
        replica.advance(now)
    seen = [(at, replica.first_token[str(i)], replica.finish[str(i)]) for i, at in enumerate(sent)]
    return seen, max(replica.trace, key=lambda record: record.seconds).time - _STALL


def open_and_closed() -> Drawing:
    """Draw the same requests in a closed and an open loop; in both, one step takes much longer."""
    loops = {
        f"closed loop: {_CLIENTS} clients, each asks again when it has its answer": _serve(_CLIENTS),
        f"open loop: somebody asks every {_EVERY:g} seconds": _serve(None),
    }
    end = max(done for seen, _ in loops.values() for *_, done in seen)
    left = MARGIN + 66.0
    scale = (WIDTH - MARGIN - left - 150) / end
    sheet = Sheet(
        f"A server stands still for {_STALL:.0f} seconds: who notices?", 86 + 2 * (44 + 19 * _COUNT)
    )
    twin, y = [], 62.0
    for name, (seen, stall) in loops.items():
        sheet.text(MARGIN, y, name, bold=True)
        twin.append(name)
        late, height = 0, 19 * _COUNT
        sheet.box(left + stall * scale, y + 10, _STALL * scale, height, color="empty")
        for i, (sent, first, done) in enumerate(seen):
            top = y + 12 + i * 19
            waits = first - sent
            late += waits > 2
            sheet.text(MARGIN, top + 11, f"request {i}", size=11, color="faint")
            sheet.line((left + sent * scale, top + 2), (left + sent * scale, top + 12), color="ink", width=2)
            sheet.line((left + sent * scale, top + 7), (left + first * scale, top + 7), dashed=True)
            sheet.box(
                left + first * scale,
                top + 2,
                max(2, (done - first) * scale),
                10,
                color=2 if waits <= 2 else 5,
            )
            sheet.text(left + end * scale + 14, top + 11, f"first token after {waits:.1f} s", size=11)
            twin.append(f"  request {i}: sent at {sent:.1f} s, first token after {waits:.1f} s")
        told = f"{late} of {_COUNT} wait more than 2 s"
        twin.append(f"  {told}")
        y += 12 + 19 * _COUNT + 14
        sheet.text(left, y, told, size=12, bold=True)
        y += 34
    return sheet.drawing(f"a step takes 1 s, and one of them {_STALL:.0f} s more; {_SEATS} seats", *twin)
