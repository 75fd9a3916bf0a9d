"""The rules that every notebook of the course keeps. A rule yields its faults; `broken` collects them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from notebooks import make
from tests.exercising import boxes, folded

PLOTLY = "application/vnd.plotly.v1+json"
SVG = "image/svg+xml"
IGNORED = "nbval-ignore-output"
_NEVER_COMPARED = {"image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"}
_SAYS = {"print", "display", "show", "check", "source", "setup"}  # functions that leave an output


@dataclass(frozen=True)
class Book:
    """A notebook: the name and the text of its file, and the folder from which its links start."""

    name: str
    text: str
    folder: Path = make.HERE

    @cached_property
    def notebook(self) -> NotebookNode:
        return nbformat.reads(self.text, as_version=4)

    @property
    def cells(self) -> list[NotebookNode]:
        return self.notebook.cells

    @cached_property
    def code(self) -> list[NotebookNode]:
        return [cell for cell in self.cells if cell.cell_type == "code"]

    @cached_property
    def prose(self) -> str:
        return "\n\n".join(cell.source for cell in self.cells if cell.cell_type == "markdown")

    @property
    def number(self) -> str:
        return self.name[:2]


def is_ignored(cell: NotebookNode) -> bool:
    return IGNORED in cell.metadata.get("tags", ())


def is_compared(cell: NotebookNode) -> bool:
    """Whether nbval compares an output of this cell with the one it gets when it runs the cell."""
    return not is_ignored(cell) and any(_says_something(output) for output in cell.outputs)


def _says_something(output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return bool(output.text.strip())
    return output.output_type == "error" or bool(set(output.data) - _NEVER_COMPARED)


def _should_say(source: str) -> bool:
    """Whether a cell calls a function of `_SAYS` outside definitions, or ends with a bare name."""
    body = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)).body
    if body and isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, ast.Name):
        return True
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in _SAYS:
                return True
        waiting += ast.iter_child_nodes(node)
    return False


# -- the rules ------------------------------------------------------------------------------------


def named(book: Book) -> Iterator[str]:
    """The file and the title have the same number."""
    if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", book.name):
        yield "its file is not called NN_title.ipynb"
    if not re.match(rf"# {book.number} · \S", book.cells[0].source):
        yield f"its title does not begin with '# {book.number} · '"


def long_enough(book: Book) -> Iterator[str]:
    """It has 20 to 40 cells."""
    if not 20 <= len(book.cells) <= 40:
        yield f"it has {len(book.cells)} cells, not 20 to 40"


def small(book: Book) -> Iterator[str]:
    """It has at most 500 KB."""
    if (size := len(book.text.encode())) > 500_000:
        yield f"it is {size / 1000:.0f} KB large, and 500 are allowed"


def as_stamped(book: Book) -> Iterator[str]:
    """Its badge, first cell, metadata and ids are those that `make.py` writes."""
    if make.stamped(book.text, book.name) != book.text:
        yield "it is not as stamped: python notebooks/make.py --stamp"


def claims(book: Book) -> Iterator[str]:
    """Its first cell makes a claim in bold."""
    paragraphs = re.split(r"\n\s*\n", book.cells[0].source)
    if not any(re.match(r"\*\*[^*].{10,}?\*\*", paragraph, re.DOTALL) for paragraph in paragraphs[1:]):
        yield "no paragraph of its first cell begins with a claim in bold"


def opens_with_a_picture(book: Book) -> Iterator[str]:
    """Its first cell after the setup draws its idea, alike on every machine, and a text refers to it."""
    if len(book.code) < 2 or not any(SVG in output.get("data", {}) for output in book.code[1].outputs):
        yield "its first cell after the setup draws no picture"
    elif is_ignored(book.code[1]):
        yield "its picture is not compared"
    if book.prose.count("the picture at the top") < 1:
        yield "no text refers to the picture at the top"


def was_run(book: Book) -> Iterator[str]:
    """It was run once, from first to last cell; no output was stripped, and nothing raised or warned."""
    counts = [cell.execution_count for cell in book.code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"its cells were not run once each, in order: {counts}"
    for cell in book.code:
        if not cell.outputs and _should_say(cell.source):
            yield f"{cell.id} leaves an output, but it was stripped"
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", ()):
                yield f"{cell.id} raised {output.ename}"
            if output.get("name") == "stderr":
                yield f"{cell.id} warns: {output.text[:80]!r}"


def sets_up(book: Book) -> Iterator[str]:
    """Its setup prints one line."""
    said = "".join(output.get("text", "\n\n") for output in book.code[0].outputs)
    if not (said.startswith("labkit: ") and said.count("\n") == 1):
        yield f"its setup prints {said!r}, not one line"


def compared(book: Book) -> Iterator[str]:
    """At most 40% of its code cells are ignored and at least 60% are compared; only tags steer nbval."""
    ignored, share = sum(map(is_ignored, book.code)), sum(map(is_compared, book.code))
    if ignored > 0.4 * len(book.code):
        yield f"{ignored} of {len(book.code)} code cells are ignored, more than 40%"
    if share < 0.6 * len(book.code):
        yield f"{share} of {len(book.code)} code cells have an output that is compared, less than 60%"
    for cell in book.code:
        if re.search(r"#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source):
            yield f"{cell.id} steers nbval by a comment, not by a tag"
        if "nbval-skip" in cell.metadata.get("tags", ()):
            yield f"{cell.id} is skipped"


def without_widgets(book: Book) -> Iterator[str]:
    """It keeps no state of widgets."""
    if "widgets" in book.notebook.metadata or "widget-state+json" in book.text:
        yield "it keeps the state of widgets"


def without_clearing(book: Book) -> Iterator[str]:
    """No cell clears or updates the output of another: nbval cannot follow that."""
    for cell in book.code:
        if found := re.search(r"clear_output|update_display|display_id", cell.source):
            yield f"{cell.id} calls {found[0]}"


_MACHINE = re.compile(
    r"(?<![\w./:~-])/(?:root|tmp|home|work|opt|usr|mnt|content|Users|private)\b/?\S*"
    r"|\b[A-Z]:\\\S*|\bsite-packages\b\S*"
)


def without_paths(book: Book) -> Iterator[str]:
    """It shows no path of the machine that ran it."""
    for cell in book.cells:
        for text in _strings([cell.source, cell.get("outputs", [])]):
            if found := _MACHINE.search(text):
                yield f"{cell.id} shows a path of a machine: {found[0][:60]}"


def _strings(thing: Any) -> Iterator[str]:
    if isinstance(thing, str):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _strings(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from _strings(value)


def examines(book: Book) -> Iterator[str]:
    """Each exercise has the notebook's number, a check of an untouched stub, and one folded solution."""
    known = boxes(book.cells)
    if not known:
        yield f"it has no box '> **Exercise {book.number}.1 · title**'"
    for name, prose in known.items():
        if not name.startswith(f"{book.number}."):
            yield f"exercise {name} has another notebook's number"
        checks = [cell for cell in book.code if re.search(rf"""\bcheck\(["']{name}["'],""", cell.source)]
        if not checks:
            yield f"exercise {name} is never checked"
        for cell in checks:
            said = "".join(output.get("text", "") for output in cell.outputs)
            if f"○ {name} " not in said or is_ignored(cell):
                yield f"{cell.id} does not show exercise {name} as a reader finds it: untouched"
        if len(folded(prose, "Solution")) != 1:
            yield f"exercise {name} has no folded solution, or several"


def recapitulates(book: Book) -> Iterator[str]:
    """Under the heading `Recap` stand six questions with folded answers, the last from an earlier notebook.

    The first notebook has none before it, and asks five.
    """
    heading = re.search(r"^(#+)\s+Recap\b.*$", book.prose, re.MULTILINE)
    if not heading:
        yield "it has no heading '## Recap'"
        return
    rest = book.prose[heading.end() :]
    after = re.search(rf"^#{{1,{len(heading[1])}}}\s", rest, re.MULTILINE)
    recap, first = rest[: after.start()] if after else rest, book.number == "00"
    count = len(re.findall(r"<details\b", recap))
    if count != (5 if first else 6):
        yield f"its recap has {count} folded answers, not {5 if first else 6}"
    earlier = [
        number for number in re.findall(r"\b6\. From notebook (\d\d): ", recap) if number < book.number
    ]
    if not first and not earlier:
        yield "its recap asks nothing from an earlier notebook"


def shows_progress(book: Book) -> Iterator[str]:
    """Its last cell shows what is solved, which is another thing for each reader."""
    last = book.cells[-1]
    if last.source != "labkit.progress()" or not is_ignored(last):
        yield "its last cell is not labkit.progress(), ignored by nbval"


def twinned(book: Book) -> Iterator[str]:
    """Each figure has a text twin, and plain lists in it: plotly 5, 6 and 7 write those in the same way."""
    for cell in book.code:
        for output in cell.outputs:
            data = output.get("data", {})
            if PLOTLY not in data and SVG not in data:
                continue
            if len(data.get("text/plain", "").splitlines()) <= 2:
                yield f"{cell.id} has a figure without a text of more than two lines"
            if "bdata" in str(data.get(PLOTLY)):
                yield f"{cell.id} has a figure with encoded numbers, not lists"


def linked(book: Book) -> Iterator[str]:
    """The files to which it links are there, and a link that shows the name of a file leads to that file."""
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", book.prose)
    links += re.findall(r"""(?:href|src)\s*=\s*["']([^"']+)["']""", book.prose)
    for link in links:
        path = link.split("#")[0]
        if path and not re.match(r"[a-z][a-z0-9+.-]*:", path) and not (book.folder / path).exists():
            yield f"it links to {link}, which is not there"
    for shown, link in re.findall(r"\[`([^`\]]+\.py)`\]\(([^)#\s]+)", book.prose):
        if Path(shown).name != Path(link).name:
            yield f"it links to {link} under the name {shown}"


RULES: dict[str, Callable[[Book], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        opens_with_a_picture,
        named, long_enough, small, as_stamped, claims, was_run, sets_up, compared, without_widgets,
        without_clearing, without_paths, examines, recapitulates, shows_progress, twinned, linked,
    )
}  # fmt: skip


def broken(book: Book) -> dict[str, list[str]]:
    """The rules that a notebook breaks, and its faults."""
    found = {name: list(rule(book)) for name, rule in RULES.items()}
    return {name: faults for name, faults in found.items() if faults}
