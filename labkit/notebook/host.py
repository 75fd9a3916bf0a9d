"""What stands between an engine and its picture in a notebook: questions in, plain data out.

There is no widget here, and no thread. The engine only runs inside an answer, and only for a moment.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.models.chat import as_chat
from labkit.models.token_bytes import decode_inside
from labkit.page.snapshot import Card, ClientState, Now, Snapshotter
from labkit.sampling_params import SamplingParams, check_number
from labkit.serving.limits import Limits
from labkit.trace.records import StepRecord
from labkit.views.inspect import Inspector
from labkit.views.live_feed import WINDOW, Feed

if TYPE_CHECKING:
    from labkit.engine import Engine
    from labkit.outputs import RequestOutput

SLICE = 0.08  # seconds of stepping in one answer, after which cells get their turn
KEEP = 100  # cards, the latest


class Stepper:
    """Steps an engine on demand: only inside `advance` and `step`, at a speed, until nothing is left to do.

    Args:
        engine: the engine; cells may step it too, between two calls.
        clock: a function that returns seconds, by which the speed is kept.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.running = False
        self.held = False  # a person pressed pause, so that what they inject waits as well
        self.speed: float | None = None  # steps a second; None is as fast as it goes
        self.failure = ""
        self._engine = engine
        self._now = clock
        self._due = 0.0  # the time of the next step

    def advance(self) -> None:
        """Run the steps that are due, but only for a moment."""
        begin = self._now()
        while self.running and (now := self._now()) - begin < SLICE:
            if self.speed:
                if now < self._due:
                    return
                gap = 1 / self.speed
                self._due += gap if self._due + gap > now else now - self._due + gap  # no step is made up for
            self.step()

    def step(self) -> None:
        """Run one step, if there is something to do."""
        try:
            if self._engine.has_unfinished:
                self._engine.step()
        except KeyboardInterrupt:  # the notebook's stop button
            self.running, self.held = False, True
        except Exception as error:  # in a scheduler or a pool that somebody wrote
            self.running, self.failure = False, f"The step failed: {type(error).__name__}: {error}"
        if not self._engine.has_unfinished:
            self.running = False

    def control(self, action: object, value: Any = None) -> None:
        """Pause, resume, step, or set the speed. Raises ValueError for an impossible speed."""
        if action == "speed":
            if value is not None:
                check_number("speed", value, 0.01, 1e6)
            self.speed = value
        elif action == "resume":
            self.held, self.running = False, self._engine.has_unfinished
        elif action in ("pause", "step"):
            self.held, self.running = True, False
            if action == "step":
                self.failure = ""
                self.step()
        if action in ("resume", "speed"):
            self._due, self.failure = 0.0, ""

    def wait(self) -> int | None:
        """Milliseconds until the next step is due; None if nothing runs."""
        if not self.running:
            return None
        return max(0, round(1000 * (self._due - self._now()))) if self.speed else 0

    def clock(self) -> dict[str, Any]:
        """Return the state of the clock, which the controls show."""
        paused = not self.running and (self.held or self._engine.has_unfinished)
        return {"paused": paused, "speed": self.speed, "failure": ""}


class _Known(NamedTuple):
    """What the card of a request says from its beginning to its end."""

    serial: int
    output: RequestOutput
    prompt: str
    max_tokens: int


class NotebookSession:
    """A notebook's own engine, as a snapshot asks it.

    Args:
        engine: the engine to show.
        stepper: the clock of the engine.
    """

    def __init__(self, engine: Engine, stepper: Stepper) -> None:
        self.decode = decode_inside(engine.model.tokenizer)
        self.typed: dict[str, str] = {}  # the prompts that came from the page
        self._engine = engine
        self._stepper = stepper
        self._latest = -1  # the latest step that the feed knows
        self._known: dict[str, _Known] = {}
        self._serials = itertools.count()
        self.feed = self._new_feed()

    def _new_feed(self) -> Feed:
        engine = self._engine
        return Feed(engine.trace.meta, min_interval=0, speculative=engine.config.speculative)

    def catch_up(self) -> None:
        """Tell the feed of the steps that it does not know, including those that cells ran."""
        trace = self._engine.trace
        records = trace.records
        start = bisect.bisect_right(records, self._latest, key=lambda record: record.step)
        fresh: Sequence[StepRecord] = records[start:]
        if not fresh:
            return
        if len(fresh) > WINDOW or (start == 0 and self._latest >= 0):  # more than it shows, or than is kept
            self.feed = self._new_feed()
            fresh = records[-WINDOW:]
            if len(records) > WINDOW:
                before = records[-WINDOW - 1]
                fresh = [trace.state(before.step, after=True).as_record(before), *fresh]
        for record in fresh:
            self.feed.append(record)
        self._latest = fresh[-1].step

    def now(self) -> Now:
        """All cards, the clock and the plan at this moment."""
        outputs = self._engine.outputs
        for name, output in outputs.items():
            if name not in self._known or self._known[name].output is not output:
                self._known[name] = self._get_to_know(name, output)
        for name in self._known.keys() - outputs.keys():  # a cell took it out
            del self._known[name]
        serials = [known.serial for known in self._known.values()]
        before = sorted(serials)[-KEEP] - 1 if len(serials) > KEEP else -1
        cards = []
        for name in outputs:
            serial, output, prompt, most = self._known[name]
            card = Card(
                serial=serial,
                request=name,
                owner="",
                name="",
                prompt=prompt,
                max_tokens=most,
                num_tokens=len(output.token_ids),
                text=output.text,
                finish_reason=output.finish_reason,
                error=output.error,
            )
            cards.append(card)
        clock = self._stepper.clock()
        return Now(clock, self._stepper.running, self._coming(), max(serials, default=-1), cards, before)

    def _get_to_know(self, name: str, output: RequestOutput) -> _Known:
        request = self._engine.scheduler.requests.get(name)
        most = request.max_len - request.num_prompt_tokens if request else len(output.token_ids)
        prompt = self.typed.get(name) or self._engine.model.tokenizer.decode(output.prompt_token_ids[:100])
        return _Known(next(self._serials), output, prompt[:500], most)

    def _coming(self) -> StepRecord | None:
        """The next step, if one is to come and nothing runs."""
        if self._stepper.running or not self._engine.has_unfinished:
            return None
        with contextlib.suppress(Exception):  # in a scheduler that somebody wrote: the step will report it
            return self._engine.preview()
        return None


class Host:
    """Answers the questions of the page about an engine, in plain data. It knows no widget.

    Args:
        engine: the engine to show and to step; cells may step it too, between two answers.
        clock: a function that returns seconds, by which the speed is kept.
    """

    version = -1  # of the settings, which nobody changes here

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.stepper = Stepper(engine, clock)
        self.session = NotebookSession(engine, self.stepper)
        self._snapshotter = Snapshotter(self)
        self._inspector = Inspector(engine.trace, self.session.decode, self._token_ids)

    def status(self) -> dict[str, Any]:
        return {}

    def answer(self, name: str, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question, by its name. If something is wrong with it, "error" says what."""
        answers = {
            "pull": self._pull,
            "control": self._control,
            "inject": self._inject,
            "cancel": self._cancel,
            "look": self._look,
        }
        try:
            return answers[name](question)
        except ValueError as error:
            return {"error": str(error)}
        except Exception as error:  # the page waits for an answer even now
            return {"error": f"{type(error).__name__}: {error}"}

    def _pull(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Run the steps that are due, and tell what is new since the last answer.

        `wait` says in how many milliseconds there will be more, if anything runs.
        """
        self.stepper.advance()
        self.session.catch_up()
        update = self._snapshotter.take().tell(ClientState.read(question))
        return update | {"wait": self.stepper.wait(), "error": self.stepper.failure}

    def _control(self, order: Mapping[str, Any]) -> dict[str, Any]:
        self.stepper.control(order.get("action"), order.get("value"))
        return self.stepper.clock()

    def _inject(self, order: Mapping[str, Any]) -> dict[str, Any]:
        prompt, most = order.get("prompt"), order.get("max_tokens")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("The prompt is empty: type something first.")
        Limits().check_prompt(prompt)
        if not str(most).strip().removeprefix("-").isdecimal():
            raise ValueError(f"Max tokens must be a whole number, not {most!r}.")
        params = SamplingParams(**self.engine.sampling_defaults | {"max_tokens": int(str(most))})
        name = self.engine.add_request(as_chat(self.engine.model.tokenizer, prompt), params)
        self.session.typed[name] = prompt
        if not self.stepper.held:
            self.stepper.running = True
        return {"request": name}

    def _cancel(self, order: Mapping[str, Any]) -> dict[str, Any]:
        wanted = order.get("request")
        for name, output in list(self.engine.outputs.items()):
            if not output.finished and wanted in (None, name):
                self.engine.abort(name)
        return {}

    def _look(self, question: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._inspector.look(question.get("block"), question.get("step")))

    def _token_ids(self, request_id: str) -> list[int]:
        output = self.engine.outputs[request_id]
        return output.prompt_token_ids + output.token_ids
