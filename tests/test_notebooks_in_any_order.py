"""A reader may run a notebook twice, and its sections in any order: it works, or says what to run first.

The tiny model stands in for the real one, which takes seconds. What the cells say is compared elsewhere.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Sequence

import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from labkit.notebook.run_first import ADVICE
from notebooks import make
from tests.exercising import notebook

NUMBERS = [path.name[:2] for path in sorted(make.HERE.glob("*.ipynb"))]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # several kernels may run side by side
WITH_THE_TINY_MODEL = """\
import sys
sys.path[:0] = ["..", "."]

import labkit
from labkit.models import load


def replaced(real):
    return lambda model=None, **switches: real("tiny-random", **switches)


load.load_model = replaced(load.load_model)
from labkit.exercises import e09

e09.plain_model.__defaults__ = ("tiny-random",)
labkit.setup()"""


class Reader:
    """A kernel, and somebody who runs cells of a notebook in it."""

    def __init__(self, number: str) -> None:
        self.number = number
        read = copy.deepcopy(notebook(number))  # others look at the outputs that are kept
        self.cells = [cell for cell in read.cells if cell.cell_type == "code"]
        self.cells[0] = new_code_cell(WITH_THE_TINY_MODEL)
        self.book = new_notebook(cells=self.cells)
        place = {"metadata": {"path": make.HERE}}
        self.client = NotebookClient(
            self.book, timeout=300, kernel_name="python3", resources=place, allow_errors=True
        )

    def run(self, places: Sequence[int]) -> Iterator[tuple[NotebookNode, str]]:
        """Run cells one after the other, up to the first that fails; yields each with what went wrong."""
        for place in places:
            cell = self.client.execute_cell(self.cells[place], place)
            wrong = [output for output in cell.outputs if output.output_type == "error"]
            told = "".join(output.text for output in cell.outputs if output.get("name") == "stderr")
            yield cell, f"{wrong[0].ename}: {wrong[0].evalue}\n{told}" if wrong else ""
            if wrong:
                return


def sections(number: str) -> list[list[int]]:
    """The places of code cells, by the headings between them. The first section begins after the setup."""
    found: list[list[int]] = [[]]
    place = -1
    for cell in notebook(number).cells:
        if cell.cell_type == "code":
            place += 1
            if place:
                found[-1].append(place)
        elif "\n## " in f"\n{cell.source}":
            found.append([])
    return [section for section in found if section]


def says_what_to_run(wrong: str) -> bool:
    """Whether an error tells a reader what to run first."""
    return ADVICE.partition("}")[2][-60:] in wrong or (
        wrong.startswith("RuntimeError") and "run the " in wrong
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_a_notebook_runs_twice_and_the_second_time_in_any_order(number: str) -> None:
    reader, shuffled = Reader(number), sections(number)
    random.Random(number).shuffle(shuffled)
    with reader.client.setup_kernel(env=ONE_THREAD):
        for cell, wrong in reader.run(range(len(reader.cells))):
            assert not wrong, f"{cell.source}\n\n{wrong}"
        for section in shuffled:
            for cell, wrong in reader.run(section):
                assert not wrong or says_what_to_run(wrong), f"{cell.source}\n\n{wrong}"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_section_that_comes_too_early_says_what_to_run_first(number: str) -> None:
    reader, shuffled = Reader(number), sections(number)
    random.Random(number).shuffle(shuffled)
    with reader.client.setup_kernel(env=ONE_THREAD):
        for section in [[0], *shuffled]:
            for cell, wrong in reader.run(section):
                assert not wrong or says_what_to_run(wrong), f"{cell.source}\n\n{wrong}"


def test_an_error_that_helps_nobody_is_noticed() -> None:
    assert not says_what_to_run("NameError: name 'tiny' is not defined\n")
    assert not says_what_to_run("RuntimeError: the server is closed")
    assert says_what_to_run(f"NameError: name 'tiny' is not defined\n{ADVICE.format(name='tiny')}\n")
