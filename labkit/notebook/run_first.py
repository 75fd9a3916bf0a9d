"""Says what to run first, where a cell misses a name that a cell before it makes."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

ADVICE = (
    "labkit: if {name!r} is no slip of the pen, a cell further up makes it: run the cells above this one "
    "first (Jupyter: Run, Run All Above Selected Cell; Colab: Runtime, Run before)."
)


def watch() -> None:
    """Add the advice to each NameError of a notebook's own code from now on; only IPython has such."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.set_custom_exc((NameError,), _explain)


def _explain(
    shell: Any, kind: type, error: NameError, trace: TracebackType, tb_offset: int | None = None
) -> None:
    """Show the error as always, and the advice below it."""
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
    while trace.tb_next:
        trace = trace.tb_next
    if trace.tb_frame.f_globals is shell.user_ns and error.name:
        print(ADVICE.format(name=error.name), file=sys.stderr)
