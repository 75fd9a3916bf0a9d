"""The queue of waiting requests, by priority and arrival. No tensors here."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from labkit.core.request import Request


def order(request: Request) -> tuple[int, int]:
    """Return the key that requests are sorted by: priority (lower first), then arrival."""
    return request.priority, request.arrival


class WaitingQueue:
    """The waiting requests in order. Adding one or taking one out takes O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []  # by `order`, with entries that are out of date
        self._members: dict[str, Request] = {}

    def push(self, request: Request) -> None:
        """Add a request, or move one whose priority has changed."""
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (*order(request), request))

    def peek(self) -> Request | None:
        """Return the next request, and leave it in the queue."""
        while self._heap:
            priority, _, request = self._heap[0]
            if self._members.get(request.request_id) is request and request.priority == priority:
                return request
            heapq.heappop(self._heap)  # out of date: the request was removed, or its priority has changed
        return None

    def remove(self, request: Request) -> None:
        """Take a request out of the queue."""
        del self._members[request.request_id]  # its entry in the heap stays until it comes up
        if len(self._heap) > 2 * len(self._members) + 64:  # most entries are out of date: drop them
            self._heap = [(*order(r), r) for r in self._members.values()]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return self._members.get(request.request_id) is request

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._members.values(), key=order))
