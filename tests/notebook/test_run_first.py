"""A name that is missing brings the advice what to run; any other error is shown as it always is."""

from __future__ import annotations

import IPython
import pytest
from IPython.core.interactiveshell import InteractiveShell

from labkit.notebook import run_first

Told = pytest.CaptureFixture[str]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> InteractiveShell:
    shell = InteractiveShell()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    run_first.watch()
    return shell


@pytest.mark.parametrize("cell", ["tiny.config", "def f():\n    return tiny\n\n\nf()", "[tiny for _ in '1']"])
def test_a_name_that_no_cell_has_made_yet(shell: InteractiveShell, cell: str, capsys: Told) -> None:
    result = shell.run_cell(cell)
    assert isinstance(result.error_in_exec, NameError)
    told = capsys.readouterr()
    assert "name 'tiny' is not defined" in told.out + told.err
    assert told.err.endswith(run_first.ADVICE.format(name="tiny") + "\n")
    shell.run_cell("tiny = 1")
    assert shell.run_cell(cell.replace(".config", "")).success


@pytest.mark.parametrize("cell", ["1 / 0", "{}['tiny']", "exec('tiny', {})", "raise NameError('by hand')"])
def test_other_errors_bring_no_advice(shell: InteractiveShell, cell: str, capsys: Told) -> None:
    assert not shell.run_cell(cell).success
    told = capsys.readouterr()
    assert "Traceback" in told.out + told.err and "labkit:" not in told.out + told.err


def test_outside_of_ipython_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    run_first.watch()
