"""Who waits, and in which order. No tensors here."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from labkit.core.request import Request


def order(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


class WaitingQueue:
    """Requests by priority (lower first), then by arrival. Lazy removal keeps every call at log n or less."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._members: dict[str, Request] = {}

    def push(self, request: Request) -> None:
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (request.priority, request.arrival, request))

    def peek(self) -> Request | None:
        while self._heap:
            priority, _, request = self._heap[0]
            if self._members.get(request.request_id) is request and request.priority == priority:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: Request) -> None:
        del self._members[request.request_id]
        if len(self._heap) > 2 * len(self._members) + 64:  # mostly leftovers: sweep
            self._heap = [(r.priority, r.arrival, r) for r in self._members.values()]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return self._members.get(request.request_id) is request

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._members.values(), key=order))
