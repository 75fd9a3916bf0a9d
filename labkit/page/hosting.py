"""What a lab's host may do and visitors may not: lock, end, see who is here, and take the session home."""

from __future__ import annotations

import io
import json
import secrets
import zipfile
from collections.abc import Callable
from typing import Any

from labkit.page.session import Lab

LOCKS = ("clock", "knobs", "races")


class Hosting:
    """The host's side of a lab. Who knows its key is a host: it is in a link that the program prints.

    Args:
        lab: the lab, whose `open_to` says what visitors may do.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def claim(self, visitor: str, key: str) -> bool:
        """Make a visitor a host if they bring the key. Returns whether they are one."""
        lab = self._lab
        if visitor in lab.visitors and secrets.compare_digest(key.encode(), lab.host_key.encode()):
            lab.hosts.add(visitor)
        return visitor in lab.hosts

    def act(self, visitor: str, action: str, name: str = "") -> dict[str, Any]:
        """Do what a host asks, and return who is here and what is locked.

        Args:
            visitor: the host.
            action: "lock" or "unlock" what `name` says, "end" all requests, "reset" to the settings that the
                lab started with, "export" the session, or anything else, for the state alone.
            name: one of `LOCKS`.

        Raises:
            ValueError: for a visitor who is no host, and for an unknown lock.
        """
        lab, answer = self._lab, {}
        if visitor not in lab.hosts:
            raise ValueError("Only the host of this lab can do that.")
        if action in ("lock", "unlock"):
            if name not in LOCKS:
                raise ValueError(f"locks are {', '.join(LOCKS)}, not {name[:40]!r}")
            lab.set_open(name, action == "unlock")
        elif action == "end":
            self._end_all()
        elif action == "reset":
            lab.change(lab.base, running="cancel", visitor=visitor)
        elif action == "export":
            answer["file"] = self.export().hex()
        here = [[name or "somebody", requests] for name, requests in self._who()]
        locked = [name for name in LOCKS if not lab.open_to(name)]
        return {"here": here, "locked": locked, **answer}

    def _who(self) -> list[tuple[str, int]]:
        """The name of each visitor who is here ("" for none), and the number of their requests under way."""
        visitors, submissions = self._lab.visitors, self._lab.session.submissions
        return sorted((visitors.name(one), submissions.under_way(one)) for one in visitors.here())

    def _end_all(self) -> None:
        """End everybody's requests, and what a preset has yet to send."""
        session = self._lab.session
        session.player.drop_all()
        for card in session.now().cards:
            session.live.abort(card.request)
        if session.live.paused:
            session.live.single_step()  # in which they end

    def export(self) -> bytes:
        """The session as one ZIP file: the trace, which the Replay tab opens, and the cards."""
        session = self._lab.session
        cards = [card._asdict() | {"owner": ""} for card in session.now().cards]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(
                "trace.jsonl", "".join(line + "\n" for line in session.live.engine.trace.lines())
            )
            archive.writestr("requests.json", json.dumps(cards, ensure_ascii=False, indent=1))
        return file.getvalue()


def closed_reason(lab: Lab) -> Callable[[], str]:
    """A function that says why no race can be started; "" if one can."""
    return lambda: "" if lab.open_to("races") else "The host of this lab has locked races."
