"""Exercises: a learner's function is examined, put into the real engine, and what it did is drawn.

`check` is what a notebook calls. Each exercise lives in the module of its notebook (`e03.py` has those of
notebook 03) and says three things: what is right, how to find out, and how the engine runs with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from labkit.core.block_pool import InvariantError
from labkit.views.picture import Picture, show

_PATIENCE = 60.0  # seconds of computing; a function that has not come back by then never will
_WAITING = 10  # times as long for one that only waits, or for a machine that is busy with other things
_TICK = 0.5  # seconds between two looks at the clock
_FIRST_LINES = 3  # of what an exception says
_UNTIL_RIGHT = "Until it is right, the cells below use the reference."


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
        return f"{self.rule}\n{textwrap.indent(self.example, '  ')}" if self.example else self.rule


class _Endless(BaseException):
    """Time is up. No `Exception`: a learner's `except Exception` must not catch it, nor the engine end a
    request for it and go on."""


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
        f"notebook {number} has {', '.join(e.id for e in known)}" if known else 'one is called "03.2", say'
    )
    raise ValueError(f"there is no exercise {exercise_id!r}: {there}")


def judge(exercise_id: str, function: Callable[..., Any], *, patience: float = _PATIENCE) -> Verdict:
    """Examine a function, and run it in the engine if it is right. Prints and draws nothing.

    Args:
        exercise_id: notebook and number, such as "03.2".
        function: what the learner wrote: a function or a class.
        patience: seconds of computing after which a function that has not come back is stopped, where the
            system can.

    Raises:
        ValueError: if there is no such exercise, or nothing that can be called.
    """
    exercise = find(exercise_id)
    title = f"{exercise.id} {exercise.title}"
    if not callable(function):
        raise ValueError(f"exercise {exercise_id} checks a function or a class, not {function!r}")
    try:
        with _stopped_after(patience):
            exercise.examine(function)
            run = exercise.run(function) if exercise.run else Run("")
    except (Wrong, InvariantError) as error:
        why = str(error)
    except _Endless as error:
        why = f"it had not come back after {patience:g} seconds of computing: does a loop never end?"
        why += _line(_places(error, function))
    except NotImplementedError as error:
        if _is_stub(error, function):
            # One fixed line: what a notebook shows before its reader has begun.
            return Verdict(exercise, "open", f"○ {title}: yours to write. Until then the reference is used.")
        why = _raised(error, function)
    except Exception as error:
        why = _raised(error, function)
    else:
        sentence = f" {run.sentence}" if run.sentence else ""
        return Verdict(exercise, "right", f"✓ {title}.{sentence}", run.pictures)
    return Verdict(exercise, "wrong", f"✗ {title}: {why}\n  {_UNTIL_RIGHT}")


def check(exercise_id: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Examine a function, say what is right or wrong with it, and draw what the engine did with it.

    Args:
        exercise_id: notebook and number, such as "03.2".
        function: what the learner wrote.

    Returns:
        The function if it is right, else the reference, so that the cells that follow can go on.

    Raises:
        ValueError: if there is no such exercise, or nothing that can be called.
    """
    exercise = find(exercise_id)
    if function is exercise.reference:  # what an earlier check returned under the learner's name
        print(
            f"○ {exercise.id} {exercise.title}: this is the reference. Run the cell with your own code again."
        )
        return function
    verdict = judge(exercise_id, function)
    print("\n".join(map(_wrapped, verdict.text.splitlines())))
    for caption, picture in verdict.pictures:
        print(f"\n{caption}")
        show(picture)
    return function if verdict.state == "right" else exercise.reference


def _wrapped(line: str) -> str:
    """A line of at most 110 characters, or several: notebooks break longer ones in the middle of a word."""
    return textwrap.fill(line, 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def expect(condition: bool, rule: str, example: str = "") -> None:
    """Raise `Wrong` unless the condition holds."""
    if not condition:
        raise Wrong(rule, example)


# -- whose fault, and where -----------------------------------------------------------------------


def _raised(error: Exception, function: Callable[..., Any]) -> str:
    """What an exception says to the learner: whether their code raised it, and in which line."""
    name = type(error).__name__
    said = "\n  ".join((f"{name}: {error}" if str(error) else name).splitlines()[:_FIRST_LINES])
    if places := _places(error, function):
        return f"it raised {said}{_line(places)}"
    if isinstance(error, TypeError) and str(error).startswith(f"{getattr(function, '__qualname__', '')}("):
        return f"it cannot be called as the exercise calls it\n  {said}"
    return f"the engine cannot go on with what it returned or did\n  {said}"


def _places(error: BaseException, function: Callable[..., Any]) -> list[tuple[str, int]]:
    """File and line of each frame of the learner's own code that an exception passed, innermost last."""
    files, found, trace = _files(function), [], error.__traceback__
    while trace:
        if (file := trace.tb_frame.f_code.co_filename) in files:
            found.append((file, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _line(places: list[tuple[str, int]]) -> str:
    """The innermost line, by its number in the cell and by what stands there; nothing if there is none."""
    if not places:
        return ""
    file, number = places[-1]
    source = linecache.getline(file, number).strip()
    return f"\n  in line {number}: {source}" if source else f"\n  in line {number}"


def _is_stub(error: NotImplementedError, function: Callable[..., Any]) -> bool:
    """Whether the learner's own code raised it, and not torch or the engine below."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    files = _files(function)
    return not files or (trace is not None and trace.tb_frame.f_code.co_filename in files)


def _files(function: Callable[..., Any]) -> set[str]:
    """The files that a function or a class is written in; each cell of a notebook is one."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        parts: Sequence[Any] = [function]
    else:
        parts = list(vars(function if isinstance(function, type) else type(function)).values())
    bare = [getattr(part, "__func__", None) or getattr(part, "fget", None) or part for part in parts]
    codes = [getattr(inspect.unwrap(part), "__code__", None) for part in bare if callable(part)]
    return {code.co_filename for code in codes if code is not None}


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Stop what never comes back, where the system can: a loop that does not end is a wrong answer."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    began, latest = time.thread_time(), time.perf_counter() + _WAITING * seconds

    def look(*_: Any) -> None:
        if time.thread_time() - began >= seconds or time.perf_counter() >= latest:
            raise _Endless

    handler = signal.signal(signal.SIGALRM, look)
    tick = min(_TICK, seconds / 4)
    timer = signal.setitimer(signal.ITIMER_REAL, tick, tick)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
