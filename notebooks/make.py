"""Stamps the notebooks, runs them, and keeps their outputs.

    python notebooks/make.py            # stamp and run all of them
    python notebooks/make.py 03 07      # only these two
    python notebooks/make.py --stamp    # stamp only: badge, first cell, metadata
    python notebooks/make.py --check    # change nothing; say what is not as stamped

The address of the repository stands only in `pyproject.toml`. While that is a placeholder, no badge is shown
and no cell fetches from it. Times, widget state and whatever else of a run is not a result are left out, so
that a second run changes as little as possible.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
import zlib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
SETUP = """\
# Takes labkit from the first place that has it: LABKIT_SOURCE, or what lies round this notebook. Torch stays.
import os
import sys
from glob import glob
from importlib.util import find_spec

LABKIT_SOURCE = os.environ.get("LABKIT_SOURCE", "")  # or here: a folder, a file, a URL, git+https://...
for place in [LABKIT_SOURCE] if LABKIT_SOURCE else ["..", ".", *sorted(glob("labkit*"))]:
    if os.path.isfile(f"{place}/labkit/__init__.py"):  # a clone
        sys.path.insert(0, place)
        break
    if place == LABKIT_SOURCE or place.endswith((".whl", ".zip")):
        %pip install -q --no-deps "{place}"
        break
FETCHif not find_spec("anywidget"):  # what Colab lacks
    %pip install -q --no-deps gguf anywidget psygnal
try:
    import labkit
except ImportError:
    looked = LABKIT_SOURCE or "a clone in .., . or labkit*/; labkit*.whl or labkit*.zip beside this notebook"
    raise ImportError(f"No labkit. Looked for: {looked}. LABKIT_SOURCE can name another place.") from None

labkit.setup()"""
FETCH = """\
else:
    if not find_spec("labkit"):
        %pip install -q --no-deps git+{address}
"""
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def repository() -> str:
    """The address of the repository, from `pyproject.toml`."""
    text = (HERE.parent / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "(https://[^"]+)"', text, re.MULTILINE)
    if not found:
        raise SystemExit("pyproject.toml has no Repository under [project.urls]")
    return found[1]


def published() -> str | None:
    """The address of the repository, or None while it is a placeholder that leads nowhere."""
    address = repository()
    return None if "/OWNER/" in address else address


def setup_cell() -> str:
    """The first code cell of each notebook."""
    address = published()
    return SETUP.replace("FETCH", FETCH.format(address=address) if address else "")


def stamp(notebook: NotebookNode, name: str) -> None:
    """Put the badge, the first cell, metadata and missing ids into a notebook."""
    kinds = [cell.cell_type for cell in notebook.cells[:2]]
    if kinds != ["markdown", "code"] or not notebook.cells[0].source.startswith("# "):
        raise SystemExit(f"{name} must begin with a title in markdown and then a code cell, for the setup")
    address = published()
    head = [line for line in notebook.cells[0].source.splitlines() if not line.startswith(BADGE)]
    if address:
        owner = address.removeprefix("https://github.com/")
        link = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}"
        head[1:1] = ["", f"{BADGE}({link})"]
    notebook.cells[0].source = "\n".join(head).replace("\n\n\n", "\n\n")
    notebook.cells[1].source = setup_cell()
    notebook.cells[1].metadata = {"tags": ["nbval-ignore-output"]}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    identify(notebook)
    tidy(notebook)


def identify(notebook: NotebookNode) -> None:
    """Give an id to each cell that has none, or that of a cell before it; the others keep theirs.

    A new id comes from the cell's text, so that two people who insert cells choose different ones.
    """
    taken: set[str] = set()
    for cell in notebook.cells:
        name = cell.get("id")
        for copy in itertools.count():
            if name and name not in taken:
                break
            name = f"{zlib.crc32(f'{copy}{cell.source}'.encode()):08x}"
        cell.id = name
        taken.add(name)


def tidy(notebook: NotebookNode) -> None:
    """Leave out what is not a result of the run, and join what arrived in pieces."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "markdown":
            cell.metadata["slideshow"] = {"slide_type": "slide"}  # with the code below it
        if cell.cell_type != "code":
            continue
        outputs: list[NotebookNode] = []
        for output in cell.outputs:
            # A widget lives only in the kernel that made it; its text twin stays.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            last = outputs[-1] if outputs else {}
            if output.output_type == "stream" and last.get("name") == output.name:
                last["text"] += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs


def stamped(text: str, name: str) -> str:
    """The text of a notebook file after stamping; runs nothing."""
    notebook = nbformat.v4.reads(text)  # as it is: nbformat.reads would put ids of its own, at random
    stamp(notebook, name)
    return nbformat.writes(notebook) + "\n"


def run(notebook: NotebookNode) -> None:
    """Run all cells in a kernel of this environment, and keep their outputs. Nobody's progress is in them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LABKIT_PROGRESS"] = str(Path(folder) / "progress.jsonl")
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": HERE}}
        ).execute()
    tidy(notebook)


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
        after = stamped(before, path.name)
        if options.check:
            if after != before:
                stale += 1
                print(f"{path.name} is not as stamped: python notebooks/make.py --stamp")
            continue
        began = time.perf_counter()
        if not options.stamp:
            notebook = nbformat.reads(after, as_version=4)
            run(notebook)
            after = nbformat.writes(notebook) + "\n"
        path.write_text(after)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
