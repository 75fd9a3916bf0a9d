"""Python and JavaScript call the fields of a row by the same names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from labkit.views import assets, wire
from labkit.views.wire import Blocked, Lane, Span, Step, Table

WIRE: dict[str, dict[str, Any]] = json.loads(
    wire.javascript().removeprefix("const WIRE = ").removesuffix(";\n")
)
ROWS = {name: kind for name, kind in vars(wire).items() if hasattr(kind, "_fields")}


def read(kind: Any, sent: Any) -> Any:
    """What `read` in `live_feed.js` does."""
    if kind is None or sent is None:
        return sent
    if isinstance(kind, list):
        return [read(kind[0], row) for row in sent]
    values = dict(zip(WIRE[kind], sent, strict=False)) if isinstance(sent, list) else sent
    return {name: read(inner, values[name]) for name, inner in WIRE[kind].items() if name in values}


def test_every_row_is_described_with_its_fields_in_order() -> None:
    assert len(ROWS) > 10
    for name, kind in ROWS.items():
        assert tuple(WIRE[name]) == kind._fields
    for message in wire.MESSAGES:
        assert list(WIRE[message.__name__]) == list(message.__annotations__)


def test_rows_inside_rows_are_named_too() -> None:
    assert WIRE["Lane"]["spans"] == ["Span"] and WIRE["Step"]["blocked"] == "Blocked"
    assert WIRE["Pictures"]["lanes"] == ["Lane"] and WIRE["Pictures"]["meta"] is None
    assert WIRE["BlockFacts"]["last"] == "LastOwner" and WIRE["Table"]["blocks"] is None


def test_what_is_sent_comes_back_by_name() -> None:
    pictures: wire.Pictures = {
        "step": 3,
        "tables": [Table("a", 5, (0, 4))],
        "lanes": [Lane("a", "a", 1, 0, 3, -1, "", (Span("d", 1, 3, 3), Span("d", 4, 4, 5, 4, 2)))],
        "steps": [
            Step(3, 0.5, 1, 1, 2, 1, 1, Blocked("b", "no seat"), 0),
            Step(4, 0, 0, 0, 0, 0, 0, None, 0),
        ],
    }
    found = read("Pictures", json.loads(json.dumps(pictures)))
    assert "full" not in found and found["step"] == 3
    assert found["tables"] == [{"request": "a", "computed": 5, "blocks": [0, 4]}]
    assert [span["accepted"] for span in found["lanes"][0]["spans"]] == [0, 2]
    assert [step["blocked"] for step in found["steps"]] == [{"request": "b", "reason": "no seat"}, None]


SCRIPTS = (
    "cards",
    "communication",
    "live_feed",
    "meters",
    "panel",
    "replay",
    "replay_data",
    "side",
    "two_pools",
    "words",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_nobody_counts_columns(name: str) -> None:
    text = (Path(assets.__file__).parent / "static" / f"{name}.js").read_text(encoding="utf-8")
    by_number = re.findall(r"\b(?:row|plan|lane|span|table|owner|event|facts|blocked)\[\d\]", text)
    assert not by_number and "[, , " not in text, by_number
