"""Answers to the exercises as readers may write them, right and wrong: the judge must tell them apart.

Each file of `answers/` holds the answers to one exercise, in sections. A section is a change of the
notebook's solution (lines with - are replaced by lines with +), or code that defines `answer`, which may call
the solution by its name. The wrong ones are slips, and cheats: answers that change what they are given,
remember earlier calls, know only the sizes that the notebook prints, or are nearly right.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.exercises import Verdict, find, judge
from tests.exercising import boxes, folded, function_from, notebook, solution

HERE = Path(__file__).parent / "answers"
_SECTION = re.compile(r"^## (wrong|right): (.+)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
_PATIENCE = 4.0  # seconds of computing: enough for each right answer, on a slow machine too


def sections() -> Iterator[tuple[str, str, str, str]]:
    """The exercise, "wrong" or "right", the name and the text of each answer."""
    for file in sorted(HERE.glob("*.txt")):
        for kind, name, text in _SECTION.findall(file.read_text(encoding="utf-8")):
            yield file.stem, kind, name, text


def answer(exercise: str, text: str) -> Any:
    """The function or class of a section."""
    code = solution(exercise[:2], exercise)
    (name,) = re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE)
    if not text.startswith("-"):
        return function_from(f"{code}\n\n{text}", "answer")
    lines = text.rstrip("\n").split("\n")
    before, after = ("\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+")
    assert before in code, f"the solution in the notebook has no {before!r}"
    return function_from(code.replace(before, after), name)


@functools.cache
def verdict_of(exercise: str, kind: str, text: str) -> Verdict:
    torch.manual_seed(0)
    random.seed(0)
    patience = _PATIENCE if kind == "right" else _PATIENCE / 4
    return judge(exercise, answer(exercise, text), patience=patience)


@pytest.mark.parametrize(
    ("exercise", "kind", "text"),
    [
        pytest.param(exercise, kind, text, id=f"{exercise} {kind}: {name}")
        for exercise, kind, name, text in sections()
    ],
)
def test_the_judge_tells_right_from_wrong(exercise: str, kind: str, text: str) -> None:
    verdict = verdict_of(exercise, kind, text)
    assert verdict.state == kind, verdict.text


@pytest.mark.parametrize("exercise", sorted({exercise for exercise, *_ in sections()}))
def test_a_notebook_says_of_wrong_answers_what_the_judge_says(exercise: str) -> None:
    """Beside each solution, in quotation marks, stand sentences of verdicts on answers of these kinds."""
    prose = boxes(notebook(exercise[:2]).cells)[exercise]
    quotes = [
        quote for body in folded(prose, "Typical wrong answers") for quote in re.findall("“(.+?)”", body)
    ]
    assert len(quotes) >= 2
    told = [verdict_of(*one[:2], one[3]).text for one in sections() if one[:2] == (exercise, "wrong")]
    for quote in quotes:
        assert any(quote in " ".join(text.split()) for text in told), quote


def test_every_exercise_has_enough_answers_of_both_kinds() -> None:
    found = [(exercise, kind) for exercise, kind, *_ in sections()]
    for exercise in {exercise for exercise, _ in found}:
        assert find(exercise)
        assert found.count((exercise, "wrong")) >= 12 and found.count((exercise, "right")) >= 4, exercise
    assert len({exercise for exercise, _ in found}) == 27
