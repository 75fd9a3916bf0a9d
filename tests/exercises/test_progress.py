"""Progress: what was accepted is kept, by kernels side by side too; no fault of its file stops a check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import labkit
from labkit.exercises import check, find, progress
from labkit.exercises.e02 import idle_share
from labkit.exercises.progress import COURSE, Solved, keep, progress_file
from notebooks import make

ROOT = Path(__file__).parents[2]
IDS = [exercise for chapter in COURSE for exercise in chapter.exercises]


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder that is not there yet."""
    path = tmp_path / "new" / "folder" / "progress.jsonl"
    monkeypatch.setenv("LABKIT_PROGRESS", str(path))
    return path


def right(rows: object, seats: int) -> object:
    return idle_share(rows, seats)


# -- what is kept ----------------------------------------------------------------------------------


def test_what_check_accepts_is_solved_and_nothing_else_is(capsys: pytest.CaptureFixture[str]) -> None:
    check("02.1", lambda rows, seats: 0)
    check("02.1", idle_share)  # the reference
    assert labkit.progress().solved == {} and not progress_file().exists()
    check("02.1", right)
    (score, day) = labkit.progress().solved["02.1"]
    assert score in " ".join(capsys.readouterr().out.split()) and score
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)


def test_the_last_answer_counts_and_a_restart_forgets_nothing() -> None:
    keep("04.1", "41 steps")
    keep("00.1", "")
    keep("04.1", "38 steps")
    code = "import labkit; print(labkit.progress().solved['04.1'].score)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "38 steps\n", done.stderr


def test_kernels_side_by_side_lose_no_line(own_file: Path) -> None:
    code = "import sys; from labkit.exercises.progress import keep\n"
    code += "for i in range(200): keep(sys.argv[1], 'x' * 390)"
    kernels = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT) for name in IDS[:4]]
    assert [kernel.wait() for kernel in kernels] == [0] * 4
    lines = [json.loads(line) for line in own_file.read_text().splitlines() if line]
    assert sorted({(line["exercise"], len(line["score"])) for line in lines}) == [(n, 390) for n in IDS[:4]]
    assert len(lines) == 800


# -- faults of the file ----------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rubbish=st.one_of(st.binary(max_size=200), st.text().map(lambda text: json.dumps([text]).encode())))
def test_rubbish_in_the_file_costs_itself_and_nothing_else(rubbish: bytes, own_file: Path) -> None:
    own_file.parent.mkdir(parents=True, exist_ok=True)
    own_file.unlink(missing_ok=True)
    keep("00.1", "first")
    with own_file.open("ab") as file:
        file.write(b"\n" + rubbish)  # and no newline at its end
    assert keep("01.1", "second") == ""
    told = labkit.progress()
    assert {name: told.solved[name].score for name in ("00.1", "01.1")} == {"00.1": "first", "01.1": "second"}
    assert repr(told) and told._repr_html_()


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"exercise": "01.1"}', '{"exercise": 1, "score": 2, "day": 3}']
)
def test_a_line_that_cannot_be_read_is_told(line: str, own_file: Path) -> None:
    keep("00.1", "")
    own_file.write_text(f"{own_file.read_text()}\n{line}")
    assert "1 of its lines could not be read" in repr(labkit.progress())
    assert list(labkit.progress().solved) == ["00.1"]


def test_a_file_that_cannot_be_written_costs_one_line(
    own_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_file.mkdir(parents=True)  # a folder under its name: not even root can write to it
    assert check("02.1", right) is right
    assert len(re.findall(r"^\(Your progress could not be kept: .+\)$", capsys.readouterr().out, re.M)) == 1
    assert "could not be read" in repr(labkit.progress())
    monkeypatch.delenv("LABKIT_PROGRESS")
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert "no home" in keep("00.1", "") and labkit.progress().solved == {}


# -- where it lies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "place"),
    [
        ("linux", "data/labkit/progress.jsonl"),
        ("win32", "local/labkit/progress.jsonl"),
        ("darwin", "home/Library/Application Support/labkit/progress.jsonl"),
    ],
)
def test_it_lies_where_the_system_keeps_a_users_data(
    platform: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name, folder in (("XDG_DATA_HOME", "data"), ("LOCALAPPDATA", "local"), ("HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    assert str(progress_file()).startswith(str(tmp_path / "new"))  # $LABKIT_PROGRESS comes first
    monkeypatch.setenv("LABKIT_PROGRESS", "")
    assert progress_file() == tmp_path / place


def test_a_test_run_never_writes_into_the_users_own_file() -> None:
    """`own_progress.py` names a file in a folder of its own, for kernels too."""
    code = "import tests.own_progress; from labkit.exercises import progress; print(progress.progress_file())"
    users = {"LABKIT_PROGRESS": "/users/own.jsonl"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | users, capture_output=True, text=True
    )
    assert done.stdout.startswith(tempfile.gettempdir()), done.stdout + done.stderr
    for program in ("notebooks/make.py", ".ci/colab"):
        assert "LABKIT_PROGRESS" in (ROOT / program).read_text(encoding="utf-8"), program


# -- the table -------------------------------------------------------------------------------------


def test_the_course_is_that_of_the_notebooks_and_of_the_judge() -> None:
    paths = sorted(make.HERE.glob("*.ipynb"))
    assert [path.stem for path in paths] == [chapter.file for chapter in COURSE]
    for chapter, path in zip(COURSE, paths, strict=True):
        (title,) = re.findall(r'^    "# \d\d · (.+)\\n",$', path.read_text(encoding="utf-8"), re.MULTILINE)
        assert title.lower() == chapter.title.lower()
        known = import_module(f"labkit.exercises.e{chapter.file[:2]}").EXERCISES
        assert [(each.id, each.title) for each in known] == list(chapter.exercises.items())


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@given(score=st.text(max_size=80))
def test_the_table_says_what_the_text_says_and_runs_nothing(score: str) -> None:
    told = progress.Progress({"03.1": Solved(f"<script>{score}", "2026-11-30"), "99.9": Solved("", "")}, "/p")
    page = _Texts()
    page.feed(told._repr_html_())
    assert page.tags == {"p", "b", "a", "br", "table", "thead", "tbody", "tr", "th", "td"} - {"br"}
    assert f"Solved: 1 of {len(IDS)}." in page.text and f"Solved: 1 of {len(IDS)}." in repr(told)
    for name in IDS:
        sign = "✓" if name == "03.1" else "○"
        assert f"{sign} {name}" in repr(told) and f"{sign} {name}" in page.text
    assert "2026-11-30" in page.text and "2026-11-30" in repr(told)
    assert set(page.links) == {f"{chapter.file}.ipynb" for chapter in COURSE}


def test_what_comes_next_is_the_first_that_is_open_and_after_the_last_the_closing_page() -> None:
    assert "Next: 00.1 " in repr(labkit.progress())
    for name in IDS[:3]:
        keep(name, "")
    assert f"Next: {IDS[3]} {find(IDS[3]).title}, in " in repr(labkit.progress())
    for name in IDS[3:]:
        keep(name, "")
    told = labkit.progress()
    assert told.next is None and "CLOSING.md" in repr(told) and "CLOSING.md" in told._repr_html_()
    assert (make.HERE / "CLOSING.md").exists()


def test_colab_is_told_how_to_keep_it_and_gets_links_that_lead_somewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "in_colab", lambda: True)
    monkeypatch.setattr(progress, "_repository", lambda: "")
    told = labkit.progress()
    assert "drive.mount" in repr(told) and "LABKIT_PROGRESS" in told._repr_html_()
    assert "href" not in told._repr_html_()  # no address, no link that leads nowhere
    monkeypatch.setattr(progress, "_repository", lambda: "https://github.com/someone/labkit")
    links = re.findall(r'href="([^"]+)"', labkit.progress()._repr_html_())
    assert (
        links[0]
        == "https://colab.research.google.com/github/someone/labkit/blob/main/notebooks/00_tour.ipynb"
    )


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport labkit; print(labkit.progress())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("Solved: 0 of"), done.stderr
