"""The desk of the lab: who handed in which request, what their cards say, and who stopped the clock.

No page here: names of visitors, plain numbers and words.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.models.chat import as_chat
from labkit.page.visitors import mark
from labkit.sampling_params import SamplingParams, check_number
from labkit.serving.answer import AnswerProgress
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits
from labkit.views import style

KEEP = 200  # cards that the lab remembers, and more only while that many requests are unfinished
MIN_SPEED = 0.5  # steps a second: slower than that, the shared engine seems to hang


@dataclass
class _Entry:
    """A request that somebody handed in on the page."""

    serial: int
    visitor: str
    owner: str  # the visitor, as others may know them
    request_id: str
    prompt: str
    max_tokens: int
    name: str  # that the visitor goes by
    end: AnswerProgress | None = None  # once it is over


@dataclass(frozen=True)
class Cards:
    """All cards as they were at one moment."""

    serial: int  # of the latest
    longest: int  # tokens that the model can hold
    shown: tuple[tuple[_Entry, AnswerProgress], ...]

    def since(self, serial: int, known: Mapping[str, int]) -> dict[str, Any]:
        """What is new on them: those after number `serial`, and more text on others, ready for JSON.

        `known` says how many characters of which unfinished card somebody has: of those only what changes is
        told again. Those that are no more are listed under "gone": whoever looked away for long would wait in
        vain.
        """
        items = []
        for entry, progress in self.shown:
            had = known.get(entry.request_id)
            if had is None and entry.serial > serial:
                items.append(self._facts(entry, progress) | _growth(progress, 0))
            elif had is not None and (progress.finish_reason or len(progress.text) != had):
                items.append({"id": entry.request_id} | _growth(progress, had))
        gone = known.keys() - {entry.request_id for entry, _ in self.shown}
        return {"since": self.serial, "items": items, "gone": list(gone)}

    def _facts(self, entry: _Entry, progress: AnswerProgress) -> dict[str, Any]:
        room = self.longest - progress.num_prompt_tokens
        return {
            "id": entry.request_id,
            "serial": entry.serial,
            "label": style.label(entry.request_id),
            "color": style.color_index(entry.request_id),
            "owner": entry.owner,
            "name": entry.name,
            "prompt": entry.prompt,
            "max_tokens": min(entry.max_tokens, room),  # a long answer ends where the model does
        }


def _growth(progress: AnswerProgress, had: int) -> dict[str, Any]:
    at = had if not progress.finish_reason and had <= len(progress.text) else 0
    return {
        "tokens": progress.num_tokens,
        "at": at,  # the text begins with this character: what came before is known
        "text": progress.text[at:],
        "length": len(progress.text),
        "reason": progress.finish_reason,
        "error": progress.error,
    }


class Desk:
    """Who handed in which request, and what their cards say.

    Args:
        live: the engine that all visitors share.
        limits: on what they may hand in.

    Attributes:
        refuses: why nothing is taken in at present; "" if it is.
    """

    def __init__(self, live: AsyncEngine, limits: Limits | None = None) -> None:
        self.live = live
        self.limits = limits or Limits()
        self.refuses = ""
        self._door = threading.Lock()  # held while one request is counted and let in: a limit is a limit
        self._lock = threading.Lock()  # of all that follows: gradio calls from many threads
        self._entries: dict[str, _Entry] = {}
        self._serial = 0
        self._paused_by = ""
        self._speed_by = ""  # who chose the speed; "" if no visitor did
        self._speed_chosen: float | None = None
        self._speed_before: float | None = None  # what it was before visitors chose

    def inject(
        self, visitor: str, prompt: str, params: SamplingParams, *, raw: bool = False, name: str = ""
    ) -> str:
        """Hand in a request for a visitor; unless `raw`, as a chat message if the model knows chat.

        Raises:
            ValueError: for a prompt or parameters that cannot be served, or are beyond the limits.
            EngineStoppedError: if the engine has stopped.
        """
        self.limits.check_prompt(prompt)
        with self._door:
            self.check_room(visitor)
            tokens = prompt if raw else as_chat(self.live.engine.model.tokenizer, prompt)
            return self.submit(visitor, prompt, tokens, params, name=name)

    def check_room(self, visitor: str, more: int = 1) -> None:
        """Raise `ValueError` unless a visitor may hand in so many requests more."""
        if self.refuses:
            raise ValueError(self.refuses)
        own = sum(entry.visitor == visitor and self._unfinished(entry) for entry in self._all()[1])
        self.limits.check_room(own, self.live.num_unfinished, more)

    def submit(
        self,
        visitor: str,
        prompt: str,
        tokens: str | Sequence[int],
        params: SamplingParams,
        *,
        name: str = "",
    ) -> str:
        """Hand in what `check_room` has let in: `prompt` is for the card, `tokens` for the engine.

        Raises as `inject` does.
        """
        if isinstance(tokens, str) and self.limits.prompt_tokens is not None:
            tokens = list(self.live.engine.model.tokenizer.encode(tokens))
        self.limits.check_tokens(0 if isinstance(tokens, str) else len(tokens), params.max_tokens)
        request_id = self.live.submit(tokens, params)
        self.enter(visitor, request_id, prompt, params.max_tokens, name=name)
        return request_id

    def enter(self, visitor: str, request_id: str, prompt: str, max_tokens: int, *, name: str = "") -> None:
        """Make a card for a request that the engine has; one without a visitor is nobody's own."""
        with self._lock:
            self._serial += 1
            self._entries[request_id] = _Entry(
                self._serial, visitor, mark(visitor), request_id, prompt, max_tokens, name
            )
            self._evict()

    def _evict(self) -> None:
        """Forget the oldest cards of finished requests. One that runs stays: its owner may cancel it yet.

        The latest stays too, for its owner has not seen it.
        """
        excess = len(self._entries) - KEEP
        for entry in list(self._entries.values())[:-1]:
            if excess <= 0:
                return
            if not self._unfinished(entry):
                del self._entries[entry.request_id]
                excess -= 1

    def _unfinished(self, entry: _Entry) -> bool:
        return self.live.unfinished(entry.request_id)

    def cancel(self, visitor: str, request_id: str | None = None) -> None:
        """End one request of a visitor, or all of them. Other people's are left alone.

        Nothing happens for a visitor without a name: everybody without one would be meant.
        """
        if not visitor:
            return
        for entry in self._all()[1]:
            if entry.visitor == visitor and request_id in (None, entry.request_id):
                self.live.abort(entry.request_id)

    def leave(self, visitor: str) -> None:
        """A visitor is gone: end their requests, and take back their pause and their speed."""
        if not visitor:
            return
        self.cancel(visitor)
        with self._lock:
            if self._paused_by == visitor:
                self._paused_by = ""
                if self.live.paused:
                    self.live.resume()
            if self._speed_by == visitor:
                self._speed_by = ""
                if self.live.speed == self._speed_chosen:  # else the host has set another since
                    self.live.speed = self._speed_before

    def control(self, visitor: str, action: str, value: float | None = None) -> None:
        """Pause, resume, step, or set the speed (None: flat out), for everyone.

        A visitor without a name is not obeyed: nobody could take back what they did once they are gone.

        Raises:
            ValueError: for a speed that cannot be, or is below `MIN_SPEED`.
        """
        if not visitor:
            return
        with self._lock:
            if action == "resume":
                self._paused_by = ""
                self.live.resume()
            elif action == "speed":
                if value is not None:
                    check_number("speed", value, MIN_SPEED, 1e6)
                if not self._speed_by or self.live.speed != self._speed_chosen:  # it is the host's
                    self._speed_before = self.live.speed
                self._speed_by, self._speed_chosen = visitor, value
                self.live.speed = value
            elif action in ("pause", "step"):
                if not self.live.paused:  # else it stays the pause of whoever made it
                    self._paused_by = visitor
                if action == "pause":
                    self.live.pause()
                else:
                    self.live.single_step()

    def clock(self) -> dict[str, Any]:
        """The state of the clock, for the page's controls."""
        failure = self.live.failure
        return {
            "paused": self.live.paused,
            "speed": self.live.speed,
            "failure": f"{type(failure).__name__}: {failure}" if failure else "",
        }

    def cards(self) -> Cards:
        """All cards as they are now."""
        serial, entries = self._all()
        shown = []
        for entry in entries:
            progress = entry.end or self._progress(entry)
            if progress:
                shown.append((entry, progress))
        return Cards(serial, self.live.engine.max_model_len, tuple(shown))

    def _progress(self, entry: _Entry) -> AnswerProgress | None:
        try:
            progress = self.live.progress(entry.request_id)
        except KeyError:  # finished long ago
            return None
        if progress.finish_reason:
            entry.end = progress
        return progress

    def _all(self) -> tuple[int, list[_Entry]]:
        with self._lock:
            return self._serial, list(self._entries.values())


def params_of(
    max_tokens: float | None, temperature: float | None, top_p: float | None, seed: str | float | None = None
) -> SamplingParams:
    """The form's fields as `SamplingParams`; a blank seed is none.

    Raises:
        ValueError: for a value that cannot be; the message names the field.
    """
    if isinstance(seed, str):
        digits = seed.strip()
        seed = int(digits) if digits.removeprefix("-").isdecimal() and len(digits) < 20 else digits or None
    return SamplingParams(
        max_tokens=_whole(max_tokens),
        temperature=temperature,  # type: ignore[arg-type]
        top_p=top_p,  # type: ignore[arg-type]
        seed=_whole(seed),
    )


def _whole(number: Any) -> Any:
    """A form sends 64.0 for 64; anything else goes on as it is, for `SamplingParams` to judge."""
    return int(number) if isinstance(number, float) and number.is_integer() else number
