"""Traces that are bent at random: fields of a real file are replaced, repeated, moved and cut."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**52, 2**53, 10**30, 0.5, -0.5, 1e-300, 1e9, 3.9e9, 4e9, 1e308, True)
NAMES = ("", "a", "0", "\x1b[2J", "\u202e", "<b>", "x" * 300, "9" * 400, "\ud800")
VALUES: tuple[Any, ...] = (*NUMBERS, *NAMES, None, [], {}, [[]], ["a"], ["a", [0]], ["a", 0, [0, 1]])


def bend(lines: Sequence[str], seed: int) -> list[str]:
    """The lines of a trace with one to five changes, many of which leave it a trace."""
    rng = random.Random(seed)
    rows: list[Any] = [json.loads(line) for line in lines]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(rows))
        match rng.randrange(8):
            case 0:
                _change(rng, rows[place])
            case 1:
                _nudge(rng, rows[place])
            case 2:
                del rows[place]
            case 3:
                rows.insert(place, json.loads(json.dumps(rows[place])))
            case 4:
                _change(rng, rows[0])
            case _:
                _nudge(rng, rows[place])
        if not rows:
            break
    text = [json.dumps(row) for row in rows]
    if text and rng.random() < 0.1:
        text[-1] = text[-1][: rng.randrange(len(text[-1]))]
    return text


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *_places(value[key]))]


def _change(rng: random.Random, row: Any) -> None:
    if places := _places(row):
        container, key = rng.choice(places)
        container[key] = rng.choice(VALUES)


def _nudge(rng: random.Random, row: Any) -> None:
    """Change a number a little, or very much: these are the files that are accepted."""
    numbers = [(c, key) for c, key in _places(row) if type(c[key]) in (int, float)]
    if numbers:
        container, key = rng.choice(numbers)
        container[key] = rng.choice((container[key] + rng.randint(-2, 2), rng.choice(NUMBERS)))
