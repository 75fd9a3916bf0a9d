"""One snapshot of an engine for all who look: pictures, cards, clock, plan and settings.

A `Snapshotter` takes everything down at one moment. The snapshot is then told to each client as far as that
client does not know it yet: to a page or a widget that asks, or to all pages at once. It has two sources, the
page's `Session` and a notebook's `NotebookSession`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from labkit.trace.records import StepRecord
from labkit.views import style
from labkit.views.live_feed import Decode, Feed, Frame
from labkit.views.wire import Plan


class Card(NamedTuple):
    """A request as its card shows it. `serial` counts cards; `owner` and `name` say who handed it in.

    A request of a `preset` came in by itself.
    """

    serial: int
    request: str
    owner: str
    name: str
    prompt: str
    max_tokens: int
    num_tokens: int
    text: str
    finish_reason: str | None
    error: str | None
    preset: bool = False


class Now(NamedTuple):
    """What a source says of itself at one moment, beside its feed.

    `serial` is that of the latest card. A client that is new gets only the cards after number `before`.
    """

    clock: dict[str, Any]
    busy: bool
    coming: StepRecord | None  # the step to come, while the engine is paused
    serial: int
    cards: Sequence[Card]
    before: int = -1


class Source(Protocol):
    """One engine that is shown; another engine is another source."""

    @property
    def feed(self) -> Feed: ...

    @property
    def decode(self) -> Decode: ...

    @property
    def now(self) -> Callable[[], Now]: ...


class Host(Protocol):
    """Has a source at any moment, and settings: `version` grows whenever `status` changes."""

    @property
    def version(self) -> int: ...

    @property
    def session(self) -> Source: ...

    def status(self) -> dict[str, Any]: ...


@dataclass
class ClientState:
    """What a client has been told already. A browser keeps the same of itself."""

    feed: str = ""
    step: int = -1
    plan: int = 0
    cards: int = -1  # the serial of the latest card
    unfinished: Mapping[str, int] = field(default_factory=dict)  # characters of each unfinished answer
    settings: int = -1  # their version

    @classmethod
    def read(cls, question: Mapping[str, Any]) -> ClientState:
        """What a client says that it knows. It may send anything: what makes no sense counts as nothing."""
        unfinished = question.get("unfinished")
        counts = unfinished.items() if isinstance(unfinished, dict) else ()
        return cls(
            feed=text_in(question, "feed"),
            step=_whole(question.get("step"), -1),
            plan=_whole(question.get("plan"), 0),
            cards=_whole(question.get("cards"), -1),
            unfinished={name: _whole(count, 0) for name, count in counts},
            settings=_whole(question.get("settings"), -1),
        )


def text_in(question: Mapping[str, Any], name: str) -> str:
    """A field that should be text; "" for anything else."""
    value = question.get(name)
    return value if isinstance(value, str) else ""


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


@dataclass(frozen=True)
class Snapshot:
    """The engine as it was at one moment, to be told to any number of clients."""

    feed: Feed
    frame: Frame
    now: Now
    plan_key: int
    plan: Plan | None
    version: int
    status: Callable[[], dict[str, Any]]  # asked only if a client does not know this version

    def tell(self, client: ClientState) -> dict[str, Any]:
        """What is new to a client, ready for JSON. From now on the client knows it."""
        same = client.feed == self.feed.name
        if not same:
            client.cards, client.unfinished = -1, {}
        answer = {
            "cards": new_cards(self.now, client),
            "pictures": self.feed.pictures(client.feed, client.step, self.frame),
            "live": self.now.clock,
            "busy": self.now.busy,
            "plan": {"key": self.plan_key},
        }
        if self.plan and (client.plan != self.plan_key or not same):
            answer["plan"] = {"key": self.plan_key, "plan": self.plan}
        if client.settings != self.version:
            answer["lab"] = self.status() | {"version": self.version}
        client.feed, client.step, client.plan = self.feed.name, self.frame.step, self.plan_key
        client.settings = self.version
        return answer


def new_cards(now: Now, client: ClientState) -> dict[str, Any]:
    """New cards in full, and what was added to the unfinished ones. From now on the client knows them.

    A finished text is told whole. `gone` are unfinished cards that exist no more: a client that looked away
    for long would wait for their end in vain.
    """
    items = []
    unfinished: dict[str, int] = {}
    after, reset = max(client.cards, now.before), client.cards < 0
    for card in now.cards:
        over, length = card.finish_reason is not None, len(card.text)
        had = client.unfinished.get(card.request)
        if had is None and card.serial <= after:
            continue
        if not over:
            unfinished[card.request] = length
        if had is None:
            items.append(_facts(card) | _growth(card, 0))
        elif over or length != had:
            items.append({"id": card.request} | _growth(card, had))
    gone = client.unfinished.keys() - {card.request for card in now.cards}
    client.cards, client.unfinished = now.serial, unfinished
    return {"since": now.serial, "items": items, "gone": list(gone), "reset": reset}


def _facts(card: Card) -> dict[str, Any]:
    return {
        "id": card.request,
        "serial": card.serial,
        "label": style.label(card.request),
        "color": style.color_index(card.request),
        "owner": card.owner,
        "name": card.name,
        "prompt": card.prompt,
        "max_tokens": card.max_tokens,
        "preset": card.preset,
    }


def _growth(card: Card, had: int) -> dict[str, Any]:
    at = had if card.finish_reason is None and had <= len(card.text) else 0
    return {
        "tokens": card.num_tokens,
        "at": at,  # the text begins with this character, because the client has what comes before
        "text": card.text[at:],
        "length": len(card.text),
        "reason": card.finish_reason,
        "error": card.error,
    }


class Snapshotter:
    """Takes snapshots, without ever waiting for the engine. It belongs to one thread.

    Args:
        host: the lab of a page, or the host of a notebook's engine.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._foreseen: StepRecord | None = None  # the plan that was packed last
        self._key = 0
        self._plan: Plan | None = None

    def take(self) -> Snapshot:
        """The engine at this moment."""
        version, session = self._host.version, self._host.session  # a change in between is told again
        now, frame = session.now(), session.feed.frame()
        key, plan = (0, None) if now.coming is None else self._pack(now.coming, session)
        return Snapshot(session.feed, frame, now, key, plan, version, self._host.status)

    def _pack(self, record: StepRecord, session: Source) -> tuple[int, Plan | None]:
        """A key for the plan of the next step, and the plan, packed once; key 0 if there is none."""
        if record != self._foreseen:
            plan = session.feed.preview(record, session.decode)
            if plan is None:  # the pictures lag behind, so a later snapshot will have it
                return 0, None
            self._key, self._foreseen, self._plan = self._key + 1, record, plan
        return self._key, self._plan
