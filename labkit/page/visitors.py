"""Who has the page open: browser tabs, the visitors behind them, and their names.

A tab that is reloaded is a new tab of the same visitor, and a closed one may come back: a visitor is gone
only after a while without any tab.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable

GRACE = 30.0  # seconds: a gap in a network is shorter
MAX_NAME = 24  # characters
_KEY = secrets.token_bytes(16)


def mark(visitor: str) -> str:
    """A visitor's mark, which others may see: nobody can derive the secret from it. "" for nobody."""
    if not visitor:
        return ""
    return hashlib.blake2s(visitor.encode(errors="replace"), key=_KEY, digest_size=6).hexdigest()


def _new_secret() -> str:
    nonce = secrets.token_urlsafe(12)
    return nonce + _signature(nonce)


def _signature(nonce: str) -> str:
    data = nonce.encode(errors="replace")
    return hashlib.blake2s(data, key=_KEY, digest_size=8, person=b"visitor").hexdigest()


def _is_ours(secret: str) -> bool:
    """Whether we gave somebody this secret, which we do not remember: it is signed."""
    nonce, signature = secret[:-16], secret[-16:]
    return hmac.compare_digest(_signature(nonce).encode(), signature.encode(errors="replace"))


class Visitors:
    """Visitors and their browser tabs.

    Args:
        gone: a function that is called with a visitor who has left for good, on a thread of its own.
        grace: seconds between the end of a visitor's last tab and that call.
    """

    def __init__(self, gone: Callable[[str], object], *, grace: float = GRACE) -> None:
        self.grace = grace
        self._gone = gone
        self._lock = threading.Lock()
        self._visitor_of: dict[str, str] = {}
        self._tabs: dict[str, set[str]] = {}  # of each visitor who is here, or in their grace
        self._timers: dict[str, threading.Timer] = {}
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        """The number of visitors who are here."""
        return sum(map(bool, self._tabs.values()))

    def __contains__(self, visitor: object) -> bool:
        """Whether a visitor is here, or in their grace."""
        return visitor in self._tabs

    def arrive(self, tab: str, known_as: str = "") -> str:
        """Take note of a tab, and return its visitor's secret, which their browser keeps for the next tab.

        A tab may arrive again and again: after a gap in the network it was perhaps given up meanwhile.
        `known_as` is the secret that it was given before, or an earlier tab was. One that nobody was given
        counts as new.
        """
        with self._lock:
            visitor = known_as if known_as in self._tabs or _is_ours(known_as) else _new_secret()
            if self._visitor_of.get(tab, visitor) != visitor:
                self._leave(tab)
            if timer := self._timers.pop(visitor, None):
                timer.cancel()
            self._visitor_of[tab] = visitor
            self._tabs.setdefault(visitor, set()).add(tab)
            return visitor

    def leave(self, tab: str) -> None:
        """Take note that a tab was closed, is being reloaded, or has lost its connection."""
        with self._lock:
            self._leave(tab)

    def _leave(self, tab: str) -> None:
        visitor = self._visitor_of.pop(tab, "")
        if not visitor:
            return
        self._tabs[visitor].discard(tab)
        if not self._tabs[visitor]:
            timer = self._timers[visitor] = threading.Timer(self.grace, self._forget, (visitor,))
            timer.daemon = True
            timer.start()

    def has(self, tab: str) -> bool:
        """Whether a tab is here."""
        return tab in self._visitor_of

    def _forget(self, visitor: str) -> None:
        with self._lock:
            if self._tabs.get(visitor) or not self._timers.pop(visitor, None):
                return  # they came back meanwhile
            del self._tabs[visitor]
            self._names.pop(visitor, None)
        self._gone(visitor)

    def of(self, tab: str | None) -> str:
        """The visitor behind a tab. A client without a page, which never arrived, goes by its own name."""
        return self._visitor_of.get(tab or "", tab or "")

    def rename(self, visitor: str, name: str) -> str:
        """Take a name for others to see, and return it as it will be shown. An empty one means no name."""
        shown = " ".join("".join(char for char in str(name)[:200] if char.isprintable()).split())[:MAX_NAME]
        with self._lock:
            if visitor in self._tabs:
                self._names[visitor] = shown
        return shown

    def name(self, visitor: str) -> str:
        """The name that a visitor took; "" if none."""
        return self._names.get(visitor, "")

    def close(self) -> None:
        """Wait for no visitor any more."""
        with self._lock:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
