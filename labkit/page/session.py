"""The lab: one model, the session of the engine that runs on it now, and the visitors.

Most settings of an engine cannot change under running requests. So the lab builds another engine on the same
weights and swaps the two, once the running requests have finished or the person who asks agrees to cancel
them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.chat import beginning
from labkit.models.errors import is_out_of_memory
from labkit.models.token_bytes import decode_inside
from labkit.outputs import in_one_line
from labkit.page.knobs import KNOBS, check_settings, settings_of
from labkit.page.scenario_player import ScenarioPlayer
from labkit.page.scenarios import find, offered
from labkit.page.snapshot import Now
from labkit.page.submissions import Submissions
from labkit.page.visitors import GRACE, Visitors
from labkit.sampling_params import check_number
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits
from labkit.trace.trace import Trace
from labkit.trace.writer import TraceWriters
from labkit.views.inspect import Inspector
from labkit.views.live_feed import WINDOW, Decode, Feed

logger = logging.getLogger(__name__)

KEPT_TRACES = 12
ENDING = "The lab is ending: nothing new is taken in."


@dataclass(frozen=True)
class Session:
    """One engine, the feed that watches it, and the requests that visitors hand in.

    Another engine is another session. A snapshot asks the feed, and calls `now` for everything else.
    """

    live: AsyncEngine
    feed: Feed
    submissions: Submissions
    player: ScenarioPlayer
    inspector: Inspector
    decode: Decode
    now: Callable[[], Now]
    unsubscribe: Callable[[], None]

    @classmethod
    def start(cls, live: AsyncEngine, limits: Limits) -> Session:
        """Watch an engine from now on, and take requests in for it."""
        feed = Feed(live.engine.trace.meta, speculative=live.engine.config.speculative)
        submissions = Submissions(live, limits)
        decode = decode_inside(live.engine.model.tokenizer)

        def token_ids(request_id: str) -> list[int]:
            output = live.output(request_id)
            return output.prompt_token_ids + output.token_ids

        return cls(
            live,
            feed,
            submissions,
            ScenarioPlayer(submissions),
            Inspector(live.engine.trace, decode, token_ids, tuple(beginning(live.engine.model.tokenizer))),
            decode,
            submissions.now,
            live.subscribe(feed.append, last=WINDOW),
        )

    def end(self) -> None:
        """Watch the engine no more; the engine goes on."""
        self.player.close()
        self.unsubscribe()


@dataclass(frozen=True)
class _Change:
    """A swap that waits until what runs has finished."""

    config: EngineConfig
    then: Callable[[Session], None]


class Lab:
    """Owns the current session and swaps it for another one when the settings change.

    Args:
        live: the first engine. When its settings are changed it is closed, and another takes its place.
        limits: the limits on what visitors may hand in.
        grace: seconds after which the requests of a visitor who closed the page are cancelled.
        knobs: whether visitors may change the settings.
        clock: whether visitors may pause, step, and set the speed.
        make: a function that builds an engine; pass your own to keep a scheduler or a pool that you wrote.
        trace_file: the file for every step, as JSON Lines, also those that the engine forgets. Each engine
            after the first has a file of its own: "run.jsonl", "run-2.jsonl", ... A file that is there
            already is left as it is.

    Raises:
        OSError: if the trace file cannot be made.
    """

    def __init__(
        self,
        live: AsyncEngine,
        *,
        limits: Limits | None = None,
        grace: float = GRACE,
        knobs: bool = True,
        clock: bool = True,
        make: Callable[[EngineConfig], Engine] = Engine,
        trace_file: str | os.PathLike[str] | None = None,
    ) -> None:
        check_number("grace", grace, 0, 3600)
        self.limits = limits or Limits()
        self._open = {"knobs": knobs, "clock": clock, "races": True}  # to visitors
        self.host_key = secrets.token_urlsafe(9)  # who brings it is a host
        self.hosts: set[str] = set()
        self.visitors = Visitors(self._gone, grace=grace)
        self._make = make
        self.scenarios = offered(live.engine)
        self._owns = False  # whether the present engine was built here
        self._wish = live.engine.config.num_blocks  # None: the pool was sized by the memory that was free
        self._lock = threading.RLock()  # held while the session is swapped
        self._change: _Change | None = None
        self._ending = False
        self._played = ""  # the name of the scenario that was played last
        self._played_after: int | None = None  # the step before it, on this engine
        self._kept: dict[str, Trace] = {}
        self.version = 0  # grows whenever `status` changes, except for its counts
        self.trace_path: Path | None = None  # of the file that is written now
        self._writers = TraceWriters(trace_file, self._tell_of_writing) if trace_file else None
        self.session = self._start(live)
        self.base = self._chosen = self.settings  # it started with; people chose
        self._draft_model = live.engine.config.draft_model

    @property
    def settings(self) -> dict[str, Any]:
        """The knobs of the engine that runs now."""
        engine = self.session.live.engine
        values = {name: getattr(engine.config, name) for name in KNOBS}
        return values | {"num_blocks": engine.trace.meta.num_blocks}

    def status(self) -> dict[str, Any]:
        """What a page needs to know of the lab, ready for JSON."""
        change = self._change
        return {
            "settings": self.settings,
            "base": self.base,
            "knobs": self.open_to("knobs"),
            "clock": self.open_to("clock"),
            "pending": settings_of(change.config) if change else None,
            "visitors": len(self.visitors),
            "most": self.limits.answer_tokens,
            "chosen": self._chosen,
            "played": self._played,
            "played_after": self._played_after,
            "changes": {name: self._new(self._needed(name, {})) for name in self.scenarios},
            "problem": self._writers.problem if self._writers else "",
        }

    # -- the clock --------------------------------------------------------------------------------

    def may_set_clock(self, visitor: str) -> bool:
        """Whether a visitor may pause, step, and set the speed, for everyone."""
        return self.open_to("clock") or visitor in self.hosts

    def open_to(self, what: str) -> bool:
        """Whether visitors may use the "clock", the "knobs" or "races"."""
        return self._open[what]

    def set_open(self, what: str, whether: bool) -> None:
        """Let visitors use something from now on, or no more."""
        self._open[what] = whether
        self.version += 1

    def control(self, visitor: str, action: str, value: float | None = None) -> dict[str, Any]:
        """Obey a visitor who may set the clock (see `Submissions.control`), and return the clock's state.

        Raises:
            ValueError: for a visitor who may not, and for a speed that is impossible.
        """
        if not self.may_set_clock(visitor):
            raise ValueError("The clock of this lab is its host's: it cannot be set from the page.")
        self.session.submissions.control(visitor, action, value, name=self.visitors.name(visitor))
        return self.session.submissions.clock()

    # -- settings ---------------------------------------------------------------------------------

    def change(
        self,
        settings: Mapping[str, Any],
        *,
        running: str = "ask",
        then: Callable[[Session], None] | None = None,
        visitor: str = "",
    ) -> dict[str, Any]:
        """Run on other settings from now on.

        Args:
            settings: values for some of `KNOBS`; the others stay as they are.
            running: what becomes of the requests under way. "ask": nothing changes if there are any;
                "finish": wait for them, and take no new ones meanwhile; "cancel": they are cancelled. And
                "keep" gives up a change that waits.
            then: a function that is called with the new session; without one, the settings count as chosen.
            visitor: the visitor who asks; a host may change settings that are locked.

        Returns:
            {"done": True}; {"ask": n} if n requests are under way; {"waits": n} if it waits for them.

        Raises:
            ValueError: for impossible settings; the message names the field and the limit. The engine that
                runs goes on.
        """
        if running == "keep":
            self._give_up()
            return {"done": True}
        if self._ending:
            raise ValueError(ENDING)
        if not self.open_to("knobs") and visitor not in self.hosts:
            raise ValueError("The settings of this lab are its host's: they cannot be changed from the page.")
        config, then = self._config(settings), then or self._choose
        with self._lock:
            self._give_up()
            live = self.session.live
            under_way = 0 if live.failure else live.num_unfinished
            if under_way and running not in ("finish", "cancel"):
                return {"ask": under_way}
            if under_way and running == "finish":
                self._wait_for_the_end(_Change(config, then))
                return {"waits": under_way}
            self._swap(config, then)
        return {"done": True}

    def _choose(self, _session: Session) -> None:
        self._chosen = self.settings

    def _config(self, settings: Mapping[str, Any]) -> EngineConfig:
        base = self.base  # the host's own choice may be beyond the limits for visitors
        check_settings({name: value for name, value in settings.items() if base.get(name) != value})
        live = self.session.live
        of_the_model: dict[str, Any] = {"dtype": "auto", "device": "auto", "quantization": None}
        of_the_model |= dict.fromkeys(("fused_projections", "packed_weights", "cpu_kernels"), True)  # loaded
        values = self.settings | dict(settings)
        of_the_model["draft_model"] = self._draft_model if values["speculative"] == "draft" else None
        values["num_blocks"] = self._wished(values["num_blocks"])
        return dataclasses.replace(live.engine.config, model=live.engine.model, **of_the_model, **values)

    def _wished(self, num_blocks: int) -> int | None:
        """Return what to ask for to have so many pages: None for a number that nobody chose."""
        if num_blocks == self.settings["num_blocks"]:
            return self.session.live.engine.config.num_blocks
        return self._wish if num_blocks == self.base["num_blocks"] else num_blocks

    def _swap(self, config: EngineConfig, then: Callable[[Session], None]) -> None:
        """Build the new engine, and only then let go of the old one.

        On a GPU one pool takes most of the memory. So there the old engine ends first, and if the new one
        cannot be built, another with its settings takes its place.
        """
        old = self.session
        beside = old.live.engine.model.device.type != "cuda"
        if not beside:
            self._let_go(old)
        try:
            live = self._built(config)
        except ValueError:
            if not beside:
                self._replace(self._built(old.live.engine.config), old)
            raise
        self._replace(live, old)
        if beside:
            self._let_go(old)
        then(self.session)

    def _built(self, config: EngineConfig) -> AsyncEngine:
        try:
            return AsyncEngine.build(lambda: self._make(config))
        except (MemoryError, RuntimeError) as error:
            logger.warning("no engine with these settings", exc_info=True)
            why = "There is too little memory for that: lower the number of pages or the page size."
            if not is_out_of_memory(error):
                why = f"No engine could be built with these settings: {in_one_line(error)}"
            raise ValueError(why) from error

    def _replace(self, live: AsyncEngine, old: Session) -> None:
        live.speed = old.live.speed
        self.session = self._start(live)
        self._owns, self._played_after = True, None
        self.version += 1

    @staticmethod
    def _let_go(old: Session) -> None:
        """End an engine, and free its memory now: it would wait for the garbage collector."""
        old.submissions.refuses = "The engine restarts with other settings: wait a moment."
        old.end()
        old.live.close()
        old.live.engine.release()

    def _start(self, live: AsyncEngine) -> Session:
        if self._writers:
            self.trace_path = self._writers.follow(live.engine.trace.meta, live.subscribe)
        return Session.start(live, self.limits)

    def _tell_of_writing(self) -> None:
        self.version += 1  # its status has a problem

    def _wait_for_the_end(self, change: _Change) -> None:
        session, self._change = self.session, change
        session.submissions.refuses = (
            "The engine is about to restart with other settings, once what runs has finished: wait a moment."
        )
        self.version += 1
        if session.live.paused:
            session.live.resume()
        thread = threading.Thread(target=self._swap_at_the_end, args=(session, change), daemon=True)
        thread.start()

    def _swap_at_the_end(self, session: Session, change: _Change) -> None:
        while session.live.num_unfinished and self._change is change:
            time.sleep(0.05)
        with self._lock:
            if self._change is not change:
                return
            self._give_up()
            try:
                self._swap(change.config, change.then)
            except ValueError:  # there was room when the visitor asked: the old engine goes on
                logger.warning("the engine keeps its settings", exc_info=True)

    def _give_up(self) -> None:
        with self._lock:
            if self._change:
                self._change, self.session.submissions.refuses = None, ""
                self.version += 1

    # -- scenarios --------------------------------------------------------------------------------

    def play(
        self,
        visitor: str,
        name: str,
        settings: Mapping[str, Any] | None = None,
        *,
        running: str = "ask",
        anew: bool = False,
    ) -> dict[str, Any]:
        """Play a scenario for a visitor, on the settings that it needs.

        It plays on a fresh engine, because what an earlier run left in the prefix cache would change the
        story; with locked settings, on the engine that there is. The scenario that was played last keeps the
        present settings, so that a knob can be turned in between, unless it is to be played `anew`.

        Returns what `change` returns, with a "note" if it lacks locked settings. Raises what that and
        `ScenarioPlayer.play` raise.
        """
        scenario = find(self.scenarios, name)
        self.limits.check_room(0, 0, len(scenario.requests))  # before anything ends for it
        check_settings(settings or {})
        locked = not self.open_to("knobs") and visitor not in self.hosts
        wanted = {} if locked else self._needed(name, settings or {}, anew)
        lacks = scenario.lacks(self.settings) if locked else ""
        note = {"note": f"The settings are locked. {lacks}"} if lacks else {}

        def begin(session: Session) -> None:
            records = session.live.records()
            session.player.play(visitor, scenario, name=self.visitors.name(visitor))
            self._played, self._played_after = name, records[-1].step if records else -1
            self.version += 1

        with self._lock:
            live = self.session.live
            fresh = locked or not (live.busy or live.records())
            if live.failure is None and fresh and not self._new(wanted):
                begin(self.session)
                return {"done": True, **note}
            return self.change(wanted, running=running, then=begin, visitor=visitor)

    def _needed(self, name: str, asked: Mapping[str, Any], anew: bool = False) -> dict[str, Any]:
        same = self._played == name and not anew
        return dict(asked) if same else self.scenarios[name].needed(self.base, asked)

    def _new(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the wanted settings that the engine does not have."""
        now, asked = self.settings, self.session.live.engine.config.num_blocks
        if "num_blocks" in wanted and self._wished(wanted["num_blocks"]) == asked:  # or sized anew, as it was
            now["num_blocks"] = wanted["num_blocks"]
        return {knob: value for knob, value in wanted.items() if now[knob] != value}

    # -- traces -----------------------------------------------------------------------------------

    def keep(self, name: str, trace: Trace) -> None:
        """Remember a trace under a name, for instance that of a race, and forget the oldest if need be."""
        with self._lock:
            self._kept.pop(name, None)
            kept = {**self._kept, name: trace}
            self._kept = dict(list(kept.items())[-KEPT_TRACES:])

    def traces(self) -> dict[str, Trace]:
        """The traces that can be replayed, by name: the running engine's, then those kept, latest first."""
        return {"The engine, live": self.session.live.engine.trace, **dict(reversed(self._kept.items()))}

    # -- the end ----------------------------------------------------------------------------------

    def drain(self, seconds: float) -> None:
        """Take nothing new in, let what runs end within so many seconds, and close the engine.

        What is left then ends with reason "abort". A paused engine is not waited for.
        """
        with self._lock:
            self._ending = True
            self._give_up()
            session = self.session
        session.submissions.refuses = session.submissions.notice = ENDING
        session.player.close()
        end = time.monotonic() + seconds
        while session.live.num_unfinished and not session.live.paused and time.monotonic() < end:
            time.sleep(0.05)
        session.live.close()

    def _gone(self, visitor: str) -> None:
        session = self.session
        session.player.drop(visitor)
        session.submissions.leave(visitor)
        self.hosts.discard(visitor)

    def close(self) -> None:
        """Let go of the engine. An engine that was handed in goes on; one that the lab built is closed."""
        with self._lock:
            self._give_up()
            self.visitors.close()
            self.session.end()
            if self._writers:
                self._writers.close()
            if self._owns:
                self.session.live.close()
