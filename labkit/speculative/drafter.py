"""The interface of a drafter: a rule or a model that proposes the next tokens. No tensors here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from labkit.core.request import Request


class Drafter(Protocol):
    """Proposes the next tokens of requests."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """Return drafts for each request: at most the number beside it, and none if it has no proposal."""
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request that has ended or was preempted."""
        ...
