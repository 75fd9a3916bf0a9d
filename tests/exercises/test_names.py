"""Exercises are found by their names, and what is no name is told so."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from labkit import exercises
from labkit.exercises import check, find
from tests.exercises.test_exercises import made_up, pages

__all__ = ["made_up"]  # a fixture that each test of this file uses


@pytest.mark.parametrize("name", ["98.3", "98", "98.", "98.10"])
def test_an_unknown_exercise_of_a_known_notebook_is_told_which_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"no exercise '98.*': notebook 98 has 98\.1, 98\.2$"):
        check(name, pages)


@pytest.mark.parametrize("name", ["97.1", "", "x", "1.1", "../e98.1", "九.1", None, 3.1])
def test_an_unknown_notebook_is_told_what_a_name_looks_like(name: Any) -> None:
    with pytest.raises(ValueError, match=r'there is no exercise .*: an id is, for example, "03\.2"$'):
        find(name)


def test_a_module_that_lacks_something_else_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'numpie'", name="numpie")

    monkeypatch.setattr(exercises, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numpie"):
        find("98.1")


@pytest.mark.parametrize("thing", [None, 3, "pages", [pages]])
def test_what_cannot_be_called_is_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match=r"exercise 98\.1 checks a function or a class, not "):
        check("98.1", thing)
