"""Cells that a reader runs again, or too late, give what they gave before, or say what to run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from notebooks import make
from tests.exercising import notebook


def run(number: str, cells: Sequence[int | str]) -> list[str]:
    """Run cells of a notebook (by their places) and code of one's own; returns what each printed."""
    all_cells = notebook(number).cells
    sources = [all_cells[cell].source if isinstance(cell, int) else cell for cell in cells]
    book = new_notebook(cells=list(map(new_code_cell, sources)))
    place = {"metadata": {"path": make.HERE}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=place).execute()
    texts = [
        [output.text for output in cell.outputs if output.get("name") == "stdout"] for cell in book.cells
    ]
    return ["".join(text) for text in texts]


def place(number: str, fragment: str) -> int:
    """The place of the one code cell with this fragment."""
    cells = enumerate(notebook(number).cells)
    (found,) = [i for i, cell in cells if cell.cell_type == "code" and fragment in cell.source]
    return found


def test_the_tour_foretells_the_run_again() -> None:
    stub, foretells = place("00", 'labkit.check("00.1"'), place("00", 'print(f"foretold')
    setup = [1, place("00", "SIX = ["), place("00", "import inject"), place("00", "import facts_of, plan_of")]
    *_, first, again = run("00", [*setup, stub, foretells, foretells])
    assert first == again == "foretold 8 of 8 steps\n"


def test_calls_can_be_made_again_until_the_server_is_closed() -> None:
    opens, calls = place("11", "serving.start()"), place("11", "client = OpenAI(")
    *_, first, again = run("11", [1, opens, calls, calls])
    assert first == again and first.count("first: ") == 1
    with pytest.raises(CellExecutionError, match="the server is closed: run the first cell of this section"):
        run("11", [1, opens, calls, "server.should_exit = True\nserving.join()", calls])
