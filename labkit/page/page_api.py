"""What the page's JavaScript asks of the lab. Each answer is a JSON text.

Anybody can send anything here, so what comes in is checked before it goes further.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from labkit.page.hosting import Hosting
from labkit.page.joining import Served, joining
from labkit.page.session import Lab
from labkit.page.snapshot import ClientState, Snapshotter, text_in
from labkit.page.visitors import mark
from labkit.serving.async_engine import EngineStoppedError

MAX_TAB = 64  # characters of the name that gradio gives a page
MS_PER_PAGE = 4  # between two questions of a page: fifty pages that ask do so five times a second each


class Api:
    """The functions that `gr.HTML` hands to the browser.

    Args:
        lab: the lab that they act on.
        snapshotter: the source of what is new in it.
        served: a function that says where the page is served.
    """

    def __init__(self, lab: Lab, snapshotter: Snapshotter, served: Callable[[], Served] = Served) -> None:
        self.lab, self._snapshotter, self._served = lab, snapshotter, served
        self._hosting = Hosting(lab)

    @property
    def functions(self) -> list[Callable[..., Any]]:
        methods = (
            self.arrive,
            self.pull,
            self.control,
            self.cancel,
            self.look,
            self.change,
            self.play,
            self.rename,
            self.claim,
            self.host,
            self.join,
        )
        return [_plain(method) for method in methods]

    async def arrive(self, order: dict[str, Any]) -> str:
        """Take note of a page that says again that it is here, and tell it who it is.

        `news` says that the page was unknown: its connection was lost, or this is another lab by now.
        """
        tab, visitors = text_in(order, "tab")[:MAX_TAB], self.lab.visitors
        news = not visitors.has(tab)
        visitor = visitors.arrive(tab, text_in(order, "visitor"))
        return json.dumps({"visitor": visitor, "mark": mark(visitor), "news": news})

    async def pull(self, question: dict[str, Any]) -> str:
        """Tell a page without a stream what is new since the last answer."""
        self.lab.visitors.hear(text_in(question, "visitor"))
        update = self._snapshotter.take().tell(ClientState.read(question))
        every = MS_PER_PAGE * self.lab.visitors.num_asking
        return json.dumps(update | {"every": every}, separators=(",", ":"))

    async def control(self, order: dict[str, Any]) -> str:
        """Pause, resume, step, or set the speed."""
        visitor = text_in(order, "visitor")
        if visitor not in self.lab.visitors:
            return json.dumps(self.lab.session.submissions.clock())
        try:
            clock = self.lab.control(visitor, text_in(order, "action"), order.get("value"))
        except ValueError as error:
            return json.dumps(self.lab.session.submissions.clock() | {"error": str(error)})
        return json.dumps(clock)

    async def cancel(self, order: dict[str, Any]) -> str:
        """Cancel one of the visitor's requests, or all."""
        request = None if order.get("request") is None else text_in(order, "request")
        visitor = text_in(order, "visitor")
        if visitor in self.lab.visitors:
            self.lab.session.submissions.cancel(visitor, request)
        return "true"

    async def look(self, question: dict[str, Any]) -> str:
        """One step in full, or one block."""
        step = question.get("step")
        if isinstance(step, bool) or not isinstance(step, int | None):
            step = -1  # which no trace holds
        inspector = self.lab.session.inspector
        return await _answer(lambda: inspector.look(question.get("block"), step))

    async def change(self, order: dict[str, Any]) -> str:
        """Restart the engine with other settings."""
        settings, running = _mapping(order.get("settings")), text_in(order, "running")
        return await _answer(lambda: self._known(order) and self._change(order, settings, running))

    async def play(self, order: dict[str, Any]) -> str:
        """Play a scenario."""
        visitor, scenario = text_in(order, "visitor"), text_in(order, "scenario")
        settings, how = _mapping(order.get("settings")), {"running": text_in(order, "running")}
        how |= {"anew": order.get("anew") is True}
        return await _answer(lambda: self._known(order) and self.lab.play(visitor, scenario, settings, **how))

    async def rename(self, order: dict[str, Any]) -> str:
        """Take a name that others see. A page sends it first, and is heard from with it."""
        visitor, visitors = text_in(order, "visitor"), self.lab.visitors
        if visitor not in visitors:  # else its first request, if it comes before its next pull, is nobody's
            visitors.hear(visitor)
        name = visitors.rename(visitor, text_in(order, "name"))
        return json.dumps({"name": name})

    def _change(self, order: dict[str, Any], settings: dict[str, Any], running: str) -> dict[str, Any]:
        return self.lab.change(settings, running=running, visitor=text_in(order, "visitor"))

    async def claim(self, order: dict[str, Any]) -> str:
        """Say whether the page is a host's, which the key in its link makes it."""
        return json.dumps({"host": self._hosting.claim(text_in(order, "visitor"), text_in(order, "key"))})

    async def host(self, order: dict[str, Any]) -> str:
        """Do what only a host may."""
        asked = [text_in(order, name) for name in ("visitor", "action", "name")]
        return await _answer(lambda: self._hosting.act(*asked))

    async def join(self, order: dict[str, Any]) -> str:
        """Say how others join the page that a browser shows under an address."""
        shown = text_in(order, "shown")
        return await _answer(lambda: joining(shown, self._served())._asdict())

    def _known(self, order: Mapping[str, Any]) -> bool:
        if text_in(order, "visitor") not in self.lab.visitors:
            raise ValueError("The lab does not know this page any more: reload it.")
        return True


def _plain(method: Callable[[dict[str, Any]], Awaitable[str]]) -> Callable[..., Any]:
    """A method as a function: gradio marks what it hands to a browser, and a method cannot be marked."""

    async def call(argument: Any) -> str:
        return await method(_mapping(argument))

    call.__name__ = method.__name__
    return call


async def _answer(act: Callable[[], Any]) -> str:
    """Do it off the event loop, because it may take a while. What was wrong comes back as "error"."""
    try:
        return json.dumps(await asyncio.to_thread(act))
    except (ValueError, EngineStoppedError) as error:
        return json.dumps({"error": str(error)})


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
