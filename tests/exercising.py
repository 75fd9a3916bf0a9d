"""What the tests of exercises share: the folded solutions of notebooks, and assertions about verdicts."""

from __future__ import annotations

import functools
import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from labkit.exercises import Verdict, judge

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
_BOX = re.compile(r"^>\s*\*\*Exercise\s+(\d\d\.\d+)\b", re.MULTILINE)
_FOLDED = re.compile(
    r"<details\b[^>]*>\s*<summary>\s*(?:<[^>]+>\s*)*(?P<title>[^<]*).*?</summary>(?P<body>.*?)</details>",
    re.DOTALL,
)
_CODE = re.compile(r"^```python\s*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)


@functools.cache
def notebook(number: str) -> NotebookNode:
    """The notebook of that number, such as "03"."""
    found = sorted(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    if len(found) != 1:
        raise LookupError(f"{len(found)} notebooks are numbered {number}")
    return nbformat.read(found[0], as_version=4)


def boxes(cells: NotebookNode) -> dict[str, str]:
    """The exercises of a notebook: for each id, the markdown from its box to the next box."""
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    starts = list(_BOX.finditer(prose))
    ends = [*(start.start() for start in starts), len(prose)][1:]
    return {start[1]: prose[start.start() : end] for start, end in zip(starts, ends, strict=True)}


def folded(prose: str, title: str) -> list[str]:
    """The bodies of all `<details>` whose summary begins with this title."""
    return [found["body"] for found in _FOLDED.finditer(prose) if found["title"].strip().startswith(title)]


def solution(number: str, exercise_id: str) -> str:
    """The code of an exercise's folded solution.

    Raises:
        LookupError: the notebook, the box of the exercise or its one folded solution with code is missing.
    """
    known = boxes(notebook(number).cells)
    if exercise_id not in known:
        raise LookupError(
            f"notebook {number} has no box of exercise {exercise_id}; it has {', '.join(known)}"
        )
    blocks = [code for body in folded(known[exercise_id], "Solution") for code in _CODE.findall(body)]
    if len(blocks) != 1:
        raise LookupError(f"{len(blocks)} code blocks are folded under Solution of exercise {exercise_id}")
    return blocks[0]


def function_from(code: str, name: str) -> Any:
    """Run code in an empty namespace, and return what it defines under this name.

    Like the kernel of a notebook, it keeps the source for `inspect.getsource` and for the lines in messages.
    """
    file = f"<solution {name} {hash(code):x}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    space: dict[str, Any] = {"__name__": "learner"}
    exec(compile(code, file, "exec", dont_inherit=True), space)
    return space[name]


def assert_refused(exercise_id: str, function: Callable[..., Any], fragment: str) -> Verdict:
    """Assert that the function is judged wrong, with this fragment in the text of the verdict."""
    verdict = judge(exercise_id, function)
    assert verdict.state == "wrong", f"{exercise_id} took a wrong answer: {verdict.state}: {verdict.text}"
    assert fragment in verdict.text, f"refused, but for another reason than {fragment!r}: {verdict.text}"
    assert not verdict.pictures
    return verdict


def assert_accepted(exercise_id: str, function: Callable[..., Any]) -> Verdict:
    """Assert that the function is judged right."""
    verdict = judge(exercise_id, function)
    assert verdict.state == "right", f"{exercise_id} refused a right answer: {verdict.state}: {verdict.text}"
    return verdict


def assert_open(exercise_id: str, function: Callable[..., Any]) -> Verdict:
    """Assert that the function is judged an untouched stub, in one line."""
    verdict = judge(exercise_id, function)
    assert verdict.state == "open", (
        f"{exercise_id} took the stub for an answer: {verdict.state}: {verdict.text}"
    )
    assert "\n" not in verdict.text and not verdict.pictures
    return verdict
