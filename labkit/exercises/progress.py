"""What a learner has solved, across notebooks and restarts: one file of lines, and a table made from it.

Each right answer appends a line of JSON to the file, in one write, so kernels that run side by side lose none
of each other's. What cannot be read is passed over, and a file that cannot be written costs a printed line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from labkit.models.cache_dir import system_folder
from labkit.views.picture import in_colab

_LONGEST = 400  # characters of a score
_WIDTH = 110  # of the text, as of a verdict
_MOST_BYTES = 8_000_000  # of a file that is read: whatever is larger is no record of a course


class Chapter(NamedTuple):
    """A notebook: its file without the ending, its title, and the titles of its exercises by their ids."""

    file: str
    title: str
    exercises: dict[str, str]


COURSE = (
    Chapter("00_tour", "A tour of a real engine", {"00.1": "Who runs in the next step"}),
    Chapter(
        "01_one_token_at_a_time",
        "One token at a time",
        {"01.1": "A loop that keeps its cache", "01.2": "Catch the decoder that is wrong"},
    ),
    Chapter(
        "02_static_batching",
        "Static batching",
        {"02.1": "count the idle seats", "02.2": "batches with fewer idle seats"},
    ),
    Chapter("03_paged_kv_cache", "Paged KV cache", {"03.1": "a pool of pages", "03.2": "where a token lies"}),
    Chapter(
        "04_continuous_batching",
        "Continuous batching",
        {"04.1": "write schedule()", "04.2": "fair turns (bonus)"},
    ),
    Chapter("05_dynamic_injection", "Dynamic injection", {"05.1": "chunks that keep a promise"}),
    Chapter(
        "06_when_memory_runs_out",
        "When memory runs out",
        {"06.1": "whose pages to take", "06.2": "a name for a page"},
    ),
    Chapter(
        "07_the_honest_15x",
        "The honest 15x",
        {"07.1": "bytes and operations of a step", "07.2": "when computing takes over"},
    ),
    Chapter(
        "08_flash_attention",
        "Flash attention",
        {"08.1": "unite two partial softmaxes", "08.2": "attend over pages where they lie"},
    ),
    Chapter("09_int8", "Eight bits", {"09.1": "round weights, row by row", "09.2": "multiply whole numbers"}),
    Chapter(
        "10_speculative_decoding",
        "Speculative decoding",
        {"10.1": "count the drafts that are right", "10.2": "accept or replace"},
    ),
    Chapter("11_serving", "Serving", {"11.1": "refuse who would wait too long"}),
    Chapter("12_capacity", "Capacity", {"12.1": "send a request where its prompt is known"}),
    Chapter(
        "13_structured_output",
        "Structured output",
        {"13.1": "the tokens that a state allows", "13.2": "what a form forces"},
    ),
    Chapter(
        "14_two_of_them",
        "Two of them",
        {
            "14.1": "split a layer's weights",
            "14.2": "choose where an answer grows",
            "14.3": "a sum in a ring (bonus)",
        },
    ),
)
"""The notebooks in their order. A title is that of the `Exercise`, known here without importing it."""


class Solved(NamedTuple):
    """A right answer: what the judge said of it, and the day (UTC)."""

    score: str
    day: str


# -- the file --------------------------------------------------------------------------------------


def progress_file() -> Path:
    """Return `$LABKIT_PROGRESS`, or a file in the place that the operating system has for a user's data."""
    if chosen := os.environ.get("LABKIT_PROGRESS"):
        return Path(chosen).expanduser().absolute()
    place = system_folder("Application Support", "XDG_DATA_HOME", ".local/share")
    return place / "labkit" / "progress.jsonl"


def keep(exercise_id: str, score: str) -> str:
    """Append a right answer to the file.

    Returns:
        Why it could not be kept, in one line; "" if it was.
    """
    day = datetime.now(timezone.utc).date().isoformat()
    line = json.dumps({"exercise": exercise_id, "score": score[:_LONGEST], "day": day})
    try:
        path = progress_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file that is open for appending, so a line of another kernel is never cut in two. The
        # newline comes first: a line that was cut all the same, by a full disk, takes no other with it.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, f"\n{line}".encode())
        finally:
            os.close(file)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home
        return f"(Your progress could not be kept: {_told(error)})"
    return ""


def _read() -> tuple[dict[str, Solved], str]:
    """The last right answer to each exercise, and a line about what could not be read, or ""."""
    try:
        with progress_file().open("rb") as file:
            lines = file.read(_MOST_BYTES).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return {}, ""
    except (OSError, RuntimeError, ValueError) as error:
        return {}, f"Your progress could not be read: {_told(error)}"
    solved, lost = {}, 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
            texts = [entry[name] for name in ("exercise", "score", "day")]
        except (ValueError, TypeError, KeyError, RecursionError):
            lost += 1
            continue
        if all(isinstance(text, str) for text in texts):
            exercise, score, day = ("".join(filter(str.isprintable, text)) for text in texts)
            solved[exercise] = Solved(score[:_LONGEST], day[:10])
        else:
            lost += 1
    return solved, f"{lost} of its lines could not be read, and were passed over." if lost else ""


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """What is solved of the course: a table in a notebook, and the same as text.

    Attributes:
        solved: the last right answer to each exercise, by its id.
        path: the file in which they are kept; "" where there is no place for one.
        note: what could not be read, in one line; "" if all could.
    """

    solved: dict[str, Solved]
    path: str = ""
    note: str = ""

    @property
    def next(self) -> tuple[Chapter, str] | None:
        """The first exercise that is not solved, and its notebook; None if all are."""
        for chapter in COURSE:
            for exercise in chapter.exercises:
                if exercise not in self.solved:
                    return chapter, exercise
        return None

    def _headline(self) -> str:
        ids = [exercise for chapter in COURSE for exercise in chapter.exercises]
        return f"Solved: {sum(exercise in self.solved for exercise in ids)} of {len(ids)}."

    def _closing(self) -> Iterator[str]:
        if self.note:
            yield self.note
        if in_colab():
            yield _COLAB
        elif self.solved:
            yield f"Kept in {self.path}."

    def __repr__(self) -> str:
        lines = [self._headline(), ""]
        for chapter in COURSE:
            signs = "  ".join(f"{'✓' if each in self.solved else '○'} {each}" for each in chapter.exercises)
            lines.append(f"{chapter.file[:2]}  {chapter.title:<26}{signs}")
            for each in chapter.exercises:
                if said := self.solved.get(each):
                    lines.append(f"      {each}  {said.day}  {said.score}"[:_WIDTH].rstrip())
        if self.next:
            chapter, exercise = self.next
            lines += ["", f"Next: {exercise} {chapter.exercises[exercise]}, in {chapter.file}.ipynb"]
        else:
            lines += ["", "All of it. What comes after: CLOSING.md"]
        return "\n".join([*lines, *self._closing()])

    def _repr_html_(self) -> str:
        rows = []
        for chapter in COURSE:
            link = _link(f"{chapter.file}.ipynb", f"{chapter.file[:2]} {chapter.title}")
            for exercise, title in chapter.exercises.items():
                said = self.solved.get(exercise)
                cells = (
                    link,
                    f"{'✓' if said else '○'} {escape(exercise)} {escape(title)}",
                    escape(said.day) if said else "",
                    escape(said.score) if said else "",
                )
                rows.append("<tr>" + "".join(f"<td {_CELL}>{cell}</td>" for cell in cells) + "</tr>")
                link = ""  # once for all exercises of a notebook
        if self.next:
            chapter, exercise = self.next
            what = f"{exercise} {chapter.exercises[exercise]}"
            then = f"Next: {_link(f'{chapter.file}.ipynb', what)}"
        else:
            then = f"All of it. {_link('CLOSING.md', 'What comes after')}"
        head = "".join(
            f'<th scope="col" {_CELL}>{name}</th>' for name in ("notebook", "exercise", "solved", "score")
        )
        closing = "<br>".join(map(escape, self._closing()))
        return (
            f"<p><b>{escape(self._headline())}</b> {then}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
            + (f"<p>{closing}</p>" if closing else "")
        )


_CELL = 'style="text-align:left;vertical-align:top"'
_COLAB = (
    "Colab forgets this machine. To keep your progress, mount your Drive and name a file on it, before the "
    "exercises: from google.colab import drive; drive.mount('/content/drive'); import os; "
    "os.environ['LABKIT_PROGRESS'] = '/content/drive/MyDrive/labkit-progress.jsonl'"
)


def progress() -> Progress:
    """Return what is solved of the course, with what score, and which exercise is next.

    The answers that `check` accepted are kept in `progress_file`, so they outlive a kernel.
    """
    try:
        path = str(progress_file())
    except RuntimeError:  # no home
        path = ""
    solved, note = _read()
    return Progress(solved, path, note)


def _link(file: str, text: str) -> str:
    """A link to a file beside the notebooks; an absolute one in Colab, which shows one notebook alone."""
    if not in_colab():
        return f'<a href="{escape(file)}">{escape(text)}</a>'
    home = _repository()
    if not home:
        return escape(text)
    owner = home.removeprefix("https://github.com/")
    shown = "https://colab.research.google.com/github" if file.endswith(".ipynb") else "https://github.com"
    return f'<a href="{escape(f"{shown}/{owner}/blob/main/notebooks/{file}")}">{escape(text)}</a>'


def _repository() -> str:
    """The address of labkit's repository, as it was installed; "" if there is none yet."""
    try:
        urls = metadata.metadata("labkit").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    (home, *_) = [*(url.partition(", ")[2] for url in urls if url.startswith("Repository,")), ""]
    return home if home.startswith("https://github.com/") and "/OWNER/" not in home else ""
