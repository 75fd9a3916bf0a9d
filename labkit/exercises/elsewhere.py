"""Calls a function in a new Python process, to see whether its result depends on the process.

A learner's function stands in the cell of a notebook, which no other process can import. So its code is sent,
together with the names of the notebook that it uses. Everything else is sent by name, as `pickle` does it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import marshal
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

_SECONDS = 60
_START = "from labkit.exercises import elsewhere; elsewhere.answer_calls()"


def call_elsewhere(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, hash_seed: int
) -> list[str] | None:
    """Call a function with each of these tuples, in a process that hashes strings with this seed.

    Returns:
        The `repr` of what each call returned; None if the function cannot be sent, or failed there.
    """
    buffer = io.BytesIO()
    try:
        _Sender(buffer, getattr(function, "__globals__", None)).dump((function, list(calls)))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return None
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(place or ".") for place in sys.path))
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": path}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START],
            input=buffer.getvalue(),
            capture_output=True,
            env=environment,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return pickle.loads(done.stdout)


def answer_calls() -> None:
    """Runs in the other process: read the function and its calls, and write the results."""
    function, calls = pickle.load(sys.stdin.buffer)
    with contextlib.redirect_stdout(sys.stderr):  # a learner may print
        shown = [repr(function(*arguments)) for arguments in calls]
    sys.stdout.buffer.write(pickle.dumps(shown))


class _Sender(pickle.Pickler):
    """Sends modules by name, and the functions of one namespace (a learner's cells) with their code."""

    def __init__(self, file: io.BytesIO, own: dict[str, Any] | None) -> None:
        super().__init__(file)
        self._own = own

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, ModuleType):
            return importlib.import_module, (item.__name__,)
        if not isinstance(item, FunctionType) or item.__globals__ is not self._own:
            return NotImplemented
        names = _names(item.__code__)
        used = {name: value for name, value in item.__globals__.items() if name in names}
        cells = [cell.cell_contents for cell in item.__closure__ or ()]
        state = (used, cells, item.__kwdefaults__)
        # In two parts, because a function may use its own name.
        shell = (marshal.dumps(item.__code__), item.__name__, item.__defaults__, len(cells))
        return _shell, shell, state, None, None, _fill


def _names(code: CodeType) -> set[str]:
    """The names that a piece of code may look up, and those of the functions in it."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *(name for part in inner for name in _names(part))}


def _shell(code: bytes, name: str, defaults: tuple[Any, ...] | None, num_cells: int) -> FunctionType:
    cells = tuple(CellType() for _ in range(num_cells))
    return FunctionType(marshal.loads(code), {"__name__": "learner"}, name, defaults, cells)


def _fill(function: FunctionType, state: tuple[dict[str, Any], list[Any], dict[str, Any] | None]) -> None:
    used, contents, defaults = state
    function.__globals__.update(used)
    function.__kwdefaults__ = defaults
    for cell, value in zip(function.__closure__ or (), contents, strict=True):
        cell.cell_contents = value
