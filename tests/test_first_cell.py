"""The first cell of a notebook takes labkit from the first place that has it, and says where it looked."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from notebooks import make

ADDRESS = "https://github.com/somebody/labkit"
LACKING = "pip install -q --no-deps gguf anywidget psygnal"  # in a Python with no packages, as in these tests
# Says what `%pip` would do, and then runs the cell in a Python that has nothing but what lies around it.
DRIVER = """\
import sys

sys.path.insert(0, "")


class Shell:
    def run_line_magic(self, name, line):
        print(name, line.format(**globals()))


get_ipython = Shell
exec(compile(sys.stdin.read(), "<first cell>", "exec"))
"""
PACKAGE = "def setup(): print('labkit from', __file__)\n"


def clone(folder: Path) -> Path:
    """A folder with a package that only says where it lies."""
    (folder / "labkit").mkdir(parents=True)
    (folder / "labkit" / "__init__.py").write_text(PACKAGE)
    return folder


def cell(monkeypatch: pytest.MonkeyPatch, address: str = "https://github.com/OWNER/labkit") -> str:
    """The first cell of a stamped notebook."""
    monkeypatch.setattr(make, "repository", lambda: address)
    return make.setup_cell()


def run(source: str, folder: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the cell in a folder."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", DRIVER],
        input=TransformerManager().transform_cell(source),
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "LABKIT_SOURCE"} | dict(env or {}),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("place", ["..", ".", "labkit", "labkit-main"])
def test_it_finds_a_clone_around_it(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "notebooks"
    here.mkdir()
    clone(here / place)
    (here / "labkit.trace.jsonl").write_text("what the page saved")
    done = run(cell(monkeypatch, ADDRESS), here)
    assert done.stdout.splitlines()[0] == LACKING
    said = done.stdout.splitlines()[1].removeprefix("labkit from ")
    assert (here / said).samefile(here / place / "labkit" / "__init__.py")


@pytest.mark.parametrize("name", ["labkit-0.1.0-py3-none-any.whl", "labkit-main.zip", "labkit-main (1).zip"])
def test_it_installs_a_file_beside_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()
    (tmp_path / "labkit.trace.jsonl").touch()
    done = run(cell(monkeypatch, ADDRESS), tmp_path)
    assert done.stdout.splitlines() == [f'pip install -q --no-deps "{name}"', LACKING]


@pytest.mark.parametrize(
    "source", ["https://example.org/labkit.zip", "git+https://example.org/labkit", "../there/labkit.whl"]
)
def test_what_labkit_source_names_comes_first(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone(tmp_path)  # would be found
    done = run(cell(monkeypatch, ADDRESS), tmp_path, {"LABKIT_SOURCE": source})
    assert done.stdout.splitlines()[0] == f'pip install -q --no-deps "{source}"'
    assert ADDRESS not in done.stdout


def test_labkit_source_may_be_a_folder_and_may_be_written_into_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = clone(tmp_path / "my work"), clone(tmp_path / "here")
    source = cell(monkeypatch)
    written = source.replace('os.environ.get("LABKIT_SOURCE", "")', repr(str(there)))
    assert written != source
    for done in (run(source, here, {"LABKIT_SOURCE": str(there)}), run(written, here)):
        assert f"labkit from {there / 'labkit' / '__init__.py'}" in done.stdout


def test_without_a_place_it_says_in_one_line_what_it_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(cell(monkeypatch), tmp_path)
    assert done.stdout.splitlines() == [LACKING]  # nothing is fetched from where nothing is
    said = done.stderr.splitlines()[-1]
    for place in ("LABKIT_SOURCE", "..", "labkit*/", "labkit*.whl", "labkit*.zip"):
        assert place in said
    wrong = run(cell(monkeypatch), tmp_path, {"LABKIT_SOURCE": "/no/where"})
    assert wrong.stderr.splitlines()[-1].startswith("ImportError: No labkit. Looked for: /no/where")


def test_with_an_address_it_fetches_only_what_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cell(monkeypatch, ADDRESS)
    assert run(source, tmp_path).stdout.splitlines()[0] == f"pip install -q --no-deps git+{ADDRESS}"
    installed = f"import sys\nsys.path.append({str(clone(tmp_path / 'installed'))!r})\n"
    assert ADDRESS not in run(installed + source, tmp_path).stdout


def test_a_wheel_beside_it_is_really_installed_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, here = tmp_path / "packages", tmp_path / "here"
    packages.mkdir()
    here.mkdir()
    with zipfile.ZipFile(here / "labkit-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("labkit/__init__.py", PACKAGE)
        wheel.writestr("labkit-9.dist-info/METADATA", "Metadata-Version: 2.1\nName: labkit\nVersion: 9\n")
        wheel.writestr(
            "labkit-9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("labkit-9.dist-info/RECORD", "")
    (here / "first.ipy").write_text(cell(monkeypatch))
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "first.ipy"],
        cwd=here,
        env=os.environ
        | {"PIP_TARGET": str(packages), "PYTHONPATH": str(packages), "IPYTHONDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"labkit from {packages / 'labkit' / '__init__.py'}" in done.stdout, done.stdout + done.stderr
