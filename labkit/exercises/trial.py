"""Runs a learner's function where it can be stopped.

On Linux that is a child process. A loop inside C code, such as `sum(itertools.count())`, never returns to the
interpreter: no signal handler, no trace function and no exception from another thread can end it, and it
keeps the lock that other threads would need. Only another process can. `fork` copies this one in some
milliseconds, with the notebook's cells and the models in it, so nothing has to be sent: PyTorch's
`DataLoader` starts its workers in the same way. The kernel of the system then holds the copy to a limit of
computing time and of memory, and whatever becomes of it, the notebook lives on.

macOS cannot fork safely once its frameworks run, and Windows cannot at all; a fresh process would import
torch for seconds at every check. There the function runs in this process, and a thread raises an exception in
it when time is up. That ends loops of Python code, but not those inside C.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import IO

Notice = Callable[[float], None]
"""Called now and then with the seconds that have passed."""

_WAITING = 10  # times as long on the clock: a function may wait, or the machine may be busy
_TICK = 0.5  # seconds between two looks at the clock
_MEMORY = 2 << 30  # bytes that a function may take beyond what the process has
_SAID = 20_000  # characters that it may print
_FRAME = re.compile(r'^  File "(.*)", line (\d+)', re.MULTILINE)


class Endless(BaseException):
    """Time is up.

    It is not an `Exception`: neither a learner's `except Exception` nor the engine may catch it and go on.
    """


class Lost(Exception):
    """The child process ended before its task did.

    Args:
        why: a sentence for the learner.
        places: file and line of each frame at its end, the innermost first, as far as they are known.
    """

    def __init__(self, why: str, places: list[tuple[str, int]]) -> None:
        super().__init__(why)
        self.why, self.places = why, places


def too_long(seconds: float) -> str:
    """Say that a function does not return."""
    return f"it had not returned after {seconds:g} seconds of computing: is there a loop that never ends?"


# -- in a child process ---------------------------------------------------------------------------


def can_fork() -> bool:
    """Whether a copy of this process can run a task; not under a debugger, which would lose sight of it."""
    return sys.platform == "linux" and sys.gettrace() is None


def in_child(task: Callable[[], str], seconds: float, notice: Notice, meanwhile: Callable[[], None]) -> str:
    """Run a task in a copy of this process, and return its text. What it prints is printed here.

    Args:
        task: function to run; nothing that it changes is changed here.
        seconds: computing time that it may take, rounded up to whole seconds.
        notice: is called about twice a second.
        meanwhile: is called here once, if the task has not returned at once.

    Raises:
        Lost: it took longer, waited ten times as long, or ended its process.
    """
    most = math.ceil(seconds)  # the system counts whole seconds
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryFile() as stack, receiver:
        child = multiprocessing.get_context("fork").Process(
            target=_work, args=(task, sender, stack, most), daemon=True
        )
        sys.stdout.flush()
        with warnings.catch_warnings():  # newer Pythons warn of threads, which the child never uses
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        sender.close()
        try:
            if not receiver.poll(_TICK):
                meanwhile()
            text = _received(receiver, child.pid, _WAITING * most, notice)
            if text is not None:
                return text
            child.join(_TICK)  # it has closed the pipe: it is at its end
        finally:
            child.kill()
            child.join()
        stack.seek(0)
        frames = [(file, int(line)) for file, line in _FRAME.findall(stack.read().decode(errors="replace"))]
        raise Lost(_end(child.exitcode or 0, seconds), frames)


def _received(receiver: Connection, pid: int | None, patience: float, notice: Notice) -> str | None:
    """Print what the child says until its task returns; None if its process ends before.

    Raises:
        Lost: the child waited so many seconds. One that is ready to compute does not wait: the machine is
            busy, and the system ends it when it has computed enough.
    """
    began, waited = time.perf_counter(), 0.0
    while waited < patience:
        notice(time.perf_counter() - began)
        if not receiver.poll(_TICK):
            waited += 0 if _computes(pid) else _TICK
            continue
        try:
            kind, text = receiver.recv()
        except EOFError:
            return None
        if kind == "returned":
            return text
        print(text, end="")
    raise Lost(f"it had waited for {patience:g} seconds without an end: what does it wait for?", [])


def _computes(pid: int | None) -> bool:
    """Whether a process computes, or would if the machine had time for it."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "R"


def _end(code: int, seconds: float) -> str:
    """Say how a child came to its end."""
    if code == -signal.SIGXCPU:
        return too_long(seconds)
    if code == -signal.SIGKILL:
        return "the system stopped it: it took too much memory or time"
    name = f"with signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"it ended its process {name}: return an answer instead"


def _work(task: Callable[[], str], sender: Connection, stack: IO[bytes], most: int) -> None:
    """Run the task in the child, within limits that the system keeps."""
    import resource

    import torch

    torch.set_num_threads(1)  # the threads of a pool are not copied by `fork`
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # nor are those of tokenizers, which would warn of it
    faulthandler.disable()  # a crash is told in the verdict
    faulthandler.register(signal.SIGXCPU, file=stack, all_threads=False, chain=True)  # then it ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    with open("/proc/self/statm") as sizes:
        memory = int(sizes.read().split()[0]) * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.redirect_stdout(_Teller(sender)), contextlib.redirect_stderr(_Teller(sender)):
        try:
            text = task()
        except KeyboardInterrupt:  # the notebook was interrupted, and this copy of it as well
            os._exit(1)
    sender.send(("returned", text))


class _Teller(io.TextIOBase):
    """A stream whose text is printed by the parent, up to a limit."""

    def __init__(self, sender: Connection) -> None:
        self._sender, self._left = sender, _SAID

    def write(self, text: str) -> int:
        if self._left > 0 and text:
            more = "\n... (it prints more than is shown)\n" if len(text) > self._left else ""
            self._sender.send(("said", text[: self._left] + more))
        self._left -= len(text)
        return len(text)


# -- in this process ------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped_after(seconds: float, notice: Notice) -> Iterator[None]:
    """Raise `Endless` in this thread when what runs inside has computed that long, or waited ten times so."""
    thread, done, lock = threading.get_ident(), threading.Event(), threading.Lock()
    clock = _clock_of(thread)
    began, start = clock(), time.perf_counter()

    class Stop(Endless):  # a thread is given a class to raise, not an object
        def __str__(self) -> str:
            return too_long(seconds)

    def watch() -> None:
        while not done.wait(min(_TICK, seconds / 4)):
            passed = time.perf_counter() - start
            notice(passed)
            with lock:
                if not done.is_set() and (clock() - began >= seconds or passed >= _WAITING * seconds):
                    _raise_in(thread, Stop)  # again and again: a bare `except` may swallow it

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            done.set()
            _raise_in(thread, None)  # one that is on its way has come too late
        watcher.join()


def _clock_of(thread: int) -> Callable[[], float]:
    """A clock of what a thread computes, or the whole process where threads have none."""
    if hasattr(time, "pthread_getcpuclockid"):
        clock = time.pthread_getcpuclockid(thread)
        return lambda: time.clock_gettime(clock)
    return time.process_time


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    what = ctypes.py_object(error) if error else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
