"""What the page's JavaScript asks of the lab. Each answer is a JSON text.

Anybody can send anything here, so what comes in is checked before it goes further.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from labkit.page.snapshot import Known, News, as_json
from labkit.serving.async_engine import EngineStoppedError
from labkit.views.inspect import page_facts, step_facts

MS_PER_VISITOR = 4  # between two questions of a page: fifty pages ask five times a second each


class Api:
    """The functions that `gr.HTML` hands to the browser.

    Args:
        news: of the lab that they ask.
    """

    def __init__(self, news: News) -> None:
        self.news, self.lab = news, news.lab

    @property
    def functions(self) -> list[Callable[..., Any]]:
        methods = (self.pull, self.control, self.cancel, self.look, self.change, self.play, self.rename)
        return [_plain(method) for method in methods]

    async def pull(self, question: dict[str, Any]) -> str:
        """What is new since the last answer, for a page that hears no broadcast."""
        cards = _mapping(question.get("cards"))
        known = Known(
            feed=_text(question.get("feed")),
            step=_whole(question.get("after"), -1),
            plan=_whole(question.get("plan"), 0),
            cards=_whole(cards.get("since"), -1),
            open=_counts(cards.get("open")),
            lab=_whole(question.get("lab"), -1),
        )
        news = self.news.now().since(known)
        return as_json(news | {"every": MS_PER_VISITOR * len(self.lab.visitors)})

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
