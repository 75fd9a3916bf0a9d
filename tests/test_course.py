"""The pages beside the notebooks: links lead to headings, words are those of the course, names are there."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from labkit.exercises.progress import COURSE

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
PAGES = sorted(NOTEBOOKS.glob("*.md"))


def text(path: Path) -> str:
    """A page, or the prose of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchor(heading: str) -> str:
    """The name under which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_anchors(path: Path) -> list[str]:
    """The links to a heading that is not there."""
    links = re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#([^)\s]+)\)", text(path))
    pages = [(path.parent / page if page else path, name) for page, name in links]
    return [
        f"{page.name}#{name}"
        for page, name in pages
        if page.suffix in (".md", ".ipynb")
        and name not in map(anchor, re.findall(r"^#+ (.+)$", text(page), re.MULTILINE))
    ]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.name)
def test_the_progress_that_a_notebook_keeps_is_that_of_the_whole_course(path: Path) -> None:
    told = nbformat.read(path, as_version=4).cells[-1].outputs[0].data["text/plain"]
    exercises = [name for chapter in COURSE for name in chapter.exercises]
    assert told.startswith(f"Solved: 0 of {len(exercises)}.\n")
    assert re.findall(r"○ (\d\d\.\d)", told) == exercises


@pytest.mark.parametrize("path", [*BOOKS, *PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_to_headings_that_are_there(path: Path) -> None:
    assert broken_anchors(path) == []


def test_a_link_to_a_heading_that_is_not_there_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[there](#a-page), [not there](#an-page), [nor](page.md#there), [code](x.py#L3)"
    )
    assert broken_anchors(page) == ["page.md#an-page", "page.md#there"]


# -- the glossary ----------------------------------------------------------------------------------

WORDS = dict(re.findall(r"^### (.+)\n(.+)$", text(NOTEBOOKS / "GLOSSARY.md"), re.MULTILINE))


def test_the_glossary_has_forty_words_in_one_to_three_sentences_each() -> None:
    assert len(WORDS) >= 40
    for word, meaning in WORDS.items():
        assert 1 <= len(re.findall(r"[.?!](?= |$)", meaning)) <= 3 and len(meaning) < 160, word


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_glossary_is_used_in_the_course_and_linked_once(word: str) -> None:
    course = "\n".join(map(text, BOOKS))
    stem = word.lower().removesuffix("ion").removesuffix("s")
    assert stem in course.lower()
    assert course.count(f"(GLOSSARY.md#{anchor(word)})") == 1


# -- the landing page ------------------------------------------------------------------------------


def test_every_notebook_is_on_the_map_and_in_the_table_with_its_exercises() -> None:
    page = text(NOTEBOOKS / "README.md")
    for chapter in COURSE:
        assert re.search(rf"\bn{chapter.file[:2]}\[", page), chapter.file
        assert f"({chapter.file}.ipynb) |" in page and f"| {', '.join(chapter.exercises)} |" in page


def test_the_short_path_is_the_same_in_both_readmes() -> None:
    (short,) = re.findall(
        r"^\| short, 2 hours \| (.+?), without", text(NOTEBOOKS / "README.md"), re.MULTILINE
    )
    numbers = ", ".join(re.findall(r"\[(\d\d)\]", short))
    assert f"{numbers})" in text(ROOT / "README.md")


def test_each_notebook_leads_to_the_next_and_the_last_to_the_closing_page() -> None:
    for book, then in zip(BOOKS, [*BOOKS[1:], NOTEBOOKS / "CLOSING.md"], strict=True):
        assert re.search(rf"^Next: \[.+\]\({then.name}\)\.$", text(book), re.MULTILINE), book.name


def test_the_closing_page_lists_every_notebook_that_builds_something() -> None:
    built = text(NOTEBOOKS / "CLOSING.md").split("## What real engines add")[0]
    for chapter in COURSE:
        assert re.search(rf"\(.*\b{chapter.file[:2]}\b.*\)", built), chapter.file


# -- the plan for a class --------------------------------------------------------------------------


def test_the_plan_for_a_class_names_options_and_buttons_that_are_there() -> None:
    plan, program = text(NOTEBOOKS / "TEACHING.md"), (ROOT / "app.py").read_text(encoding="utf-8")
    program += (ROOT / "labkit/serving/cli.py").read_text(encoding="utf-8")
    for option in set(re.findall(r"--(?:no-)?([a-z][a-z-]+)", plan)):
        assert f'"--{option}"' in program, option
    static = "".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "labkit/views/static").glob("*.html")
    )
    buttons = ("Why continuous batching?", "What does paged memory save?", "What does one more request cost?")
    for name in (*buttons, "Projector view", "Reset settings", "Save the session", "End all requests"):
        assert name in plan and name in static, name
    scenarios = (ROOT / "labkit/page/scenarios.py").read_text(encoding="utf-8")
    assert "A shared system prompt" in plan and '"A shared system prompt"' in scenarios


def test_the_plan_takes_ninety_minutes() -> None:
    starts = [int(n) for n in re.findall(r"^\| (\d+) \|", text(NOTEBOOKS / "TEACHING.md"), re.MULTILINE)]
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] < 90
