"""Drafts from the text: what followed the last few tokens when they last occurred. No tensors here."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.core.request import Request
from labkit.sampling_params import check_number


class NgramDrafter:
    """Proposes what followed when the last few tokens occurred before, in the prompt or in the answer.

    It looks for the longest such n-gram, and takes its most recent place (prompt lookup, Saxena 2023). Many
    drafts are accepted in text that is copied, edited or repeated; in other text it proposes hardly any.

    Args:
        longest, shortest: the limits on the size of an n-gram, in tokens.

    Raises:
        ValueError: if `shortest` is below 1, or `longest` below `shortest`.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        check_number("shortest", shortest, 1, 1000, whole=True)
        check_number("longest", longest, shortest, 1000, whole=True)
        self._sizes = range(longest, shortest - 1, -1)
        # For each request, how many of its tokens are read, and the place that last followed each n-gram.
        self._seen: dict[str, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        return [self._draft(request, count) for request, count in wanted]

    def _draft(self, request: Request, count: int) -> tuple[int, ...]:
        tokens = request.token_ids
        read, places = self._seen.get(request.request_id, (1, {}))
        for place in range(read, len(tokens)):
            for size in self._sizes:
                if size <= place:
                    places[tuple(tokens[place - size : place])] = place
        self._seen[request.request_id] = len(tokens), places
        for size in self._sizes:
            place = places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                drafts = tokens[place : place + count]
                while len(drafts) < count:  # the copy runs into itself, as in "ha ha ha"
                    drafts.append(drafts[place - len(tokens)])
                return tuple(drafts)
        return ()

    def forget(self, request_id: str) -> None:
        self._seen.pop(request_id, None)
