"""The order of the house: what may import what, how long a file may be, and what runs without torch.

Lazy imports and those under TYPE_CHECKING count: a reader follows them, too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "labkit"

# A module imports from its own place or from one with a lower number.
RANKS = {
    "trace": 0,
    "sampling_params": 1,
    "views": 1,
    "config": 2,
    "outputs": 2,
    "core": 3,
    "schedulers": 4,
    "kernels": 4,
    "models": 5,
    "speculative": 6,
    "structured": 6,
    "parallel": 6,
    "offload": 6,
    "analysis": 6,
    "engine": 7,
    "transfer": 8,
    "disaggregated": 8,
    "llm": 8,
    "serving": 8,
    "server": 9,  # three programs of one line
    "scale": 9,
    "export": 9,
    "page": 9,
    "notebook": 10,
    "exercises": 11,
    "benchmark": 11,
    "": 12,  # `labkit` itself names what users import, and imports it when it is used
}
BESIDE = ("views", "llm", "serving", "disaggregated")  # may import what stands beside them
SIBLINGS = {("schedulers", "kernels"), ("kernels", "schedulers")}  # each builds on core, not on the other
MOST_LINES, MOST_LINES_OF_CORE_FILE, MOST_LINES_OF_CORE = 450, 400, 1800
WITHOUT_TORCH = ["labkit.trace.*", "labkit.views.*"] + [
    f"labkit.core.{name}"
    for name in ("request", "plan", "block_pool", "waiting_queue", "scheduler", "recorder")
]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[tuple[str, str]]:
    """(module, name taken from it or "") for each import of the package's own modules."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "labkit":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in MODULES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "labkit":
                    yield alias.name, ""


def place(module: str) -> str:
    """The folder below `labkit`, or the module that stands there by itself."""
    return [*module.split("."), ""][1]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    here = place(name)
    for module, _ in imports(name):
        there = place(module)
        assert RANKS[there] <= RANKS[here], f"{name} imports {module}, which stands above it"
        assert there == here or RANKS[there] < RANKS[here] or here in BESIDE, (
            f"{name} imports {module}, which stands beside it"
        )
        if here == "views":
            assert there in ("views", "trace"), f"{name} imports {module}: views know the trace alone"
        assert (here, there) not in SIBLINGS, f"{name} imports {module}: each builds on core alone"


def test_imports_make_no_circle() -> None:
    above: list[str] = []
    done: set[str] = set()

    def follow(name: str) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name in done or name == "labkit":
            return
        above.append(name)
        for module, _ in imports(name):
            follow(module)
        done.add(above.pop())

    for name in MODULES:
        follow(name)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_reads_the_private_names_of_another(name: str) -> None:
    for module, taken in imports(name):
        assert not taken.startswith("_"), f"{name} takes {taken} from {module}"
    brought = {
        alias.asname or alias.name
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("labkit")
        for alias in node.names
    }
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in brought:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{name}:{node.lineno} reads {node.value.id}.{node.attr}"


def _long_files() -> list[Path]:
    found = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.js"), *(ROOT / "tests").rglob("*.py"), ROOT / "app.py"]
    return [path for path in found if lines(path) > MOST_LINES]


def test_no_file_is_too_long() -> None:
    assert not {str(path.relative_to(ROOT)): lines(path) for path in _long_files()}


def test_the_core_can_be_read_in_an_afternoon() -> None:
    sizes = {path.name: lines(path) for path in (PACKAGE / "core").glob("*.py")}
    assert max(sizes.values()) <= MOST_LINES_OF_CORE_FILE, sizes
    assert sum(sizes.values()) <= MOST_LINES_OF_CORE, sizes


def test_few_modules_stand_at_the_top() -> None:
    top = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    assert len(top) <= 8, top


def test_what_has_no_tensors_imports_without_torch() -> None:
    names = [
        name
        for name in MODULES
        if any(name == wanted or name.startswith(wanted.removesuffix("*")) for wanted in WITHOUT_TORCH)
    ]
    code = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_readme_of_the_core_names_its_files_with_their_lines() -> None:
    text = (PACKAGE / "core" / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (\d+) \| \[`(\w+\.py)`\]\(\2\) \|.*\| (\d+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in told] == list(range(1, len(told) + 1))
    sizes = {path.name: lines(path) for path in (PACKAGE / "core").glob("*.py") if path.name != "__init__.py"}
    assert {name: int(size) for _, name, size in told} == sizes
    for earlier, (_, name, _) in enumerate(told):  # each can be read with what stands before it
        for module, _ in imports(f"labkit.core.{name.removesuffix('.py')}"):
            if place(module) == "core":
                assert f"{module.split('.')[-1]}.py" in [file for _, file, _ in told[:earlier]], (
                    name,
                    module,
                )
