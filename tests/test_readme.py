"""What the README says holds: it is short, it moves, its code runs and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from notebooks.make import repository

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [path for path in ROOT.rglob("README.md") if ".venv" not in path.parts and "build" not in path.parts]
PAGES += [path for path in (ROOT / "notebooks").glob("*.md") if path.name != "README.md"]
CODE = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_it_is_short_and_moves_before_it_tells() -> None:
    assert len(TEXT.splitlines()) < 150
    assert TEXT.index("race.svg") < TEXT.index("```"), (
        "first what it is, then a run that moves, then commands"
    )


def test_it_clones_what_the_project_calls_its_repository() -> None:
    assert f"git clone {repository()} && cd labkit\n" in TEXT
    for page in PAGES:
        assert "<this repository>" not in page.read_text(encoding="utf-8")


def test_it_installs_what_the_engine_and_the_lab_need() -> None:
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("# The tests")[0]
    needed = re.findall(r"^[a-z_]+", requirements, re.MULTILINE)
    (line,) = re.findall(r"^pip install (torch .*)$", TEXT, re.MULTILINE)
    assert line.split() == needed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_notebook_is_on_the_map() -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in TEXT


def test_every_folder_is_in_the_house() -> None:
    house = (ROOT / "labkit/README.md").read_text(encoding="utf-8")
    for folder in (ROOT / "labkit").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert f"{folder.name}/" in house
    for module in (ROOT / "labkit").glob("[a-z]*.py"):
        assert module.name in house


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.split("\n")[0])
def test_its_code_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for part in CODE[: CODE.index(code) + 1]:
        exec(part.replace('LLM("smollm2-135m")', 'LLM("tiny-random", num_blocks=64)'), names)
    assert capsys.readouterr().out.strip()
