"""The notebooks keep to the rules, and the rules notice a fault.

nbval checks that the cells still give their outputs: it collects the notebooks themselves.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbconvert import ScriptExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks import make
from tests.notebook_lint import IGNORED, PLOTLY, RULES, SVG, Book, broken, is_compared

ROOT = Path(__file__).parent.parent
PATHS = sorted(make.HERE.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def text_of(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


@each_notebook
def test_a_notebook_keeps_to_the_rules(path: Path) -> None:
    faults = broken(Book(path.name, path.read_text()))
    assert not faults, "\n".join(f"{rule}: {fault}" for rule, found in faults.items() for fault in found)


@each_notebook
def test_a_notebook_is_a_script_and_a_row_of_slides_too(path: Path) -> None:
    script, resources = ScriptExporter().from_filename(path)
    assert resources["output_extension"] == ".py" and "import labkit" in script
    slides = [cell for cell in nbformat.read(path, as_version=4).cells if "slideshow" in cell.metadata]
    assert len(slides) > 3


# -- a rule notices a fault -------------------------------------------------------------------------------

NAME = "97_made_up.ipynb"
TITLE = """\
# 97 · Made up

**Pages that nobody holds are free to all.**

All is made up, the picture at the top as well. See [the pool](../labkit/core/block_pool.py#L10) and [a paper](https://arxiv.org/abs/2309.06180)."""
BOX = "> **Exercise 97.1 · Count pages** · difficulty ●○○ · ~5 minutes"
STUB = """\
def pages(tokens, size):
    raise NotImplementedError


pages = labkit.check("97.1", pages)"""
SOLUTION = """\
<details><summary>Hint</summary>Round up.</details>

<details><summary>Solution</summary>

```python
def pages(tokens, size):
    return -(-tokens // size)
```

</details>"""
QUESTIONS = ["1?", "2?", "3?", "4?", "5?", "6. From notebook 96: is it so?"]
RECAP = "## Recap\n\n" + "\n\n".join(f"<details><summary>{q}</summary>Yes.</details>" for q in QUESTIONS)
FIGURE = {PLOTLY: {"data": [{"x": [1, 2]}], "layout": {}}, SVG: "<svg/>", "text/plain": "Pages\n\na  1\nb  2"}


def said(text: str) -> list[NotebookNode]:
    return [new_output("stream", name="stdout", text=text)]


def shown(data: dict[str, object]) -> list[NotebookNode]:
    return [new_output("display_data", data)]


def made_up() -> NotebookNode:
    """The smallest notebook that keeps to all rules, not stamped yet."""
    cells = [
        new_markdown_cell(TITLE),
        new_code_cell("", outputs=said("labkit: a model on cpu.\n")),
        new_code_cell("notebook.bars({'a': 1, 'b': 2}, 'Pages')", outputs=shown(FIGURE)),
        new_code_cell("slow, fast = 3.0, 1.0"),
        new_code_cell("print(slow)", outputs=said("3.0\n"), metadata={"tags": [IGNORED]}),
        new_code_cell("print('faster:', slow > fast)", outputs=said("faster: True\n")),
        new_markdown_cell(BOX),
        new_code_cell(STUB, outputs=said("○ 97.1 Count pages: yours to write. More.\n")),
        new_markdown_cell(SOLUTION),
        *(new_code_cell(f"print({i})", outputs=said(f"{i}\n")) for i in range(9)),
        new_markdown_cell(RECAP),
        new_code_cell("labkit.progress()", outputs=said("Solved: 0 of 9.\n"), metadata={"tags": [IGNORED]}),
    ]
    for i, cell in enumerate(cells):
        cell.id = f"c{i:02d}"
    return count(new_notebook(cells=cells))


def count(notebook: NotebookNode) -> NotebookNode:
    """Number the code cells, as a run does."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
    return notebook


def book(change: Callable[[NotebookNode], object] = lambda _: None, *, name: str = NAME) -> Book:
    """The made-up notebook, changed and then stamped."""
    notebook = made_up()
    change(notebook)
    return Book(name, make.stamped(text_of(notebook), name))


def test_the_notebook_made_up_keeps_to_all_rules() -> None:
    assert broken(book()) == {}


def setting(index: int, **fields: object) -> Callable[[NotebookNode], object]:
    """A change that sets fields of one cell."""
    return lambda notebook: notebook.cells[index].update(copy.deepcopy(fields))


def saying(index: int, text: str) -> Callable[[NotebookNode], object]:
    return setting(index, outputs=said(text))


def ignoring(*indices: int) -> Callable[[NotebookNode], object]:
    def change(notebook: NotebookNode) -> None:
        for i in indices:
            notebook.cells[i].metadata = {"tags": [IGNORED]}

    return change


def inserting(number: int) -> Callable[[NotebookNode], object]:
    return lambda notebook: [notebook.cells.insert(9, new_markdown_cell("More.")) for _ in range(number)]


def silencing(*indices: int) -> Callable[[NotebookNode], object]:
    def change(notebook: NotebookNode) -> None:
        for i in indices:
            notebook.cells[i].update(source="x = 1", outputs=[])

    return change


STDERR = new_output("stream", name="stderr", text="FutureWarning: no more")
ERROR = new_output("error", ename="KeyError", evalue="3", traceback=[])
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
BREAKS: list[tuple[str, str, Callable[[NotebookNode], object]]] = [
    ("named", "title", setting(0, source=TITLE.replace("97", "96"))),
    ("long_enough", "it has 19 cells", lambda n: (n.cells.pop(9), count(n))),
    ("long_enough", "it has 41 cells", inserting(21)),
    ("opens_with_a_picture", "draws no picture", setting(2, outputs=shown({"text/plain": "Pages"}))),
    ("opens_with_a_picture", "its picture is not compared", ignoring(2)),
    ("opens_with_a_picture", "no text refers", setting(0, source=TITLE.replace("at the top", ""))),
    ("small", "KB large", setting(-2, source=RECAP + "\n" + "é" * 250_000)),
    ("claims", "claim in bold", setting(0, source=TITLE.replace("**", ""))),
    ("claims", "claim in bold", setting(0, source=TITLE.replace("**Pages", "Pages **that**"))),
    ("was_run", "not run once each", setting(5, execution_count=None)),
    ("was_run", "not run once each", setting(5, execution_count=9)),
    ("was_run", "c10 leaves an output, but it was stripped", setting(10, outputs=[])),
    ("was_run", "c04 leaves an output, but it was stripped", setting(4, outputs=[])),
    ("was_run", "c10 leaves an output", setting(10, outputs=[], source="for i in range(3):\n    print(i)")),
    ("was_run", "c10 leaves an output", setting(10, outputs=[], source="records = [1]\nrecords")),
    ("was_run", "c10 raised KeyError", setting(10, outputs=[ERROR])),
    ("was_run", "c10 warns: 'FutureWarning: no more'", setting(10, outputs=[*said("1\n"), STDERR])),
    ("sets_up", "not one line", saying(1, "labkit: a model.\nAnd more.\n")),
    ("sets_up", "not one line", saying(1, "")),
    ("compared", "7 of 16 code cells are ignored, more than 40%", ignoring(9, 10, 11, 12)),
    ("compared", "9 of 16 code cells have an output that is compared", silencing(9, 10, 11)),
    ("compared", "9 of 16", lambda n: [setting(i, outputs=shown(WIDGET))(n) for i in range(9, 12)]),
    ("compared", "c10 steers nbval by a comment", setting(10, source="# NBVAL_IGNORE_OUTPUT\nprint(1)")),
    ("compared", "c10 is skipped", setting(10, metadata={"tags": ["nbval-skip"]})),
    ("without_clearing", "c10 calls clear_output", setting(10, source="clear_output()\nprint(1)")),
    ("without_paths", "c10 shows a path of a machine: /root/x.py", saying(10, "at /root/x.py\n")),
    ("without_paths", "/tmp/ipykernel_1/2.py", saying(10, "File '/tmp/ipykernel_1/2.py'\n")),
    ("without_paths", "/home/me", setting(10, source="print(open('/home/me/x').read())")),
    ("without_paths", "/work", setting(0, source=TITLE + "\n\nIn `/work`.")),
    ("without_paths", "C:\\lab", saying(10, "C:\\lab\n")),
    ("without_paths", "/home/me", setting(2, outputs=shown(FIGURE | {"text/html": "</home/me"}))),
    ("examines", "it has no box", setting(6, source="An exercise.")),
    ("examines", "exercise 96.1 has another", setting(6, source=BOX.replace("97.1", "96.1"))),
    ("examines", "exercise 97.1 is never checked", setting(7, source="print('97.1')")),
    ("examines", "c07 does not show exercise 97.1 as a reader finds it", saying(7, "✓ 97.1 Count pages.\n")),
    ("examines", "no folded solution", setting(8, source=SOLUTION.replace("Solution", "Answer"))),
    ("recapitulates", "no heading", setting(-2, source=RECAP.replace("## Recap", "Recap"))),
    ("recapitulates", "5 folded answers, not 6", setting(-2, source=RECAP.replace("details", "div", 1))),
    ("recapitulates", "0 folded answers", setting(-2, source=RECAP.replace("Recap", "Recap\n\n## Limits"))),
    ("recapitulates", "nothing from an earlier notebook", setting(-2, source=RECAP.replace("96:", "97:"))),
    ("shows_progress", "its last cell is not", lambda n: n.cells.append(n.cells.pop(-2))),
    ("shows_progress", "its last cell is not", setting(-1, metadata={})),
    ("twinned", "c02 has a figure without a text", setting(2, outputs=shown({PLOTLY: {}, SVG: ""}))),
    ("twinned", "without a text", setting(2, outputs=shown(FIGURE | {"text/plain": "A\n(1)"}))),
    ("twinned", "encoded numbers", setting(2, outputs=shown(FIGURE | {PLOTLY: {"x": {"bdata": "AA="}}}))),
    ("linked", "../labkit/core/nothing.py#L10", setting(0, source=TITLE.replace("block_pool", "nothing"))),
    ("linked", "under the name memory.py", setting(0, source=TITLE.replace("the pool", "`memory.py`"))),
    ("linked", "nowhere.png", setting(0, source=TITLE + '\n\n<img src="nowhere.png">')),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "fault", "change"), BREAKS)
def test_a_rule_refuses_what_breaks_it(
    rule: str, fault: str, change: Callable[[NotebookNode], object]
) -> None:
    faults = broken(book(change))
    assert list(faults) == [rule]
    assert any(fault in found for found in faults[rule]), faults


def test_a_file_without_a_number_is_refused() -> None:
    assert "its file is not called NN_title.ipynb" in broken(book(name="97 Made up.ipynb"))["named"]


def test_a_setup_that_said_nothing_is_refused_though_it_holds_a_magic() -> None:
    assert list(broken(book(setting(1, outputs=[])))) == ["was_run", "sets_up"]


def test_what_is_changed_after_stamping_is_refused() -> None:
    whole = book().text
    badge = f"· Made up\\n{make.BADGE}()"
    for old, new in (("labkit.setup()", "labkit.set_up()"), ("· Made up", badge)):
        assert whole.count(old) >= 1
        assert "as_stamped" in broken(Book(NAME, whole.replace(old, new)))
    kept = whole.replace('"metadata": {\n  "accelerator"', '"metadata": {\n  "widgets": {},\n  "accelerator"')
    assert set(broken(Book(NAME, kept))) == {"as_stamped", "without_widgets"}


def test_no_rule_is_vacuous() -> None:
    assert {rule for rule, _, _ in BREAKS} | {"as_stamped", "without_widgets"} == set(RULES)


def test_what_only_looks_like_a_path_or_a_link_is_let_pass() -> None:
    prose = "Half/work, and `a/tmp/b`, https://example.org/home/x, [up](#recap), [mail](mailto:a@b.c), 1:\\2."
    assert broken(book(setting(0, source=f"{TITLE}\n\n{prose}"))) == {}


# -- stamping -------------------------------------------------------------------------------------


def test_stamping_twice_is_stamping_once_and_keeps_what_the_author_wrote() -> None:
    once = book().text
    assert make.stamped(once, NAME) == once
    before, after = made_up(), nbformat.reads(once, as_version=4)
    assert [cell.source for cell in before.cells[2:]] == [cell.source for cell in after.cells[2:]]
    assert [cell.get("outputs") for cell in before.cells] == [cell.get("outputs") for cell in after.cells]
    assert after.cells[0].source == TITLE


def test_a_cell_keeps_its_id_when_others_come_before_it_and_a_new_or_doubled_one_gets_its_own() -> None:
    def names(change: Callable[[NotebookNode], object]) -> list[str]:
        notebook = made_up()
        change(notebook)
        text = nbformat.v4.writes(notebook)
        assert make.stamped(text, NAME) == make.stamped(text, NAME)
        return [cell.id for cell in nbformat.reads(make.stamped(text, NAME), as_version=4).cells]

    def insert(notebook: NotebookNode) -> None:
        notebook.cells[2:2] = [new_markdown_cell(text, id="c05") for text in ("One.", "Two.", "Two.")]

    def without(notebook: NotebookNode) -> None:
        notebook.nbformat_minor = 4
        del notebook.cells[3]["id"]

    before, after = names(lambda _: None), names(insert)
    assert before == [f"c{i:02d}" for i in range(len(before))]
    assert len(set(after)) == len(after) and after[2] == "c05"
    assert after[:2] + after[5:8] == before[:5] and after[9:] == before[6:]
    assert len(set(names(without))) == len(before) and names(without)[4:] == before[4:]


def test_what_a_kernel_wrote_in_pieces_is_joined_and_its_times_are_dropped() -> None:
    def in_pieces(notebook: NotebookNode) -> None:
        notebook.cells[5].outputs = said("faster: ") + said("True\n") + [STDERR] + said("end\n")
        notebook.cells[5].metadata = {"execution": {"iopub.execute_input": "2026"}, "tags": ["a"]}

    cell = book(in_pieces).cells[5]
    assert [output.text for output in cell.outputs] == ["faster: True\n", STDERR.text, "end\n"]
    assert cell.metadata == {"tags": ["a"]}


@pytest.mark.parametrize(
    "cells", [[], [new_code_cell("")], [new_markdown_cell("# 97"), new_markdown_cell("a")]]
)
def test_a_notebook_without_a_title_and_a_place_for_the_setup_is_not_stamped(
    cells: list[NotebookNode],
) -> None:
    with pytest.raises(SystemExit, match=r"97_made_up\.ipynb must begin with a title"):
        make.stamped(text_of(new_notebook(cells=cells)), NAME)


def test_the_address_is_the_one_in_pyproject() -> None:
    assert f'Repository = "{make.repository()}"' in (ROOT / "pyproject.toml").read_text()


def test_a_badge_and_a_fetching_cell_come_and_go_with_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def stamped_at(address: str, text: str) -> str:
        monkeypatch.setattr(make, "repository", lambda: address)
        return make.stamped(text, NAME)

    nowhere, somewhere = "https://github.com/OWNER/labkit", "https://github.com/somebody/labkit"
    without = stamped_at(nowhere, text_of(made_up()))
    assert "github" not in "".join(cell.source for cell in nbformat.reads(without, as_version=4).cells[:2])
    there = stamped_at(somewhere, without)
    title, setup = (cell.source for cell in nbformat.reads(there, as_version=4).cells[:2])
    lines = title.splitlines()
    assert lines[:2] + lines[4:] == TITLE.splitlines() and lines[3] == ""
    assert lines[2].startswith(make.BADGE) and f"/somebody/labkit/blob/main/notebooks/{NAME})" in lines[2]
    assert f"--no-deps git+{somewhere}\n" in setup
    assert stamped_at(somewhere, there) == there and stamped_at(nowhere, there) == without


# -- nbval notices a fault ----------------------------------------------------------------------------------


def altered(notebook: NotebookNode) -> tuple[NotebookNode, int, str, str]:
    """A copy up to the first compared cell that shows a number, with another number in its place.

    Returns:
        The copy, the index of that cell among the code cells, and the line before and after the change.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for i, cell in enumerate(code[1:], 1):
        for output in cell.outputs if is_compared(cell) else ():
            holder, key = (output, "text") if "text" in output else (output.get("data", {}), "text/plain")
            for line in holder.get(key, "").splitlines():
                if number := re.search(r"\d", line):
                    other = f"{line[: number.start()]}{(int(number[0]) + 1) % 10}{line[number.end() :]}"
                    holder[key] = holder[key].replace(line, other, 1)
                    code[
                        0
                    ].source = "import labkit"  # cells do the rest of the setup themselves when they need it
                    return new_notebook(cells=code[: i + 1], metadata=notebook.metadata), i, line, other
    raise LookupError("no compared cell says a number")


def nbval(folder: Path, **notebooks: NotebookNode) -> str:
    """What nbval reports of copies in another folder that have a fault; it runs as in the tests."""
    for name, notebook in notebooks.items():
        (folder / f"{name}.ipynb").write_text(text_of(notebook))
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-vv", "-rA", "--color=no"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def alterations() -> dict[Path, tuple[NotebookNode, int, str, str]]:
    return {path: altered(nbformat.read(path, as_version=4)) for path in PATHS}


@pytest.fixture(scope="module")
def report(alterations: dict, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of nbval on all altered copies."""
    return nbval(
        tmp_path_factory.mktemp("altered"), **{path.stem: copy for path, (copy, *_) in alterations.items()}
    )


@each_notebook
def test_a_number_that_is_not_what_it_was_fails_its_cell_and_no_other(
    path: Path, alterations: dict, report: str
) -> None:
    _, cell, before, after = alterations[path]
    ended = re.findall(rf"^(PASSED|FAILED) {path.stem}\.ipynb::Cell (\d+)", report, re.MULTILINE)
    assert sorted(ended, key=lambda end: int(end[1])) == [
        *(("PASSED", str(i)) for i in range(cell)), ("FAILED", str(cell)),
    ], report  # fmt: skip
    told = report.split(f"{path.stem}.ipynb::Cell {cell} ____")[1].split(".ipynb::Cell ")[0]
    assert "Cell outputs differ" in told and "mismatch" in told
    for line in (before, after):  # both stand in the report, perhaps escaped as in Python
        assert repr(line)[1:-1] in told or line in told, told


def test_nbval_passes_what_is_right_and_fails_a_figure_by_one_number(tmp_path: Path) -> None:
    """Without this, the test above could pass for any other fault."""
    figure = "from IPython.display import display\ndisplay({'%s': {'data': [%d]}}, raw=True)"
    three = shown({PLOTLY: {"data": [3]}})
    cells = [
        new_code_cell(figure % (PLOTLY, n), outputs=copy.deepcopy(three), execution_count=1) for n in (3, 4)
    ]
    told = nbval(tmp_path, copy=new_notebook(cells=cells))
    assert re.findall(r"^(PASSED|FAILED) copy\.ipynb::Cell (\d)", told, re.MULTILINE) == [
        ("PASSED", "0"), ("FAILED", "1"),
    ], told  # fmt: skip
