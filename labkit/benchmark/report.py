"""What the reports of all measurements have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Report:
    """What a measurement found. `str` of it is a table for a terminal, `to_json` has the figures."""

    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def settings_parts(self) -> list[str]:
        """The settings, each with its name."""
        return [f"{name} {value}" for name, value in self.settings.items()]

    @property
    def settings_line(self) -> str:
        """The settings in one line."""
        return ", ".join(self.settings_parts)


def table_line(cells: Sequence[str], widths: Sequence[int], *, left: int = 1) -> str:
    """A line of a table. The first `left` columns are aligned to the left, the others to the right."""
    sides = "<" * left + ">" * (len(widths) - left)
    return "".join(f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
