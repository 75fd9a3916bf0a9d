"""Who handed in which request, what its card says, and who stopped the clock.

Nothing here knows of a page: there are names of visitors, plain numbers and words.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.models.chat import as_chat
from labkit.page.snapshot import Card, Now
from labkit.page.visitors import mark
from labkit.sampling_params import SamplingParams, check_number
from labkit.serving.answer import AnswerProgress
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits

KEEP = 200  # cards that the lab remembers; it remembers more only while more requests are unfinished
MAX_SHOWN = 1000  # characters of a prompt on a card: everybody gets all cards
MIN_SPEED = 0.5  # steps a second: at a lower speed, the shared engine seems to hang


@dataclass
class _Entry:
    """A request that somebody handed in on the page."""

    serial: int
    visitor: str
    owner: str  # the visitor's mark, which others may see
    request_id: str
    prompt: str
    max_tokens: int
    name: str  # the visitor's name, which others may see
    preset: bool  # whether a preset handed it in
    end: AnswerProgress | None = None  # the answer, once it is complete


class Submissions:
    """The requests that visitors hand in, and the clock that all of them share.

    Args:
        live: the engine that all visitors share.
        limits: the limits on what they may hand in.

    Attributes:
        refuses: the reason why nothing is taken in at present; "" if everything is.
        notice: what every page says above its pictures; "" for nothing.
    """

    def __init__(self, live: AsyncEngine, limits: Limits | None = None) -> None:
        self.live = live
        self.limits = limits or Limits()
        self.refuses = ""
        self.notice = ""
        self._door = threading.Lock()  # held while requests are counted and let in: a limit is a limit
        self._waits = False  # whether the engine waits until several requests are handed in
        self._lock = threading.Lock()  # of all that follows: gradio calls from many threads
        self._entries: dict[str, _Entry] = {}
        self._serial = 0
        self._paused_by = self._paused_by_name = ""
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
        (request_id,) = self.inject_all(visitor, [(prompt, params)], raw=raw, name=name)
        return request_id

    def inject_all(
        self,
        visitor: str,
        requests: Sequence[tuple[str, SamplingParams]],
        *,
        raw: bool = False,
        name: str = "",
    ) -> list[str]:
        """Hand in several prompts, each with its parameters, as `inject` does with one. Raises as it does."""
        for prompt, _ in requests:
            self.limits.check_prompt(prompt)
        ids = []
        with self.together():
            self.check_room(visitor, len(requests))
            for prompt, params in requests:
                tokens = prompt if raw else as_chat(self.live.engine.model.tokenizer, prompt)
                ids.append(self.submit(visitor, prompt, tokens, params, name=name))
        return ids

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is handed in while this lasts arrives in one step, and nobody else hands anything in."""
        with self._door:
            self._waits = not self.live.paused
            try:
                if self._waits:
                    self.live.pause()
                yield
            finally:
                if self._waits:
                    self.live.resume()
                self._waits = False

    def check_room(self, visitor: str, more: int = 1) -> None:
        """Raise `ValueError` unless a visitor may hand in so many requests more."""
        if self.refuses:
            raise ValueError(self.refuses)
        own = self.under_way(visitor)
        self.limits.check_room(own, self.live.num_unfinished, more)

    def under_way(self, visitor: str) -> int:
        """The number of a visitor's requests that wait or run."""
        return sum(entry.visitor == visitor and self._unfinished(entry) for entry in self._all())

    def submit(
        self,
        visitor: str,
        prompt: str,
        tokens: str | Sequence[int],
        params: SamplingParams,
        *,
        name: str = "",
        preset: bool = False,
    ) -> str:
        """Hand in what `check_room` has let in: `prompt` is for the card, `tokens` for the engine.

        A request of a `preset` may be longer than those that visitors write. Raises as `inject` does.
        """
        if not preset:
            if isinstance(tokens, str) and self.limits.prompt_tokens is not None:
                tokens = list(self.live.engine.model.tokenizer.encode(tokens))
            self.limits.check_tokens(0 if isinstance(tokens, str) else len(tokens), params.max_tokens)
        request_id = self.live.submit(tokens, params)
        self.enter(visitor, request_id, prompt, params.max_tokens, name=name, preset=preset)
        return request_id

    def enter(
        self,
        visitor: str,
        request_id: str,
        prompt: str,
        max_tokens: int,
        *,
        name: str = "",
        preset: bool = False,
    ) -> None:
        """Make a card for a request that the engine has. Without a visitor it belongs to nobody."""
        if len(prompt) > MAX_SHOWN:
            prompt = prompt[: MAX_SHOWN - 1] + "…"
        with self._lock:
            self._serial += 1
            self._entries[request_id] = _Entry(
                self._serial, visitor, mark(visitor), request_id, prompt, max_tokens, name, preset
            )
            self._evict()

    def _evict(self) -> None:
        """Forget the oldest cards of finished requests.

        A card of an unfinished request stays, because its owner may still cancel it. The latest card stays
        too, because its owner has not seen it yet.
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
        """End one request of a visitor, or all of them. Other people's requests go on.

        Nothing happens for a visitor without a name, because everybody without one would be meant.
        """
        if not visitor:
            return
        for entry in self._all():
            if entry.visitor == visitor and request_id in (None, entry.request_id):
                self.live.abort(entry.request_id)

    def leave(self, visitor: str) -> None:
        """End the requests of a visitor who is gone, and take back their pause and their speed."""
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

    def control(self, visitor: str, action: str, value: float | None = None, *, name: str = "") -> None:
        """Pause, resume, step, or set the speed (None: as fast as it goes), for everyone.

        `name` is the visitor's: everybody sees who paused.

        A visitor without a name is not obeyed, because nothing could be taken back once they are gone.

        Raises:
            ValueError: for a speed that is impossible, or below `MIN_SPEED`.
        """
        if not visitor:
            return
        with self._door, self._lock:
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
                if not self.live.paused:  # else it remains the pause of the person who made it
                    self._paused_by, self._paused_by_name = visitor, name
                if action == "pause":
                    self.live.pause()
                else:
                    self.live.single_step()

    def clock(self) -> dict[str, Any]:
        """Return the state of the clock, which the page's controls show."""
        failure, paused = self.live.failure, self.live.paused and not self._waits
        return {
            "paused": paused,
            "speed": self.live.speed,
            "failure": f"{type(failure).__name__}: {failure}" if failure else "",
            "notice": self.notice,
            "by": self._paused_by_name if self._paused_by and paused else "",
        }

    def now(self) -> Now:
        """All cards, the clock and the plan at this moment."""
        live, clock, cards = self.live, self.clock(), []
        with self._lock:
            serial, entries = self._serial, list(self._entries.values())
        for entry in entries:
            progress = entry.end
            if progress is None:
                try:
                    progress = live.progress(entry.request_id)
                except KeyError:  # it finished long ago
                    continue
                if progress.finish_reason:
                    entry.end = progress
            room = live.engine.max_model_len - progress.num_prompt_tokens
            card = Card(
                serial=entry.serial,
                request=entry.request_id,
                owner=entry.owner,
                name=entry.name,
                prompt=entry.prompt,
                max_tokens=min(entry.max_tokens, room),  # a long answer ends where the model does
                num_tokens=progress.num_tokens,
                text=progress.text,
                finish_reason=progress.finish_reason,
                error=progress.error,
                preset=entry.preset,
            )
            cards.append(card)
        coming = live.preview if clock["paused"] else None
        return Now(clock, live.num_unfinished > 0, coming, serial, cards)

    def _all(self) -> list[_Entry]:
        with self._lock:
            return list(self._entries.values())


def params_of(
    max_tokens: float | None,
    temperature: float | None,
    top_p: float | None,
    seed: str | float | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """The form's fields as `SamplingParams`. A blank seed means no seed.

    What the form does not ask for is as `defaults` say (see `Engine.sampling_defaults`).

    Raises:
        ValueError: for an impossible value; the message names the field.
    """
    if isinstance(seed, str):
        digits = seed.strip()
        seed = int(digits) if digits.removeprefix("-").isdecimal() and len(digits) < 20 else digits or None
    most = _whole(max_tokens)
    check_number("max_tokens", most, 1, math.inf, whole=True)  # None too: a form has to say how many
    asked = {"max_tokens": most, "temperature": temperature, "top_p": top_p, "seed": _whole(seed)}
    return SamplingParams(**(dict(defaults or {}) | asked))


def _whole(number: Any) -> Any:
    """A form sends 64.0 for 64. Anything else goes on as it is, and `SamplingParams` judges it."""
    return int(number) if isinstance(number, float) and number.is_integer() else number
