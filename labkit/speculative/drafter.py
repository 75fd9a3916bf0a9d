"""What drafts: a rule or a model that proposes the tokens that come next. No tensors here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from labkit.core.request import Request


class Drafter(Protocol):
    """Proposes the tokens that come next."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """Return drafts for each of these requests, at most so many; none where nothing suggests itself."""
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request that is gone, or that has lost its blocks."""
        ...
