"""Exercises: a learner's function is examined, runs in the real engine, and is drawn beside the reference.

A notebook calls `check`. The module with its number lists its exercises: `e03.py` those of notebook 03. Where
they are long, each has a file of its own: `e03_pool.py`. An exercise says three things: what is right, how to
find out, and how the engine runs with it.
"""

from __future__ import annotations

import functools
import inspect
import json
import linecache
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from labkit.core.block_pool import InvariantError
from labkit.exercises import progress
from labkit.exercises.trial import Endless, Lost, Notice, can_fork, in_child, stopped_after
from labkit.views.picture import Picture, show

_PATIENCE = 10.0  # seconds of computing; a function that has not returned by then never will
_ENGINE = 6  # times as long for the engine, which runs more than the function
_FIRST_LINES = 3  # of the text of an exception
_MOST_LINES, _MOST_LETTERS = 60, 1000  # of a verdict, and of each of its lines
_QUIET = 2.0  # seconds after which a check says what it is doing
_UNTIL_RIGHT = "Until it is right, the cells below use the reference."


class Wrong(Exception):
    """An answer breaks a rule.

    Args:
        rule: the rule, in words that a learner can act on.
        example: the smallest case that shows it: what went in, what came out, and what is right.
    """

    def __init__(self, rule: str, example: str = "") -> None:
        super().__init__(rule, example)
        self.rule, self.example = rule, example

    def __str__(self) -> str:
        return f"{self.rule}\n{textwrap.indent(self.example, '  ')}" if self.example else self.rule


@dataclass(frozen=True)
class Run:
    """What a function did in the engine.

    Args:
        sentence: what it did, beside the reference: "Your pool ran 8 requests: 41 steps, reference 38."
        pictures: captions, each with a picture to draw below it.
    """

    sentence: str
    pictures: Sequence[tuple[str, Picture]] = ()


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        id: notebook and number, such as "03.2".
        title: what the learner writes, in a few words.
        reference: a right answer; later cells use it as long as the learner has none.
        examine: calls a learner's function on cases, the smallest first, and raises `Wrong` at the first
            that breaks a rule. It lets the `NotImplementedError` of an untouched stub pass.
        run: runs a right answer in the real engine; None if there is nothing to run.
    """

    id: str
    title: str
    reference: Callable[..., Any]
    examine: Callable[[Callable[..., Any]], None]
    run: Callable[[Callable[..., Any]], Run] | None = None


@dataclass(frozen=True)
class Verdict:
    """What `judge` found. Its `state` is "right", "wrong" or "open" (an untouched stub).

    Its `score` is what a right answer did in the engine, in words.
    """

    exercise: Exercise
    state: str
    text: str
    pictures: Sequence[tuple[str, Picture]] = field(default=())
    score: str = ""


def find(exercise_id: str) -> Exercise:
    """The exercise with this id.

    Raises:
        ValueError: there is none; the message lists those of the notebook.
    """
    number = exercise_id.partition(".")[0] if isinstance(exercise_id, str) else ""
    home = f"labkit.exercises.e{number}"
    try:
        known = import_module(home).EXERCISES if number.isdecimal() else ()
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        known = ()
    for exercise in known:
        if exercise.id == exercise_id:
            return exercise
    there = (
        f"notebook {number} has {', '.join(e.id for e in known)}"
        if known
        else 'an id is, for example, "03.2"'
    )
    raise ValueError(f"there is no exercise {exercise_id!r}: {there}")


def judge(
    exercise_id: str,
    function: Callable[..., Any],
    *,
    patience: float = _PATIENCE,
    notice: Callable[[str, float], None] = lambda what, seconds: None,
) -> Verdict:
    """Examine a function, and run it in the engine if it is right. Prints and draws nothing of its own.

    On Linux the function is examined in a child process, so it changes nothing in the notebook (see
    `trial.py`). What passes then runs in the engine, here.

    Args:
        exercise_id: notebook and number, such as "03.2".
        function: the function or class that the learner wrote.
        patience: seconds of computing after which a function that has not returned is stopped, where the
            system can do that.
        notice: is called now and then with what is being checked, and for how many seconds.

    Raises:
        ValueError: there is no such exercise, or `function` cannot be called.
    """
    exercise = find(exercise_id)
    title = f"{exercise.id} {exercise.title}"
    if not callable(function):
        raise ValueError(f"exercise {exercise_id} checks a function or a class, not {function!r}")
    run = Run("")

    def in_engine() -> None:
        nonlocal run
        run = exercise.run(function) if exercise.run else run

    def say(what: str) -> Notice:
        return functools.partial(notice, what)

    if can_fork() and not _untouched(function):
        state, why = _apart(exercise, function, patience, say("its rules, case by case"))
    else:
        examine = functools.partial(exercise.examine, function)
        state, why = _outcome(function, examine, stopped_after(patience, say("its rules, case by case")))
    if state == "right":
        limit = stopped_after(_ENGINE * patience, say("the engine runs with it"))
        state, why = _outcome(function, in_engine, limit)
    if state == "open":
        # One fixed line: a notebook shows it before its reader has begun.
        return Verdict(exercise, state, f"○ {title}: yours to write. Until then the reference is used.")
    if state == "right":
        sentence = f" {run.sentence}" if run.sentence else ""
        return Verdict(exercise, state, f"✓ {title}.{sentence}", run.pictures, run.sentence)
    return Verdict(exercise, "wrong", f"✗ {title}: {_cut(why)}\n  {_UNTIL_RIGHT}")


def _outcome(
    function: Callable[..., Any], task: Callable[[], None], limit: AbstractContextManager[None]
) -> tuple[str, str]:
    """Run a task that calls a learner's function. Returns "right", "wrong" or "open", and what is wrong."""
    try:
        with limit:
            task()
    except (Wrong, InvariantError) as error:
        return "wrong", str(error)
    except Endless as error:
        return "wrong", f"{error}{_line(_places(error, function))}"
    except SystemExit as error:
        return "wrong", "it calls exit(): return an answer instead" + _line(_places(error, function))
    except NotImplementedError as error:
        return ("open", "") if _is_stub(error, function) else ("wrong", _raised(error, function))
    except Exception as error:
        return "wrong", _raised(error, function)
    return "right", ""


_warm: set[str] = set()  # exercises whose cases have been made in this process


def _apart(
    exercise: Exercise, function: Callable[..., Any], patience: float, notice: Notice
) -> tuple[str, str]:
    """The outcome of an exercise's cases, from a child process.

    The models and cases that an exercise makes for its first check would be lost with the child. So they are
    made here as well, once, while the child is at work.
    """

    def warm_up() -> None:
        if exercise.id not in _warm:
            _warm.add(exercise.id)
            exercise.examine(exercise.reference)

    def examined() -> str:
        cases = functools.partial(exercise.examine, function)
        return json.dumps(_outcome(function, cases, nullcontext()))  # the system keeps the time

    try:
        state, why = json.loads(in_child(examined, patience, notice, warm_up))
    except Lost as error:
        files = _files(function)
        return "wrong", error.why + _line([place for place in error.places if place[0] in files][:1])
    return state, why


def check(exercise_id: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Examine a function, say what is right or wrong with it, and draw what the engine did with it.

    Args:
        exercise_id: notebook and number, such as "03.2".
        function: the function or class that the learner wrote.

    Returns:
        The function if it is right, otherwise the reference, so that the cells that follow can go on.

    Raises:
        ValueError: there is no such exercise, or `function` cannot be called.
    """
    exercise = find(exercise_id)
    if function is exercise.reference:  # an earlier check returned it under the learner's name
        print(
            f"○ {exercise.id} {exercise.title}: this is the reference. Run the cell with your own code again."
        )
        return function
    line = _Line(f"{exercise.id} {exercise.title}")
    try:
        verdict = judge(exercise_id, function, notice=line.show)
    finally:
        line.wipe()
    print("\n".join(map(_wrapped, verdict.text.splitlines())))
    if verdict.state == "right" and (lost := progress.keep(exercise_id, verdict.score)):
        print(lost)
    for caption, picture in verdict.pictures:
        print(f"\n{caption}")
        show(picture)
    return function if verdict.state == "right" else exercise.reference


class _Line:
    """A line that says what is being checked, once that takes long; it is wiped out at the end."""

    def __init__(self, title: str) -> None:
        self._title, self._text = title, ""

    def show(self, what: str, seconds: float) -> None:
        if seconds >= _QUIET:
            text = f"... {self._title}: {what} ({seconds:.0f} s)"
            if text != self._text:
                print("\r" + text.ljust(len(self._text)), end="", flush=True)
                self._text = text

    def wipe(self) -> None:
        if self._text:
            print("\r" + " " * len(self._text) + "\r", end="", flush=True)


def _cut(text: str) -> str:
    """A text without the middle of lines that are too long, and without lines that are too many."""
    half = _MOST_LETTERS // 2
    lines = [
        line if len(line) <= _MOST_LETTERS else f"{line[:half]} ... {line[-half:]}"
        for line in text.split("\n")
    ]
    return "\n".join(lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "  ..."])


def _wrapped(line: str) -> str:
    """Break a line at 110 characters, between words: notebooks break longer ones in the middle of a word."""
    return textwrap.fill(line, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def expect(condition: bool, rule: str, example: str = "") -> None:
    """Raise `Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(rule, example)


# -- who raised it, and where ---------------------------------------------------------------------


def _raised(error: Exception, function: Callable[..., Any]) -> str:
    """Say what was raised, whether the learner's own code raised it, and in which line."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        text = "(an exception that cannot be put into words)"
    said = "\n  ".join((f"{name}: {text}" if text else name).splitlines()[:_FIRST_LINES])
    if places := _places(error, function):
        return f"it raised {said}{_line(places)}"
    if isinstance(error, TypeError) and text.startswith(f"{getattr(function, '__qualname__', '')}("):
        return f"it cannot be called as the exercise calls it\n  {said}"
    return f"the engine cannot go on with what it returned or did\n  {said}"


def _places(error: BaseException, function: Callable[..., Any]) -> list[tuple[str, int]]:
    """File and line of each frame of the learner's own code that an exception passed, the innermost last."""
    files, found, trace = _files(function), [], error.__traceback__
    while trace:
        if (file := trace.tb_frame.f_code.co_filename) in files:
            found.append((file, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _line(places: list[tuple[str, int]]) -> str:
    """The innermost line: its number in the cell, and its source. Empty if there are no places."""
    if not places:
        return ""
    file, number = places[-1]
    source = linecache.getline(file, number).strip()
    return f"\n  in line {number}: {source}" if source else f"\n  in line {number}"


def _untouched(function: Callable[..., Any]) -> bool:
    """Whether a function does nothing but raise `NotImplementedError`: there is nothing to stop then."""
    return getattr(getattr(function, "__code__", None), "co_names", None) == ("NotImplementedError",)


def _is_stub(error: NotImplementedError, function: Callable[..., Any]) -> bool:
    """Whether the learner's own code raised it, and not torch or the engine."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    files = _files(function)
    return not files or (trace is not None and trace.tb_frame.f_code.co_filename in files)


def _files(function: Callable[..., Any]) -> set[str]:
    """The files in which a function or a class is written; each cell of a notebook is a file."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        parts: Sequence[Any] = [function]
    else:
        parts = list(vars(function if isinstance(function, type) else type(function)).values())
    bare = [getattr(part, "__func__", None) or getattr(part, "fget", None) or part for part in parts]
    codes = [getattr(inspect.unwrap(part), "__code__", None) for part in bare if callable(part)]
    return {code.co_filename for code in codes if code is not None}
