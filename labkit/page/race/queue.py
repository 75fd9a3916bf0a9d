"""One race at a time for everybody: who started it, how far it is, and the results of the last ones.

Nothing here knows of a page: there are a thread, plain numbers and words.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from labkit.page.race.explain import verdict
from labkit.page.race.noise import noise
from labkit.page.race.recorded import recorded
from labkit.page.race.run import MAX_SETTINGS, Progress, Race, RaceCancelled, RaceError, Result, run_race
from labkit.page.race.workloads import COURSES, SETTINGS, WORDS
from labkit.trace.trace import Trace
from labkit.views import replay_data

if TYPE_CHECKING:
    from labkit.models.load import LoadedModel

logger = logging.getLogger(__name__)

KEPT = 4  # races that are remembered
LEASE = 90.0  # seconds of silence from the person who started a race, after which it ends


class BusyError(RuntimeError):
    """A race is running already; the message says how far it is."""


class RaceTrack:
    """Runs races on a thread of their own. Safe to use from many threads.

    Args:
        model: the model of all races.
        keep: a function that is called with a name and the trace of each setting when a race is over.
    """

    def __init__(self, model: LoadedModel, keep: Callable[[str, Trace], object]) -> None:
        self._model = model
        self._keep = keep
        self._lock = threading.Lock()  # of all that follows
        self._owner = ""  # of the race under way; "" if there is none
        self._heard = self._began = 0.0
        self._stop = False
        self._progress: Progress | None = None
        self._course, self._settings = "", list[str]()  # of the race under way
        self._running: dict[str, Trace] = {}  # its traces, by setting; the last one grows
        self._title = ""
        self._failure: tuple[str, str] = ("", "")  # whose race failed, and why
        self._races: OrderedDict[int, tuple[Race, dict[str, Any]]] = OrderedDict()
        self._count = 0

    def start(self, course: str, settings: Sequence[str]) -> str:
        """Start a race, and return a secret that proves who started it.

        Raises:
            ValueError: for an unknown workload or setting, or too few or too many settings.
            BusyError: if another race is under way.
        """
        if course not in COURSES:
            raise ValueError("Choose a workload.")
        if any(name not in SETTINGS for name in settings):
            raise ValueError("Choose settings from the list.")
        if not 2 <= len(set(settings)) <= MAX_SETTINGS:
            raise ValueError(f"Choose two or three settings: {len(set(settings))} cannot race.")
        chosen = [name for name in SETTINGS if name in settings]  # in the order of the list
        with self._lock:
            if self._owner:
                raise BusyError(
                    f"A race is being run: {self._words()}. You can watch it here, and start yours when it "
                    "is over."
                )
            self._owner = owner = secrets.token_hex(8)
            self._heard = self._began = time.monotonic()
            self._stop, self._progress = False, None
            self._course, self._settings, self._running = course, chosen, {}
            self._title, self._failure = COURSES[course].title, ("", "")
        threading.Thread(target=self._run, args=(owner, course, chosen), name="race", daemon=True).start()
        return owner

    def _run(self, owner: str, course: str, names: list[str]) -> None:
        failure = ""
        try:
            race = run_race(
                self._model,
                COURSES[course].workload(self._model.tokenizer),
                [SETTINGS[name] for name in names],
                progress=self._advance,
                cancelled=self._stopped,
                watch=self._running.__setitem__,
            )
            self._finish(race, course)
        except RaceCancelled as error:
            failure = f"The race was {error}."
        except (RaceError, ValueError, MemoryError) as error:
            failure = f"The race could not be run. {error}"
        except Exception as error:
            logger.exception("a race failed")
            failure = f"The race failed: {type(error).__name__}."
        finally:
            with self._lock:
                self._owner, self._failure = "", (owner, failure)

    def _advance(self, progress: Progress) -> None:
        self._progress = progress

    def _stopped(self) -> bool:
        return self._stop or time.monotonic() - self._heard > LEASE

    def _finish(self, race: Race, course: str) -> None:
        packed = pack(race, course)
        with self._lock:
            self._count += 1
            number = self._count
            self._races[number] = (race, packed | {"race": number})
            while len(self._races) > KEPT:
                self._races.popitem(last=False)
        for result in race.results:
            self._keep(f"Race {number}, {COURSES[course].title}: {result.setting.name}", result.trace)

    def stop(self, owner: str) -> bool:
        """Stop the race before its next step. Returns False for anybody who did not start it."""
        with self._lock:
            if not self._owner or owner != self._owner:
                return False
            self._stop = True
            return True

    def _words(self) -> str:
        progress = self._progress
        if progress is None:
            return f"{self._title}, about to start"
        return f"{self._title}, {progress.setting}, {progress.share:.0%} done"

    def status(self, owner: str) -> dict[str, Any]:
        """How far the running race is, if there is one, and the number of the latest result (0: none)."""
        with self._lock:
            mine = bool(owner) and owner == self._owner
            if mine:
                self._heard = time.monotonic()
            whose, why = self._failure
            return {
                "running": bool(self._owner),
                "mine": mine,
                "title": self._title,
                "progress": asdict(self._progress) if self._owner and self._progress else None,
                "left": self._left(),
                "failure": why if owner and owner == whose else "",
                "race": self._count if self._count in self._races else 0,
            }

    def lanes(self) -> dict[str, Any]:
        """What the race under way has drawn so far, for the browser, and who does what in a recorded one.

        Each setting has "data", None before it begins. The "recorded" data are None for a workload that
        depends on what the model answers, and for settings that nobody has recorded.
        """
        with self._lock:
            if not self._owner:
                return {"tracks": []}
            course, settings, traces = self._course, list(self._settings), dict(self._running)
        known = recorded().get(course, {})
        tracks = []
        for name in settings:
            trace = traces.get(name)
            data = None if trace is None else replay_data.pack(Trace(trace.meta, list(trace.records)))
            words = WORDS.get(name, "")
            tracks.append({"name": name, "words": words, "data": data, "recorded": known.get(name)})
        return {"title": COURSES[course].title, "tracks": tracks}

    def _left(self) -> float | None:
        """Seconds that the race may still take at its speed so far; None while it is too early to say."""
        share = self._progress.share if self._owner and self._progress else 0.0
        return (time.monotonic() - self._began) * (1 - share) / share if share >= 0.05 else None

    def packed(self, number: int) -> dict[str, Any] | None:
        """A race for the browser, or None if it is forgotten."""
        with self._lock:
            found = self._races.get(number)
            return found[1] if found else None

    def latest(self) -> Race | None:
        with self._lock:
            return self._races[self._count][0] if self._count in self._races else None


# -- the result cards -----------------------------------------------------------------------------

# What is compared: its name, value and format, which is better (-1 less, 1 more, 0 neither), and its meaning.
_NUMBERS: tuple[tuple[str, Callable[[Result], float | None], str, int, str], ...] = (
    ("Time", lambda r: r.seconds, "{:.2f} s", -1, "from the start until the last answer was complete"),
    ("Throughput", lambda r: r.tokens_per_second, "{:.1f} tokens/s", 1, "generated tokens over the time"),
    ("Steps", lambda r: r.steps, "{:,}", -1, "forward passes of the model"),
    ("Requests in a step", lambda r: r.batch, "{:.1f}", 1, "how many a step works for, on average"),
    ("First token", lambda r: r.ttft_median, "{:.2f} s", -1, "TTFT: from arrival to the first token, median"),
    ("First token, longest", lambda r: r.ttft_max, "{:.2f} s", -1, "TTFT of the request that waited longest"),
    (
        "Between tokens",
        lambda r: r.itl_median,
        "{:.3f} s",
        -1,
        "ITL: median; tokens that come at once share the gap",
    ),
    ("Longest gap", lambda r: r.itl_max, "{:.3f} s", -1, "the longest ITL: how long an answer stood still"),
    (
        "Memory taken",
        lambda r: r.kv_usage,
        "{:.0%}",
        0,
        "KV usage: pages that are owned, mean over the steps",
    ),
    ("Memory at its fullest", lambda r: r.kv_usage_peak, "{:.0%}", 0, "the highest KV usage"),
    ("Waste inside pages", lambda r: r.waste, "{:.0%}", -1, "slots of owned pages that hold no token"),
    ("Padding", lambda r: r.padding, "{:,} slots", -1, "computed for nothing, to keep a batch in step"),
    ("Preemptions", lambda r: r.preemptions, "{:,}", -1, "requests that lost their pages and began again"),
)
_DRAFTS: tuple[tuple[str, Callable[[Result], float | None], str, int, str], ...] = (  # if anybody drafts
    ("Drafted", lambda r: r.drafted, "{:,} tokens", 0, "guessed, and computed to see if they are right"),
    ("Drafts right", lambda r: r.acceptance, "{:.0%}", 0, "share of drafted tokens that an answer kept"),
)


_CLOCKED = ("Time", "Throughput", "First token", "First token, longest", "Between tokens", "Longest gap")


def _is_best(own: float, known: Sequence[float], better: int, margin: float) -> bool:
    """Whether a number is the best, and further from all that are not it than the margin, a share."""
    others = [number for number in known if number != own]
    if better < 0:
        return all(own * (1 + margin) < number for number in others)
    return all(own > number * (1 + margin) for number in others)


def pack(race: Race, course: str) -> dict[str, Any]:
    """A race as the browser draws it: replay data, and numbers as text with the best of each marked."""
    trust = noise(race.results)
    compared = _NUMBERS + (_DRAFTS if any(result.drafted for result in race.results) else ())
    values = [[value(result) for _, value, *_ in compared] for result in race.results]
    results = []
    for row, result in enumerate(race.results):
        numbers = []
        for column, (name, _, shown, better, hint) in enumerate(compared):
            own, all_of_it = values[row][column], [line[column] for line in values]
            known = [number for number in all_of_it if number is not None]
            text = "-" if own is None else shown.format(own)
            margin = trust if name in _CLOCKED else 0.0
            best = bool(better) and own is not None and _is_best(own, known, better, margin)
            tie = len({shown.format(number) for number in known}) == 1
            numbers.append([name, text, best and not tie, hint])
        results.append(
            {
                "name": result.setting.name,
                "words": WORDS.get(result.setting.name, ""),
                "data": replay_data.pack(result.trace),
                "generated": result.generated,
                "numbers": numbers,
            }
        )
    return {
        "title": COURSES[course].title,
        "look": COURSES[course].look,
        "check": asdict(race.check),
        "verdict": [] if race.check.fault else verdict(race.results),
        "results": results,
    }
