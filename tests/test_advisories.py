"""No release with a hole that we know of is asked for, installed, or expected on Colab."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


class Advisory(NamedTuple):
    package: str
    fixed: Version
    told: datetime.date
    name: str
    words: str


def advisories() -> list[Advisory]:
    found = []
    for line in (ROOT / "tests" / "advisories.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, fixed, told, name, words = line.split(maxsplit=4)
            found.append(Advisory(package, Version(fixed), datetime.date.fromisoformat(told), name, words))
    return found


def asked(file: Path) -> dict[str, tuple[Requirement, str]]:
    """The requirements in a file by name, each with the comment beside it."""
    found = {}
    for line in file.read_text().splitlines():
        wanted, _, comment = line.partition("#")
        if wanted.strip():
            requirement = Requirement(wanted)
            found[requirement.name] = (requirement, comment)
    return found


ADVISORIES = {advisory.name: advisory for advisory in advisories()}
REQUIRED, COLAB = asked(ROOT / "requirements.txt"), asked(ROOT / "tests" / "colab.txt")


@pytest.mark.parametrize("name", ADVISORIES)
def test_no_release_with_a_known_hole_is_let_in(name: str) -> None:
    advisory = ADVISORIES[name]
    assert Version(importlib.metadata.version(advisory.package)) >= advisory.fixed
    if advisory.package in REQUIRED:
        requirement, comment = REQUIRED[advisory.package]
        floors = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        assert floors and min(floors) >= advisory.fixed, f"{requirement}: {advisory.words}"
        assert name in comment, f"beside {requirement} it is to be said why: {name}"
    if advisory.package in COLAB:
        assert all(Version(part.version) >= advisory.fixed for part in COLAB[advisory.package][0].specifier)


def test_what_we_ask_for_can_be_had_on_colab() -> None:
    for name, (pinned, _) in COLAB.items():
        if name in REQUIRED:
            (version,) = (part.version for part in pinned.specifier)
            assert REQUIRED[name][0].specifier.contains(version), f"Colab has {name} {version}"


def test_the_list_says_when() -> None:
    for advisory in ADVISORIES.values():
        assert datetime.date(2025, 1, 1) < advisory.told <= datetime.date.today(), advisory.name
