"""Plays a scenario: its requests come in at their step, or as the next turn after an answer.

The player listens to the engine and runs on its thread, so everything that takes time is done before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from labkit.models.chat import as_chat
from labkit.page.scenarios import Scenario, ScenarioRequest
from labkit.page.submissions import Submissions
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine, EngineStoppedError
from labkit.trace.records import StepRecord

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A request that has yet to come in: at a step, or after the answer to another one."""

    visitor: str
    name: str
    request: ScenarioRequest
    tokens: str | list[int] = ""
    step: int = 0
    after: str = ""  # the id of that other request
    talk: list[dict[str, str]] = field(default_factory=list)  # so far
    rest: tuple[ScenarioRequest, ...] = ()  # the turns that follow


class ScenarioPlayer:
    """Plays scenarios on an engine.

    Args:
        submissions: the place where its requests are handed in, like those that people type.
    """

    def __init__(self, submissions: Submissions) -> None:
        self._submissions = submissions
        self._live: AsyncEngine = submissions.live
        self._lock = threading.Lock()
        self._pending: list[_Pending] = []
        self._unsubscribe: Callable[[], None] = self._live.subscribe(self._follow, last=0)

    def play(self, visitor: str, scenario: Scenario, *, name: str = "") -> None:
        """Begin a scenario for a visitor; its requests count as theirs.

        Raises:
            ValueError: if it is beyond the limits, or one of its requests could not be served.
            EngineStoppedError: if the engine has stopped.
        """
        self._submissions.check_room(visitor, len(scenario.requests))
        if scenario.talk:
            first, *rest = scenario.requests
            self._take_turn(_Pending(visitor, name, first, rest=tuple(rest)))
            return
        pending = [_Pending(visitor, name, request, self._tokens(request)) for request in scenario.requests]
        longest = self._live.engine.max_model_len
        for one in pending:  # better now than in the middle of the scenario
            length = len(one.tokens) + one.request.max_tokens
            if length > longest:
                raise ValueError(
                    f"A request of this preset may have {length} tokens, and this engine holds {longest} at "
                    "most: it needs more pages, or larger ones."
                )
        with self._submissions.together():  # or the first step may begin without the others
            records = self._live.records()
            for one in pending:
                if not one.request.after:
                    self._submit(one)
                    continue
                one.step = (records[-1].step if records else -1) + one.request.after
                with self._lock:
                    self._pending.append(one)

    def drop(self, visitor: str) -> None:
        """Play nothing more for a visitor."""
        with self._lock:
            self._pending = [one for one in self._pending if one.visitor != visitor]

    def drop_all(self) -> None:
        """Play nothing more for anybody."""
        with self._lock:
            self._pending.clear()

    def close(self) -> None:
        """Play nothing more, and listen no more."""
        self._unsubscribe()
        self.drop_all()

    def _follow(self, record: StepRecord) -> None:
        """Hand in what is due after a step."""
        with self._lock:
            if not self._pending:
                return
            ended = {finish.request_id: finish.reason for finish in record.finished}
            idle = not self._live.engine.has_unfinished  # no step will come: what waits for one is due now
            due = [
                one
                for one in self._pending
                if one.after in ended or (not one.after and (idle or record.step >= one.step))
            ]
            self._pending = [one for one in self._pending if one not in due]
        for one in due:
            try:
                if not one.after:
                    self._submit(one)
                elif ended[one.after] in ("stop", "length"):
                    answer = self._live.output(one.after).text
                    one.talk.append({"role": "assistant", "content": answer})
                    self._take_turn(one)
            except (ValueError, KeyError, EngineStoppedError):  # limits, or a pool that has become too small
                logger.info("a scenario ended early", exc_info=True)

    def _take_turn(self, one: _Pending) -> None:
        """Hand in the next turn of a talk, and keep the one after it until the answer is complete."""
        one.talk.append({"role": "user", "content": one.request.prompt})
        one.tokens = as_chat(self._live.engine.model.tokenizer, one.talk)
        with self._lock:  # the answer may be complete before we are back
            request_id = self._submit(one)
            if one.rest:
                following, *rest = one.rest
                self._pending.append(
                    _Pending(
                        one.visitor, one.name, following, after=request_id, talk=one.talk, rest=tuple(rest)
                    )
                )

    def _tokens(self, request: ScenarioRequest) -> list[int]:
        tokenizer = self._live.engine.model.tokenizer
        system = [{"role": "system", "content": request.system}] if request.system else []
        tokens = as_chat(tokenizer, [*system, {"role": "user", "content": request.prompt}])
        return list(tokenizer.encode(tokens)) if isinstance(tokens, str) else tokens

    def _submit(self, one: _Pending) -> str:
        ends_itself = bool(one.talk)
        params = SamplingParams(
            max_tokens=one.request.max_tokens, temperature=0.0, ignore_eos=not ends_itself
        )
        prompt, tokens = one.request.prompt, one.tokens
        return self._submissions.submit(one.visitor, prompt, tokens, params, name=one.name, preset=True)
