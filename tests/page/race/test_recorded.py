"""The recorded races are those that would run today, and the README's picture is drawn from them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from labkit.models.load import LoadedModel
from labkit.page.race import recorded
from labkit.page.race.workloads import COURSES
from labkit.views import style

ROOT = Path(__file__).parents[3]
AGAIN = "run `python -m labkit.page.race.recorded`"


def test_a_race_on_any_model_goes_as_the_recorded_one(model: LoadedModel) -> None:
    kept, today = recorded.recorded(), json.loads(json.dumps(recorded.record(model)))
    assert kept.keys() == today.keys() == {name for name, course in COURSES.items() if not course.repeats}
    for course, runs in today.items():
        assert runs.keys() == kept[course].keys() == set(COURSES[course].settings)
        for setting, run in runs.items():
            was = kept[course][setting]
            assert (run["steps"], run["lanes"]) == (was["steps"], was["lanes"]), f"{course}: {AGAIN}"
            assert was["meta"]["model"] == "smollm2-135m", (
                "the records are of the model that the page opens with"
            )
            assert was["steps"]["begin"] is None, "seconds are those of one machine"


def test_the_readmes_picture_is_drawn_from_the_records() -> None:
    picture = (recorded.DATA / recorded.PICTURE).read_text(encoding="utf-8")
    assert picture == recorded.picture(), AGAIN
    assert f"labkit/data/{recorded.PICTURE})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(picture) < 20_000 and "<script" not in picture


def test_it_moves_only_for_those_who_do_not_mind() -> None:
    picture = recorded.picture()
    ET.fromstring(picture)  # raises unless it is well-formed
    before, moving = picture.split("@media (prefers-reduced-motion: no-preference)")
    assert "animation" not in before and "display: none" in before and "animation: clock" in moving
    steps = [len(recorded.recorded()["uneven"][name]["steps"]["step"]) for name in recorded.PICTURED]
    assert all(f"done: {count} steps, 169 tokens" in picture for count in steps)
    assert all(color in picture for color in style.PALETTE)
