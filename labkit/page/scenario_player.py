"""Plays a scene: requests that come in at their step, or as an answer to an answer, whoever watches.

It listens to the engine and runs on its thread, so everything that takes time is done before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from labkit.models.chat import as_chat
from labkit.page.scenarios import Line, Preset
from labkit.page.submissions import Desk
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from labkit.trace.records import StepRecord

logger = logging.getLogger(__name__)


@dataclass
class _Cue:
    """A request that waits for its turn: at a step, or after the answer to another."""

    visitor: str
    name: str
    line: Line
    tokens: str | list[int] = ""
    step: int = 0
    after: str = ""  # this request
    talk: list[dict[str, str]] = field(default_factory=list)  # so far
    rest: tuple[Line, ...] = ()  # the turns that follow


class Player:
    """Plays scenes on an engine.

    Args:
        desk: where its requests are handed in, so that they are like those that people type.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._live: AsyncEngine = desk.live
        self._lock = threading.Lock()
        self._cues: list[_Cue] = []
        self._deaf: Callable[[], None] = self._live.subscribe(self._hear, last=0)

    def play(self, visitor: str, preset: Preset, *, name: str = "") -> None:
        """Begin a scene for a visitor; its requests count as theirs.

        Raises:
            ValueError: if it is beyond the limits, or a request of it could not be served.
            EngineStoppedError: if the engine has stopped.
        """
        desk = self._desk
        desk.check_room(visitor, len(preset.lines))
        if preset.talk:
            self._turn(_Cue(visitor, name, preset.lines[0], rest=preset.lines[1:]))
            return
        cues = [_Cue(visitor, name, line, self._tokens(line)) for line in preset.lines]
        longest = self._live.engine.max_model_len
        for cue in cues:  # better now than in the middle of it
            if len(cue.tokens) + cue.line.max_tokens > longest:
                raise ValueError(
                    f"A request of this preset may have {len(cue.tokens) + cue.line.max_tokens} tokens, and "
                    f"this engine holds {longest} at most: it needs more pages, or larger ones."
                )
        records = self._live.engine.trace.records
        now = records[-1].step if records else -1
        for cue in cues:
            if not cue.line.after:
                self._submit(cue)
                continue
            cue.step = now + cue.line.after
            with self._lock:
                self._cues.append(cue)

    def drop(self, visitor: str) -> None:
        """Play nothing more for a visitor."""
        with self._lock:
            self._cues = [cue for cue in self._cues if cue.visitor != visitor]

    def close(self) -> None:
        """Listen no more."""
        self._deaf()
        with self._lock:
            self._cues.clear()

    def _hear(self, record: StepRecord) -> None:
        ended = {finish.request_id: finish.reason for finish in record.finished}
        idle = (
            not self._live.engine.has_unfinished
        )  # no step would come any more: whoever waits for one is due
        with self._lock:
            if not self._cues:
                return
            due = [
                cue
                for cue in self._cues
                if cue.after in ended or (not cue.after and (idle or record.step >= cue.step))
            ]
            self._cues = [cue for cue in self._cues if cue not in due]
        for cue in due:
            try:
                if not cue.after:
                    self._submit(cue)
                elif ended[cue.after] in ("stop", "length"):
                    answer = self._live.output(cue.after).text
                    cue.talk.append({"role": "assistant", "content": answer})
                    self._turn(cue)
            except (
                ValueError,
                KeyError,
                EngineStoppedError,
            ):  # the limits, or a pool that has become too small
                logger.info("a scene ended early", exc_info=True)

    def _turn(self, cue: _Cue) -> None:
        """Hand in the next turn of a talk, and wait for its answer."""
        cue.talk.append({"role": "user", "content": cue.line.prompt})
        cue.tokens = as_chat(self._live.engine.model.tokenizer, cue.talk)
        with self._lock:  # it may be answered before we are back
            request_id = self._submit(cue)
            if cue.rest:
                first, *rest = cue.rest
                self._cues.append(
                    _Cue(cue.visitor, cue.name, first, after=request_id, talk=cue.talk, rest=tuple(rest))
                )

    def _tokens(self, line: Line) -> list[int]:
        tokenizer = self._live.engine.model.tokenizer
        system = [{"role": "system", "content": line.system}] if line.system else []
        tokens = as_chat(tokenizer, [*system, {"role": "user", "content": line.prompt}])
        return list(tokenizer.encode(tokens)) if isinstance(tokens, str) else tokens

    def _submit(self, cue: _Cue) -> str:
        params = _params(cue.line, ends_itself=bool(cue.talk))
        return self._desk.submit(cue.visitor, cue.line.prompt, cue.tokens, params, name=cue.name)


def _params(line: Line, *, ends_itself: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens=line.max_tokens, temperature=0.0, ignore_eos=not ends_itself)
