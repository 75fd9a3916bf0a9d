"""Who has the page open: browser tabs, the visitors behind them, and their names.

A tab that is reloaded is a new tab of the same visitor, and a closed one may come back: a visitor is gone
only after a while without any tab. Anybody can say that they arrive, so only a visitor who is heard from
counts as one: an open page keeps a line to the lab, or asks it again and again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

GRACE = 8.0  # seconds
UNHEARD = 20.0  # seconds in which one who has arrived must be heard from
SILENCE = 90.0  # seconds between two questions of a page without a line: a hidden tab asks once a minute
ASKING = 15.0  # seconds in which a page that is looked at asks at least once, however busy the machine is
MAX_NAME = 24  # characters
_KEY = secrets.token_bytes(16)


def mark(visitor: str) -> str:
    """A visitor's mark, which others may see: nobody can derive the secret from it. "" for nobody."""
    if not visitor:
        return ""
    return hashlib.blake2s(visitor.encode(errors="replace"), key=_KEY, digest_size=6).hexdigest()


class Visitors:
    """Visitors and their browser tabs.

    Args:
        gone: a function that is called with a visitor who has left for good, on a thread of its own.
        grace: seconds between the end of a visitor's last tab and that call.
        unheard: seconds after which one who was never heard from is gone.
    """

    def __init__(
        self, gone: Callable[[str], object], *, grace: float = GRACE, unheard: float = UNHEARD
    ) -> None:
        self.grace, self.unheard = grace, unheard
        self._gone = gone
        self._lock = threading.Lock()
        self._visitor_of: dict[str, str] = {}
        self._tabs: dict[str, set[str]] = {}  # of each visitor who is here, or in their grace
        self._lines: Counter[str] = Counter()  # open lines of each tab
        self._heard: dict[str, float] = {}  # when each visitor was heard from last, of those who were
        self._ends: dict[str, float] = {}  # when visitors without a line will be gone
        self._timer: threading.Timer | None = None  # one for all: it rings at the first of these
        self._rings = 0.0
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        """The number of visitors who are here and are heard from."""
        return sum(bool(self._tabs.get(visitor)) for visitor in list(self._heard))

    def __contains__(self, visitor: object) -> bool:
        """Whether a visitor is here and was heard from, or is in their grace."""
        return visitor in self._heard

    @property
    def num_asking(self) -> int:
        """The number of pages that ask at present, because they have no stream."""
        since = time.monotonic() - ASKING
        return sum(heard > since for heard in list(self._heard.values()))

    def arrive(self, tab: str, known_as: str = "") -> str:
        """Take note of a new tab, and return its visitor's secret, which their browser keeps for the next
        tab.

        `known_as` is the secret that an earlier tab was given. An unknown one, or one given up, counts as
        new.
        """
        with self._lock:
            visitor = known_as if known_as in self._tabs else secrets.token_urlsafe(12)
            if (earlier := self._visitor_of.get(tab, visitor)) != visitor:
                self._part(tab, earlier, 0.0)  # one tab is one visitor
            self._visitor_of[tab] = visitor
            self._tabs.setdefault(visitor, set()).add(tab)
            if self._lines[tab]:
                self._heard.setdefault(visitor, -math.inf)
            self._expect(visitor, self.unheard)
            return visitor

    @contextlib.contextmanager
    def line(self, tab: str) -> Iterator[None]:
        """A tab keeps a line open while this lasts. It is closed with its line."""
        with self._lock:
            self._lines[tab] += 1
            if visitor := self._visitor_of.get(tab):
                self._heard.setdefault(visitor, -math.inf)
                self._ends.pop(visitor, None)
        try:
            yield
        finally:
            with self._lock:
                self._lines -= Counter([tab])  # and forgets a tab that has none left
            if tab not in self._lines:
                self.leave(tab)

    def hear(self, visitor: str) -> None:
        """Take note of a question of a visitor's page."""
        with self._lock:
            if self._tabs.get(visitor):
                self._heard[visitor] = time.monotonic()
                self._expect(visitor, SILENCE)

    def leave(self, tab: str) -> None:
        """Take note that a tab was closed, or is being reloaded."""
        with self._lock:
            if visitor := self._visitor_of.pop(tab, ""):
                self._part(tab, visitor, self.grace)

    def _part(self, tab: str, visitor: str, grace: float) -> None:
        """Take a tab from a visitor, who is gone after the grace if it was the last; under the lock."""
        self._tabs[visitor].discard(tab)
        self._expect(visitor, SILENCE if self._tabs[visitor] else grace)

    def _expect(self, visitor: str, seconds: float) -> None:
        """Forget a visitor after some seconds, unless they have a line. The lock must be held."""
        if any(tab in self._lines for tab in self._tabs[visitor]):
            self._ends.pop(visitor, None)
            return
        end = self._ends[visitor] = time.monotonic() + seconds
        if self._timer is None or end < self._rings:
            self._wind(end)

    def _wind(self, end: float) -> None:
        """Set the one timer. It may ring too early, if that visitor is heard from. The lock must be held."""
        if self._timer:
            self._timer.cancel()
        self._rings = end
        self._timer = threading.Timer(max(0.0, end - time.monotonic()), self._forget)
        self._timer.daemon = True
        self._timer.start()

    def _forget(self) -> None:
        now = time.monotonic()
        with self._lock:
            over = [visitor for visitor, end in self._ends.items() if end <= now]
            for visitor in over:
                del self._ends[visitor]
                for tab in self._tabs.pop(visitor):
                    self._visitor_of.pop(tab, None)
                self._heard.pop(visitor, None)
                self._names.pop(visitor, None)
            self._timer = None
            if self._ends:
                self._wind(min(self._ends.values()))
        for visitor in over:
            self._gone(visitor)

    def of(self, tab: str | None, address: str = "") -> str:
        """The visitor behind a tab, or what stands for a client who cannot be told from others.

        A client is its address unless its tab has arrived and is heard from: it can make up as many tabs as
        it likes.
        """
        visitor = self._visitor_of.get(tab or "", "")
        return visitor if visitor in self._heard else f"@{address}"

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
            self._ends.clear()
            if self._timer:
                self._timer.cancel()
