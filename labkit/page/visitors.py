"""Who has the page open: sessions of the browser, the visitors behind them, and their names.

A tab that is reloaded is a new session of the same visitor, and one that was closed may come back: a visitor
is gone only when a while has passed without any session of theirs.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable

GRACE = 8.0  # seconds
MAX_NAME = 24  # characters
_KEY = secrets.token_bytes(16)


def mark(visitor: str) -> str:
    """What others may know a visitor by: it cannot be turned back into the secret. "" for nobody."""
    if not visitor:
        return ""
    return hashlib.blake2s(visitor.encode(errors="replace"), key=_KEY, digest_size=6).hexdigest()


class Visitors:
    """Visitors and their sessions.

    Args:
        gone: called with a visitor who has left for good, on a thread of its own.
        grace: seconds between the end of a visitor's last session and that call.
    """

    def __init__(self, gone: Callable[[str], object], *, grace: float = GRACE) -> None:
        self.grace = grace
        self._gone = gone
        self._lock = threading.Lock()
        self._visitor_of: dict[str, str] = {}
        self._sessions: dict[str, set[str]] = {}  # of each visitor who is here, or in their grace
        self._timers: dict[str, threading.Timer] = {}
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        """How many are here."""
        return sum(map(bool, self._sessions.values()))

    def __contains__(self, visitor: object) -> bool:
        """Whether a visitor is here, or in their grace."""
        return visitor in self._sessions

    def arrive(self, session: str, known_as: str = "") -> str:
        """A session begins; returns the visitor's secret, by which their browser knows itself later.

        `known_as` is what an earlier session was told. One that is unknown, or was given up, counts as new.
        """
        with self._lock:
            visitor = known_as if known_as in self._sessions else secrets.token_urlsafe(12)
            if timer := self._timers.pop(visitor, None):
                timer.cancel()
            self._visitor_of[session] = visitor
            self._sessions.setdefault(visitor, set()).add(session)
            return visitor

    def leave(self, session: str) -> None:
        """A session ends: its tab was closed, or is being reloaded."""
        with self._lock:
            visitor = self._visitor_of.pop(session, "")
            if not visitor:
                return
            self._sessions[visitor].discard(session)
            if not self._sessions[visitor]:
                timer = self._timers[visitor] = threading.Timer(self.grace, self._forget, (visitor,))
                timer.daemon = True
                timer.start()

    def _forget(self, visitor: str) -> None:
        with self._lock:
            if self._sessions.get(visitor) or not self._timers.pop(visitor, None):
                return  # came back meanwhile
            del self._sessions[visitor]
            self._names.pop(visitor, None)
        self._gone(visitor)

    def of(self, session: str | None) -> str:
        """The visitor behind a session; for one that never arrived (a client without a page) its own name."""
        return self._visitor_of.get(session or "", session or "")

    def rename(self, visitor: str, name: str) -> str:
        """Take a name for others to see; returns it as it will be shown. Empty is none."""
        shown = " ".join("".join(char for char in str(name)[:200] if char.isprintable()).split())[:MAX_NAME]
        with self._lock:
            if visitor in self._sessions:
                self._names[visitor] = shown
        return shown

    def name(self, visitor: str) -> str:
        """The name that a visitor took, or ""."""
        return self._names.get(visitor, "")

    def close(self) -> None:
        """Wait for nobody any more."""
        with self._lock:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
