"""The queue of waiting requests, by priority and arrival. No tensors here."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from labkit.core.request import Request


def order(request: Request) -> tuple[int, ...]:
    """What requests are sorted by unless a scheduler says otherwise: priority (lower first), then arrival."""
    return request.priority, request.arrival


class WaitingQueue:
    """The waiting requests in order. Adding one or taking one out takes O(log n)."""

    def __init__(self, order: Callable[[Request], tuple[int, ...]] = order) -> None:
        self._order = order
        self._heap: list[tuple[tuple[int, ...], int, Request]] = []
        self._members: dict[str, Request] = {}

    def push(self, request: Request) -> None:
        """Add a request, or move one whose place has changed."""
        self._members[request.request_id] = request
        heapq.heappush(self._heap, self._entry(request))

    def peek(self) -> Request | None:
        """Return the next request, and leave it in the queue."""
        while self._heap:
            place, _, request = self._heap[0]
            if self._members.get(request.request_id) is request and place == self._order(request):
                return request
            heapq.heappop(self._heap)  # out of date: the request was removed, or its priority has changed
        return None

    def remove(self, request: Request) -> None:
        """Take a request out of the queue."""
        del self._members[request.request_id]  # its entry in the heap stays until it comes up
        if len(self._heap) > 2 * len(self._members) + 64:  # mostly leftovers: sweep
            self._heap = [self._entry(r) for r in self._members.values()]
            heapq.heapify(self._heap)

    def _entry(self, request: Request) -> tuple[tuple[int, ...], int, Request]:
        return self._order(request), request.arrival, request  # equals go by arrival

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return self._members.get(request.request_id) is request

    def __iter__(self) -> Iterator[Request]:
        return (request for *_, request in sorted(map(self._entry, self._members.values())))
