"""What the page's JavaScript asks of the lab. Each answer is a JSON text.

Anybody can send anything here, so what comes in is checked before it goes further.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from labkit.laboratory import Bench, Lab
from labkit.lens import page_facts, step_facts
from labkit.live import EngineStoppedError
from labkit.trace import StepRecord

MS_PER_VISITOR = 4  # between two questions of a page: fifty pages ask five times a second each


class Api:
    """The functions that `gr.HTML` hands to the browser.

    Args:
        lab: that they ask.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._seen: StepRecord | None = None  # the plan that was packed last
        self._key, self._packed = 0, ""

    @property
    def functions(self) -> list[Callable[..., Any]]:
        methods = (self.pull, self.control, self.cancel, self.look, self.change, self.play, self.rename)
        return [_plain(method) for method in methods]

    async def pull(self, question: dict[str, Any]) -> str:
        """What is new since the last answer: pictures, cards, the clock, the plan, the settings."""
        bench, lab = self.lab.bench, self.lab
        name, after = question.get("feed"), _whole(question.get("after"), -1)
        cards = question.get("cards") or {}
        same = name == bench.feed.name
        since, known = (_whole(cards.get("since"), -1), _counts(cards.get("open"))) if same else (-1, {})
        news = bench.desk.cards(_text(question.get("visitor")), since, known)
        answer = {
            "cards": news | {"reset": not same or since < 0},
            "live": bench.desk.clock(),
            "busy": bench.live.busy,
            "every": MS_PER_VISITOR * len(lab.visitors),
        }
        if question.get("lab") != lab.version:
            answer["lab"] = lab.status() | {"version": lab.version}
        text = json.dumps(answer, separators=(",", ":"))
        pictures = bench.feed.snapshot_text(name if same else "", after)
        return f'{text[:-1]},"pictures":{pictures},"plan":{self._plan(bench, question.get("plan"))}}}'

    def _plan(self, bench: Bench, known: object) -> str:
        """The plan for the next step, unless the browser has it. Packed once for all of them."""
        record = bench.live.preview
        if record is None:
            return '{"key":0}'
        if record is not self._seen:
            packed = bench.feed.preview(record)
            if packed is None:  # the pictures lag behind: the next answer will have it
                return '{"key":0}'
            self._key, self._seen = self._key + 1, record
            self._packed = json.dumps({"key": self._key, "plan": packed}, separators=(",", ":"))
        return f'{{"key":{self._key}}}' if known == self._key else self._packed

    async def control(self, order: dict[str, Any]) -> str:
        """Pause, resume, step, or set the speed."""
        desk = self.lab.bench.desk
        visitor = _text(order.get("visitor"))
        if visitor in self.lab.visitors:
            try:
                desk.control(visitor, _text(order.get("action")), order.get("value"))
            except ValueError as error:
                return json.dumps(desk.clock() | {"error": str(error)})
        return json.dumps(desk.clock())

    async def cancel(self, order: dict[str, Any]) -> str:
        """Cancel one of the visitor's requests, or all."""
        request = order.get("request")
        self.lab.bench.desk.cancel(_text(order.get("visitor")), None if request is None else _text(request))
        return "true"

    async def look(self, question: dict[str, Any]) -> str:
        """One step in full, or one page."""
        live = self.lab.bench.live
        step = question.get("step")
        step = None if step is None else _whole(step, -1)

        def facts() -> dict[str, Any]:
            if question.get("block") is not None:
                return page_facts(live, question["block"], step)
            return step_facts(live, -1 if step is None else step)

        return await _answer(facts)

    async def change(self, order: dict[str, Any]) -> str:
        """Restart the engine with other settings."""
        settings, running = _mapping(order.get("settings")), _text(order.get("running"))
        return await _answer(lambda: self._known(order) and self.lab.change(settings, running=running))

    async def play(self, order: dict[str, Any]) -> str:
        """Play a preset."""
        visitor, preset = _text(order.get("visitor")), _text(order.get("preset"))
        settings, running = _mapping(order.get("settings")), _text(order.get("running"))
        return await _answer(
            lambda: self._known(order) and self.lab.play(visitor, preset, settings, running=running)
        )

    async def rename(self, order: dict[str, Any]) -> str:
        """Take a name that others see."""
        return json.dumps(
            {"name": self.lab.visitors.rename(_text(order.get("visitor")), _text(order.get("name")))}
        )

    def _known(self, order: Mapping[str, Any]) -> bool:
        if _text(order.get("visitor")) not in self.lab.visitors:
            raise ValueError("The lab does not know this page any more: reload it.")
        return True


def _plain(method: Callable[[dict[str, Any]], Awaitable[str]]) -> Callable[..., Any]:
    """A method as a function: gradio marks what it hands to a browser, and a method cannot be marked."""

    async def call(argument: Any) -> str:
        return await method(_mapping(argument))

    call.__name__ = method.__name__
    return call


async def _answer(act: Callable[[], Any]) -> str:
    """Do it off the event loop, for it may take a while; what was wrong comes back as "error"."""
    try:
        return json.dumps(await asyncio.to_thread(act))
    except (ValueError, EngineStoppedError) as error:
        return json.dumps({"error": str(error)})


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _counts(value: object) -> dict[str, int]:
    return {name: _whole(count, 0) for name, count in _mapping(value).items()}
