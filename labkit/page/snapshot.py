"""What is new in the lab since somebody last heard of it: pictures, cards, clock, plan and settings.

All of it is taken down at one moment, and then told to each as far as they do not know it yet: to a page that
asks, or to all pages at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from labkit.page.session import Bench, Lab
from labkit.page.submissions import Cards
from labkit.trace.records import StepRecord
from labkit.views.live_feed import Frame


@dataclass
class Known:
    """What somebody knows already: nothing, to begin with."""

    feed: str = ""
    step: int = -1
    plan: int = 0
    cards: int = -1  # the number of the latest card
    open: Mapping[str, int] = field(default_factory=dict)  # characters of each unfinished answer
    lab: int = -1

    def hear(self, news: Mapping[str, Any]) -> None:
        """Know what was told; `canvas.js` and `cards.js` do the same."""
        pictures, cards = news["pictures"], news["cards"]
        self.feed, self.step, self.plan = pictures["feed"], pictures["step"], news["plan"]["key"]
        self.cards = cards["since"]
        self.lab = news.get("lab", {}).get("version", self.lab)
        unfinished = {} if cards["reset"] else dict(self.open)
        for item in cards["items"]:
            unfinished[item["id"]] = item["length"]
            if item["reason"]:
                del unfinished[item["id"]]
        for name in cards["gone"]:
            unfinished.pop(name, None)
        self.open = unfinished


@dataclass(frozen=True)
class Moment:
    """The lab as it was at one moment, to be told to any number of people."""

    lab: Lab
    version: int
    bench: Bench
    frame: Frame
    cards: Cards
    clock: dict[str, Any]
    busy: bool
    plan_key: int
    plan: dict[str, Any] | None

    def since(self, known: Known) -> dict[str, Any]:
        """What is new to somebody, ready for JSON."""
        feed = self.bench.feed
        same = known.feed == feed.name
        since, unfinished = (known.cards, known.open) if same else (-1, {})
        news = {
            "pictures": feed.snapshot(known.feed, known.step, self.frame),
            "cards": self.cards.since(since, unfinished) | {"reset": since < 0},
            "live": self.clock,
            "busy": self.busy,
            "plan": {"key": self.plan_key},
        }
        if self.plan and (known.plan != self.plan_key or not same):
            news["plan"] = {"key": self.plan_key, "plan": self.plan}
        if known.lab != self.version:
            news["lab"] = self.lab.status() | {"version": self.version}
        return news


class News:
    """Takes down how the lab is, and never waits for the engine. For one thread.

    Args:
        lab: that it is about.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._foreseen: StepRecord | None = None  # the plan that was packed last
        self._key, self._plan = 0, None

    def now(self) -> Moment:
        """The lab at this moment."""
        version, bench = self.lab.version, self.lab.bench  # in this order: what comes between is told again
        key, plan = self._look_ahead(bench)
        return Moment(
            self.lab,
            version,
            bench,
            bench.feed.frame(),
            bench.desk.cards(),
            bench.desk.clock(),
            bench.live.busy,
            key,
            plan,
        )

    def _look_ahead(self, bench: Bench) -> tuple[int, dict[str, Any] | None]:
        """The plan for the next step, packed once, and a number by which it is known; 0 if there is none."""
        record = bench.live.preview
        if record is None:
            return 0, None
        if record is not self._foreseen:
            packed = bench.feed.preview(record, bench.live.engine.model.tokenizer.decode)
            if packed is None:  # the pictures lag behind: the next moment will have it
                return 0, None
            self._key, self._foreseen, self._plan = self._key + 1, record, packed
        return self._key, self._plan


def as_json(news: Mapping[str, Any]) -> str:
    """News as a browser reads them."""
    return json.dumps(news, separators=(",", ":"))
