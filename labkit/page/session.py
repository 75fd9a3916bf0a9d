"""The lab: one model, the engine that is running on it now, and the people round it.

Most settings of an engine cannot change under running requests. So the lab builds another engine on the same
weights and swaps the two, once what runs has finished or whoever asked agreed to cancel it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from labkit.config import KV_POLICIES, EngineConfig
from labkit.engine import Engine
from labkit.page.scenario_player import Player
from labkit.page.scenarios import BY_NAME
from labkit.page.submissions import Desk
from labkit.page.visitors import GRACE, Visitors
from labkit.sampling_params import check_flag, check_number
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.limits import Limits
from labkit.trace.trace import Trace
from labkit.trace.writer import TraceWriters
from labkit.views.live_feed import WINDOW, Feed

logger = logging.getLogger(__name__)

# The knobs of the page: a choice of values, or the least and the most that a number may be.
SIZES = {
    "block_size": (1, 256),
    "num_blocks": (4, 4096),
    "max_num_seqs": (1, 256),
    "max_num_batched_tokens": (1, 8192),
}
CHOICES = {
    "scheduler": ("continuous", "static", "naive"),
    "kv_policy": KV_POLICIES,
    "speculative": (None, "ngram"),
}
FLAGS = ("enable_prefix_caching", "enable_chunked_prefill")
KEPT_TRACES = 12
KNOBS = (*CHOICES, *SIZES, *FLAGS)


@dataclass(frozen=True)
class Bench:
    """One engine, what watches it, and who hands in requests. Another engine is another bench."""

    live: AsyncEngine
    feed: Feed
    desk: Desk
    player: Player
    deafen: Callable[[], None]

    @classmethod
    def around(cls, live: AsyncEngine, limits: Limits) -> Bench:
        feed = Feed(live.engine.trace.meta, speculative=live.engine.config.speculative)
        desk = Desk(live, limits)
        return cls(live, feed, desk, Player(desk), live.subscribe(feed.append, last=WINDOW))

    def leave(self) -> None:
        """Watch the engine no more; it goes on."""
        self.player.close()
        self.deafen()


@dataclass(frozen=True)
class _Change:
    """A swap that waits until what runs has finished."""

    config: EngineConfig
    then: Callable[[Bench], None]


class Lab:
    """Owns the current bench and swaps it for another when the settings change.

    Args:
        live: the first engine. When its settings are changed it is closed, and another takes its place.
        limits: on what visitors may hand in.
        grace: seconds after which the requests of somebody who closed the page are cancelled.
        knobs: whether visitors may change the settings.
        make: builds an engine; pass your own to keep a scheduler or a pool that you wrote.
        trace_file: every step is written there as JSON Lines, those that the engine forgets included. Each
            engine after the first has a file of its own: "run.jsonl", "run-2.jsonl", ...

    Raises:
        OSError: if the trace file cannot be written.
    """

    def __init__(
        self,
        live: AsyncEngine,
        *,
        limits: Limits | None = None,
        grace: float = GRACE,
        knobs: bool = True,
        make: Callable[[EngineConfig], Engine] = Engine,
        trace_file: str | os.PathLike[str] | None = None,
    ) -> None:
        check_number("grace", grace, 0, 3600)
        self.limits = limits or Limits()
        self.knobs = knobs
        self.visitors = Visitors(self._gone, grace=grace)
        self._make = make
        self._first = live
        self._lock = threading.RLock()  # held while the bench is swapped
        self._change: _Change | None = None
        self._played = ""  # the scene played last
        self._kept: dict[str, Trace] = {}
        self._writers = TraceWriters(trace_file) if trace_file else None
        self.bench = self._seat(live)
        self.base = self.settings  # what the lab started with
        self._draft_model = live.engine.config.draft_model
        self.version = 0  # changes whenever `status` does, but for its counts

    @property
    def settings(self) -> dict[str, Any]:
        """The knobs of the engine that runs now."""
        engine = self.bench.live.engine
        values = {name: getattr(engine.config, name) for name in KNOBS}
        return values | {"num_blocks": engine.trace.meta.num_blocks}

    def status(self) -> dict[str, Any]:
        """What a page needs to know of the lab, ready for JSON."""
        change = self._change
        return {
            "settings": self.settings,
            "base": self.base,
            "knobs": self.knobs,
            "pending": _settings_of(change.config) if change else None,
            "visitors": len(self.visitors),
            "played": self._played,
        }

    # -- settings ---------------------------------------------------------------------------------

    def change(
        self,
        settings: Mapping[str, Any],
        *,
        running: str = "ask",
        then: Callable[[Bench], None] = lambda bench: None,
    ) -> dict[str, Any]:
        """Run on other settings from now on.

        Args:
            settings: some of `KNOBS`; the others stay as they are.
            running: what becomes of requests under way. "ask": nothing changes if there are any; "finish":
                wait for them, and take no new ones meanwhile; "cancel": they are cancelled. And "keep" gives
                up a change that waits.
            then: called with the new bench.

        Returns:
            {"done": True}; {"ask": n} if n requests are under way; {"waits": n} if it waits for them.

        Raises:
            ValueError: for settings that cannot be; the message names the field and the limit. The engine
                that runs goes on.
        """
        if running == "keep":
            self._give_up()
            return {"done": True}
        if not self.knobs:
            raise ValueError("The settings of this lab are its host's: they cannot be changed from the page.")
        config = self._config(settings)
        with self._lock:
            self._give_up()
            live = self.bench.live
            under_way = 0 if live.failure else live.num_unfinished
            if under_way and running not in ("finish", "cancel"):
                return {"ask": under_way}
            if under_way and running == "finish":
                self._wait_for_the_end(_Change(config, then))
                return {"waits": under_way}
            self._swap(config, then)
        return {"done": True}

    def _config(self, settings: Mapping[str, Any]) -> EngineConfig:
        base = self.base  # what the host chose may be beyond what visitors may
        check_settings({name: value for name, value in settings.items() if base.get(name) != value})
        live = self.bench.live
        of_the_model: dict[str, Any] = {"dtype": "auto", "device": "auto", "quantization": None}
        of_the_model |= {"fused_projections": True, "packed_weights": True}  # as it was loaded, in fact
        values = self.settings | dict(settings)
        of_the_model["draft_model"] = self._draft_model if values["speculative"] == "draft" else None
        return dataclasses.replace(live.engine.config, model=live.engine.model, **of_the_model, **values)

    def _swap(self, config: EngineConfig, then: Callable[[Bench], None]) -> None:
        """Build the new engine, and only then let go of the old one."""
        old = self.bench
        try:
            live = AsyncEngine.build(lambda: self._make(config))
        except (MemoryError, RuntimeError) as error:
            logger.warning("no engine with these settings", exc_info=True)
            raise ValueError(
                "There is too little memory for that: lower the number of pages or the page size."
            ) from error
        live.speed = old.live.speed
        self.bench = self._seat(live)
        self.version += 1
        old.leave()
        old.live.close()
        then(self.bench)

    def _seat(self, live: AsyncEngine) -> Bench:
        if self._writers:
            self._writers.follow(live.engine.trace.meta, live.subscribe)
        return Bench.around(live, self.limits)

    def _wait_for_the_end(self, change: _Change) -> None:
        bench, self._change = self.bench, change
        bench.desk.refuses = (
            "The engine is about to restart with other settings, once what runs has finished: wait a moment."
        )
        self.version += 1
        if bench.live.paused:
            bench.live.resume()
        thread = threading.Thread(target=self._swap_at_the_end, args=(bench, change), daemon=True)
        thread.start()

    def _swap_at_the_end(self, bench: Bench, change: _Change) -> None:
        while bench.live.num_unfinished and self._change is change:
            time.sleep(0.05)
        with self._lock:
            if self._change is not change:
                return
            self._give_up()
            try:
                self._swap(change.config, change.then)
            except ValueError:  # there was room when it was asked for, so: the old one goes on
                logger.warning("the engine keeps its settings", exc_info=True)

    def _give_up(self) -> None:
        with self._lock:
            if self._change:
                self._change, self.bench.desk.refuses = None, ""
                self.version += 1

    # -- scenes -----------------------------------------------------------------------------------

    def play(
        self, visitor: str, name: str, settings: Mapping[str, Any] | None = None, *, running: str = "ask"
    ) -> dict[str, Any]:
        """Play a preset for a visitor, on the settings that it needs.

        The one that was played last runs on the settings as they are now, so that a knob can be turned in
        between. Sizes and speculation that neither `settings` nor the preset name go back to what the lab
        started with.

        Returns as `change` does, and raises as it and `Player.play` do.
        """
        preset = BY_NAME.get(name) if isinstance(name, str) else None
        if preset is None:
            raise ValueError(f"There is no preset {str(name)[:40]!r}: known are {', '.join(BY_NAME)}.")
        wanted = dict(settings or {})
        check_settings(wanted)
        if self._played != name:
            fresh = {knob: self.base[knob] for knob in (*SIZES, "speculative")}
            wanted = {**fresh, **preset.settings, **wanted}
            budget = wanted["max_num_batched_tokens"]
            if "max_num_seqs" not in (settings or {}):
                wanted["max_num_seqs"] = min(wanted["max_num_seqs"], budget)
        if not self.knobs:
            wanted = {}  # as well as it can be done

        def begin(bench: Bench) -> None:
            bench.player.play(visitor, preset, name=self.visitors.name(visitor))
            self._played = name
            self.version += 1

        with self._lock:
            now = self.settings
            if self.bench.live.failure is None and all(now[knob] == value for knob, value in wanted.items()):
                begin(self.bench)
                return {"done": True}
            return self.change(wanted, running=running, then=begin)

    # -- traces -----------------------------------------------------------------------------------

    def keep(self, name: str, trace: Trace) -> None:
        """Remember the trace of a race, say, under a name; the oldest of `KEPT_TRACES` gives way."""
        with self._lock:
            self._kept.pop(name, None)
            kept = {**self._kept, name: trace}
            self._kept = dict(list(kept.items())[-KEPT_TRACES:])

    def traces(self) -> dict[str, Trace]:
        """What can be replayed, by name: the engine that runs, and what was kept, the latest first."""
        return {"The engine, live": self.bench.live.engine.trace, **dict(reversed(self._kept.items()))}

    # -- the end ----------------------------------------------------------------------------------

    def _gone(self, visitor: str) -> None:
        bench = self.bench
        bench.player.drop(visitor)
        bench.desk.leave(visitor)

    def close(self) -> None:
        """Let go of the engine. The one that was handed in goes on; one that the lab built is closed."""
        with self._lock:
            self._give_up()
            self.visitors.close()
            self.bench.leave()
            if self._writers:
                self._writers.close()
            if self.bench.live is not self._first:
                self.bench.live.close()


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming the field and the limit, unless these are knobs at values that can be."""
    for name, value in settings.items():
        if name in SIZES:
            check_number(name, value, *SIZES[name], whole=True)
        elif name in CHOICES:
            if value not in CHOICES[name]:
                known = ", ".join(map(str, CHOICES[name]))
                raise ValueError(f"{name} must be one of {known}, not {value!r}")
        elif name in FLAGS:
            check_flag(name, value)
        else:
            raise ValueError(f"{str(name)[:40]!r} is no setting: known are {', '.join(KNOBS)}")


def _settings_of(config: EngineConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in KNOBS}
