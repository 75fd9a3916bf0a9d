"""Stamps the notebooks, runs them, and keeps what they say.

    python notebooks/make.py            # stamp and run all of them
    python notebooks/make.py 03 07      # those two
    python notebooks/make.py --stamp    # stamp only: badge, first cell, metadata
    python notebooks/make.py --check    # change nothing; say what is not as stamped

The address of the repository stands in `pyproject.toml` alone. What a run brings along that is no result
(times, widget state) is left out, so that a second run changes as little as possible.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
SETUP = """\
# On Colab this fetches labkit and leaves Colab's torch alone. Elsewhere there is nothing to fetch.
import sys

if "google.colab" in sys.modules:
    %pip install -q --no-deps git+{repository} gguf anywidget

import labkit

labkit.setup()"""
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def repository() -> str:
    """The address of the repository, as `pyproject.toml` has it."""
    text = (HERE.parent / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "(https://[^"]+)"', text, re.MULTILINE)
    if not found:
        raise SystemExit("pyproject.toml has no Repository under [project.urls]")
    return found[1]


def stamp(notebook: NotebookNode, name: str) -> None:
    """Put the badge, the first cell, metadata and ids into a notebook."""
    where = repository()
    owner = where.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}"
    head = [line for line in notebook.cells[0].source.splitlines() if not line.startswith(BADGE)]
    notebook.cells[0].source = "\n".join([head[0], "", f"{BADGE}({link})", *head[1:]]).replace(
        "\n\n\n", "\n\n"
    )
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = SETUP.format(repository=where)
    first.metadata = {"tags": ["nbval-ignore-output"]}
    notebook.metadata = METADATA
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id = f"c{i:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}


def run(notebook: NotebookNode) -> None:
    """Run all cells in a kernel of this environment, and keep their outputs."""
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": HERE}}
    ).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}


def main() -> int:
    parser = argparse.ArgumentParser(description="Stamp the notebooks, and run them.")
    parser.add_argument("numbers", nargs="*", help="of the notebooks, such as 03; none means all")
    parser.add_argument("--stamp", action="store_true", help="do not run them")
    parser.add_argument("--check", action="store_true", help="change nothing; say what is not as stamped")
    options = parser.parse_args()
    stale = 0
    for path in sorted(HERE.glob("*.ipynb")):
        if options.numbers and path.name[:2] not in options.numbers:
            continue
        before = path.read_text()
        notebook = nbformat.reads(before, as_version=4)
        stamp(notebook, path.name)
        began = time.perf_counter()
        if not (options.stamp or options.check):
            run(notebook)
        after = nbformat.writes(notebook) + "\n"
        if options.check:
            if after != before:
                stale += 1
                print(f"{path.name} is not as stamped: python notebooks/make.py --stamp")
        else:
            path.write_text(after)
            print(f"{path.name}: {time.perf_counter() - began:.0f} s")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
