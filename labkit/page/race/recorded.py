"""Races that were recorded, to show before one has been measured here: `python -m labkit.page.race.recorded`.

That command runs them on the default model, which takes a few minutes, and writes them down in `labkit/data`,
with the moving picture that the README shows. Who does what in which step is the same on any machine, and so
the records hold no seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.page.race.run import Result, run_race
from labkit.page.race.workloads import COURSES, SETTINGS
from labkit.trace.trace import Trace
from labkit.views import replay_data
from labkit.views.animation import race_svg
from labkit.views.wire import ReplayData, ReplayEnd, Span

if TYPE_CHECKING:
    from labkit.models.load import LoadedModel

DATA = Path(__file__).parents[2] / "data"
FILE, PICTURE = "races.json", "race.svg"
TITLE = "Twelve answers on six seats of a real model: static and continuous batching, step by step"
PICTURED = {"static": "static batching", "continuous": "continuous batching"}  # of the first workload


def record(model: LoadedModel) -> dict[str, dict[str, ReplayData]]:
    """Run every workload under each setting that it was made for: their replay data, by workload and setting.

    Workloads that depend on what a model answers are left out.
    """
    found = {}
    for name, course in COURSES.items():
        if not course.repeats:
            workload = course.workload(model.tokenizer)
            race = run_race(model, workload, [SETTINGS[setting] for setting in course.settings])
            found[name] = {result.setting.name: _pack(result) for result in race.results}
    return found


def _pack(result: Result) -> ReplayData:
    without_clock = [replace(record, time=0.0, seconds=0.0) for record in result.trace]
    data = replay_data.pack(Trace(result.trace.meta, without_clock))
    data["steps"] |= {"begin": None, "end": None}
    return data


@cache
def recorded() -> Mapping[str, Mapping[str, Any]]:
    """The records, by workload and setting, ready for a browser."""
    return json.loads(files("labkit").joinpath(f"data/{FILE}").read_text(encoding="utf-8"))


def picture() -> str:
    """The README's picture, from the records."""
    course = recorded()[next(iter(COURSES))]
    return race_svg(TITLE, [(words, _rows(course[name])) for name, words in PICTURED.items()])


def _rows(data: Mapping[str, Any]) -> ReplayData:
    """A record that was read from a file, with its rows as rows again."""
    lanes = [
        lane | {"spans": [Span(*s) for s in lane["spans"]], "ends": [ReplayEnd(*e) for e in lane["ends"]]}
        for lane in data["lanes"]
    ]
    return {**data, "lanes": lanes}  # type: ignore[typeddict-item]


def main() -> None:
    from labkit.models.load import load_model

    records = record(load_model("smollm2-135m"))
    (DATA / FILE).write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")
    recorded.cache_clear()
    (DATA / PICTURE).write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
