"""Exercises: a learner's function is examined, put into the real engine, and what it did is drawn.

`check` is what a notebook calls. Each exercise lives in the module of its notebook (`e03.py` has those of
notebook 03) and says three things: what is right, how to find out, and how the engine runs with it.
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from labkit.memory import InvariantError
from labkit.notebook import Picture, show

_SECONDS = 60  # a function that has not come back by then never will
_FIRST_LINES = 3  # of what an exception says


class Wrong(Exception):
    """An answer breaks a rule.

    Args:
        rule: the rule, in words that a learner can act on.
        example: the smallest case that shows it: what went in, what came out, what should have.
    """

    def __init__(self, rule: str, example: str = "") -> None:
        super().__init__(rule, example)
        self.rule, self.example = rule, example

    def __str__(self) -> str:
        return f"{self.rule}\n  {self.example}" if self.example else self.rule


@dataclass(frozen=True)
class Run:
    """What became of a function in the engine.

    Args:
        sentence: what it did, against the reference: "your pool ran 8 requests: 41 steps, reference 38".
        pictures: to be drawn, each under a line of its own.
    """

    sentence: str
    pictures: Sequence[tuple[str, Picture]] = ()


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        id: notebook and number, such as "03.2".
        title: what is to be written, in a few words.
        reference: a right answer; what later cells use as long as the learner has none.
        examine: calls a learner's function on cases, the smallest first, and raises `Wrong` at the first
            that breaks a rule. An untouched stub raises `NotImplementedError`, which it lets pass.
        run: puts a right answer into the real engine; None if there is nothing to run.
    """

    id: str
    title: str
    reference: Callable[..., Any]
    examine: Callable[[Callable[..., Any]], None]
    run: Callable[[Callable[..., Any]], Run] | None = None


@dataclass(frozen=True)
class Verdict:
    """What `judge` found: `state` is "right", "wrong" or "open" (an untouched stub)."""

    exercise: Exercise
    state: str
    text: str
    pictures: Sequence[tuple[str, Picture]] = field(default=())


def find(exercise_id: str) -> Exercise:
    """The exercise of that name.

    Raises:
        ValueError: if there is none; says which there are in that notebook.
    """
    number = exercise_id.partition(".")[0] if isinstance(exercise_id, str) else ""
    try:
        known = import_module(f"labkit.exercises.e{number}").EXERCISES if number.isdecimal() else ()
    except ModuleNotFoundError:
        known = ()
    for exercise in known:
        if exercise.id == exercise_id:
            return exercise
    there = f"; notebook {number} has {', '.join(e.id for e in known)}" if known else ""
    raise ValueError(f"there is no exercise {exercise_id!r}{there}")


def judge(exercise_id: str, function: Callable[..., Any]) -> Verdict:
    """Examine a function, and run it in the engine if it is right. Prints and draws nothing."""
    exercise = find(exercise_id)
    title = f"{exercise.id} {exercise.title}"
    if not callable(function):
        raise ValueError(f"exercise {exercise_id} checks a function or a class, not {function!r}")
    try:
        with _patience():
            exercise.examine(function)
            run = exercise.run(function) if exercise.run else Run("")
    except NotImplementedError:
        # One fixed line: what a notebook shows before its reader has begun.
        return Verdict(exercise, "open", f"○ {title}: yours to write. Until then the reference is used.")
    except (Wrong, InvariantError) as error:
        return Verdict(exercise, "wrong", f"✗ {title}: {error}")
    except Exception as error:
        return Verdict(exercise, "wrong", f"✗ {title}: {_raised(error, function)}")
    sentence = f" {run.sentence}" if run.sentence else ""
    return Verdict(exercise, "right", f"✓ {title}.{sentence}", run.pictures)


def check(exercise_id: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Examine a function, say what is right or wrong with it, and draw what the engine did with it.

    Args:
        exercise_id: notebook and number, such as "03.2".
        function: what the learner wrote.

    Returns:
        The function if it is right, else the reference, so that the cells that follow can go on.

    Raises:
        ValueError: if there is no such exercise.
    """
    verdict = judge(exercise_id, function)
    print(verdict.text)
    for caption, picture in verdict.pictures:
        print(f"\n{caption}")
        show(picture)
    return function if verdict.state == "right" else verdict.exercise.reference


def expect(condition: bool, rule: str, example: str = "") -> None:
    """Raise `Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(rule, example)


def _raised(error: Exception, function: Callable[..., Any]) -> str:
    what = "\n  ".join(f"{type(error).__name__}: {error}".splitlines()[:_FIRST_LINES])
    place, code = "", getattr(inspect.unwrap(function), "__code__", None)
    trace = error.__traceback__
    while trace:  # the innermost line of the learner's own code
        if code is not None and trace.tb_frame.f_code is code:
            place = f" in its line {trace.tb_lineno - code.co_firstlineno + 1}"
        trace = trace.tb_next
    return f"it raised{place}\n  {what}"


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Stop what never comes back, where the system can: a loop that does not end is a wrong answer."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise Wrong(f"it did not come back within {_SECONDS} seconds: does a loop never end?")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
