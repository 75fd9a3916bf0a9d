"""What stands between an engine and its picture in a notebook: questions in, plain data out.

No widget here, and no thread: whatever the engine does, it does inside an answer, and for a moment only.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.models.chat import as_chat
from labkit.sampling_params import SamplingParams, check_number
from labkit.serving.limits import Limits
from labkit.views import style
from labkit.views.inspect import page_facts, step_facts
from labkit.views.live_feed import WINDOW, Feed

if TYPE_CHECKING:
    from labkit.engine import Engine
    from labkit.outputs import RequestOutput
    from labkit.trace.records import StepRecord

SLICE = 0.08  # seconds of stepping in one answer, after which cells get their turn
KEEP = 100  # cards, the latest


class Host:
    """Answers what the page asks of an engine, in plain data. Knows no widget.

    Args:
        engine: to show and to step; whoever else steps it does so between two answers.
        clock: seconds, for the speed.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.running = False
        self.held = False  # by whoever pressed pause: what they inject waits as well
        self.speed: float | None = None  # steps a second; None is as fast as it goes
        self._now = clock
        self._due = 0.0  # when the next step is
        self._failure = ""
        self._heard = -1  # the latest step that the feed knows
        self._feed = self._new_feed()
        self._plan: StepRecord | None = None
        self._plan_key = 0
        self._typed: dict[str, str] = {}
        self._seen: dict[str, tuple[int, RequestOutput, int]] = {}  # place in the order, answer, max tokens
        self._places = itertools.count()

    def answer(self, deed: str, question: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked; what was wrong with it comes back as "error", in a sentence."""
        deeds = {
            "pull": self._pull,
            "control": self._control,
            "inject": self._inject,
            "cancel": self._cancel,
            "look": self._look,
        }
        try:
            return deeds[deed](question)
        except ValueError as error:
            return {"error": str(error)}
        except Exception as error:  # the page waits for an answer, whatever happened
            return {"error": f"{type(error).__name__}: {error}"}

    # -- what is new ------------------------------------------------------------------------------

    def _pull(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Run the steps that are due, and tell what is new since the last answer.

        `wait` says in how many milliseconds there will be more, if anything runs.
        """
        self._advance()
        self._listen()
        name, after, cards = question.get("feed"), question.get("after", -1), question.get("cards") or {}
        same = name == self._feed.name
        since, known = (cards.get("since", -1), cards.get("open", {})) if same else (-1, {})
        return {
            "pictures": self._feed.snapshot(name if same else "", after),
            "plan": self._look_ahead(question.get("plan")),
            "cards": self._cards(since, known) | {"reset": since < 0},
            "live": self._clock(),
            "busy": self.running,
            "wait": self._wait(),
            "error": self._failure,
        }

    def _new_feed(self) -> Feed:
        engine = self.engine
        return Feed(engine.trace.meta, min_interval=0, speculative=engine.config.speculative)

    def _listen(self) -> None:
        """Tell the feed of the steps that it has not heard of, whoever ran them."""
        trace = self.engine.trace
        records = trace.records
        start = bisect.bisect_right(records, self._heard, key=lambda record: record.step)
        news: Sequence[StepRecord] = records[start:]
        if not news:
            return
        if len(news) > WINDOW or (start == 0 and self._heard >= 0):  # more than it shows, or than is kept
            self._feed = self._new_feed()
            news = records[-WINDOW:]
            if len(records) > WINDOW:
                before = records[-WINDOW - 1]
                news = [trace.state(before.step, after=True).as_record(before), *news]
        for record in news:
            self._feed.append(record)
        self._heard = news[-1].step

    def _look_ahead(self, known: object) -> dict[str, Any]:
        """The plan for the next step, if one is to come and nothing runs; its key alone if it is `known`."""
        plan = None
        if not self.running and self.engine.has_unfinished:
            with contextlib.suppress(Exception):  # a scheduler that somebody wrote: the step will say it
                plan = self.engine.preview()
        packed = plan and self._feed.preview(plan, self.engine.model.tokenizer.decode)
        if plan is None or packed is None:
            return {"key": 0}
        if plan != self._plan:
            self._plan, self._plan_key = plan, self._plan_key + 1
        return {"key": self._plan_key} if known == self._plan_key else {"key": self._plan_key, "plan": packed}

    # -- the clock --------------------------------------------------------------------------------

    def _advance(self) -> None:
        begin = self._now()
        while self.running and (now := self._now()) - begin < SLICE:
            if self.speed:
                if now < self._due:
                    return
                gap = 1 / self.speed
                self._due += gap if self._due + gap > now else now - self._due + gap  # nothing is made up for
            self._step()

    def _step(self) -> None:
        try:
            if self.engine.has_unfinished:
                self.engine.step()
        except KeyboardInterrupt:  # the notebook's stop button
            self.running, self.held = False, True
        except Exception as error:  # a scheduler or a pool that somebody wrote
            self.running, self._failure = False, f"The step failed: {type(error).__name__}: {error}"
        if not self.engine.has_unfinished:
            self.running = False

    def _wait(self) -> int | None:
        if not self.running:
            return None
        return max(0, round(1000 * (self._due - self._now()))) if self.speed else 0

    def _clock(self) -> dict[str, Any]:
        paused = not self.running and (self.held or self.engine.has_unfinished)
        return {"paused": paused, "speed": self.speed, "failure": ""}

    def _control(self, order: Mapping[str, Any]) -> dict[str, Any]:
        action, value = order.get("action"), order.get("value")
        if action == "speed":
            if value is not None:
                check_number("speed", value, 0.01, 1e6)
            self.speed = value
        elif action == "resume":
            self.held, self.running = False, self.engine.has_unfinished
        elif action in ("pause", "step"):
            self.held, self.running = True, False
            if action == "step":
                self._failure = ""
                self._step()
        if action in ("resume", "speed"):
            self._due, self._failure = 0.0, ""
        return self._clock()

    # -- requests ---------------------------------------------------------------------------------

    def _inject(self, order: Mapping[str, Any]) -> dict[str, Any]:
        prompt, most = order.get("prompt"), order.get("max_tokens")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("The prompt is empty: type something first.")
        Limits().check_prompt(prompt)
        if not str(most).strip().removeprefix("-").isdecimal():
            raise ValueError(f"Max tokens must be a whole number, not {most!r}.")
        params = SamplingParams(max_tokens=int(str(most)))
        name = self.engine.add_request(as_chat(self.engine.model.tokenizer, prompt), params)
        self._typed[name] = prompt
        if not self.held:
            self.running = True
        return {"request": name}

    def _cancel(self, order: Mapping[str, Any]) -> dict[str, Any]:
        wanted = order.get("request")
        for name, output in list(self.engine.outputs.items()):
            if not output.finished and wanted in (None, name):
                self.engine.abort(name)
        return {}

    def _cards(self, since: int, known: Mapping[str, int]) -> dict[str, Any]:
        """Requests since place `since`, and more text of those of which so many characters are `known`."""
        outputs, items = self.engine.outputs, []
        for name, output in outputs.items():
            if name not in self._seen or self._seen[name][1] is not output:
                self._seen[name] = (next(self._places), output, self._most(name, output))
        for name in self._seen.keys() - outputs.keys():  # taken out by a cell
            del self._seen[name]
        recent = set(list(outputs)[-KEEP:])
        for name, output in outputs.items():
            had = known.get(name, 0)
            news = name in known and (output.finished or len(output.text) != had)
            if news or (name in recent and self._seen[name][0] > since):
                items.append(self._card(name, output, had))
        latest = max((place for place, *_ in self._seen.values()), default=since)
        return {"since": latest, "items": items, "gone": list(known.keys() - outputs.keys())}

    def _most(self, name: str, output: RequestOutput) -> int:
        request = self.engine.scheduler.requests.get(name)
        return request.max_len - request.num_prompt_tokens if request else len(output.token_ids)

    def _card(self, name: str, output: RequestOutput, had: int) -> dict[str, Any]:
        at = had if not output.finished and 0 < had <= len(output.text) else 0
        prompt = self._typed.get(name) or self.engine.model.tokenizer.decode(output.prompt_token_ids[:100])
        return {
            "id": name,
            "label": style.label(name),
            "color": style.color_index(name),
            "mine": True,
            "name": "",
            "prompt": prompt[:500],
            "max_tokens": self._seen[name][2],
            "tokens": len(output.token_ids),
            "at": at,  # the text begins with this character: what came before is known
            "text": output.text[at:],
            "length": len(output.text),
            "reason": output.finish_reason,
            "error": output.error,
        }

    # -- a closer look ----------------------------------------------------------------------------

    def _look(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if question.get("block") is not None:
            return page_facts(self, question["block"], question.get("step"))  # type: ignore[arg-type]
        return step_facts(self, question.get("step", -1))  # type: ignore[arg-type]

    def output(self, request_id: str) -> RequestOutput:
        """An answer so far. Raises KeyError if it was taken out."""
        return self.engine.outputs[request_id]
