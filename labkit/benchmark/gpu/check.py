"""All that only a GPU can tell, in one command and a few minutes, as one block of text to paste.

The parts (`check_parts.py`) run one after the other in a process of their own. A part that fails is reported,
and so is one that kills the process, takes too long, or leaves the GPU in a state in which nothing works any
more: the next part then gets a fresh process. Without a GPU each part has a stand-in, which shows that the
part itself works, and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import transformers

from labkit.benchmark.gpu.check_parts import CPU, CUDA, PARTS, Target
from labkit.models.devices import resolve_device

SECONDS = 350.0  # of all parts together: a free GPU is lent for a while only
_START = 60.0  # that a process may take to import everything
HEADER = "----- labkit, what only a GPU can tell -----"
NO_GPU = "There is no CUDA GPU here, so there is nothing to check. On a free T4 this takes under six minutes."


class _Worker:
    """A process that runs parts, until one of them goes wrong."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def run(self, name: str, target: Target, seconds: float) -> tuple[list[str], str, Target]:
        """Run a part; return its lines, what went wrong (or nothing), and the target for the next part."""
        lines: list[str] = []
        limit = time.perf_counter() + seconds
        try:
            self._connection.send((name, target))
            while self._connection.poll(max(0.0, limit - time.perf_counter())):
                kind, told = self._connection.recv()
                if kind == "line":
                    lines.append(told)
                elif kind == "fault":
                    return lines, told, target
                else:
                    return lines, "", told
        except (EOFError, OSError):
            self._process.join(5)
            return lines, f"its process ended with code {self._process.exitcode}", target
        return lines, f"it took longer than {seconds:.0f} s", target

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()  # if it is well, it ends by itself
        self._process.join(3)
        self._process.kill()
        self._process.join()


def _work(connection: Connection) -> None:
    transformers.logging.set_verbosity_error()
    while True:
        try:
            name, target = connection.recv()
        except EOFError:
            return
        try:
            for line in PARTS[name].run(target):
                connection.send(("line", line))
            if target.device == "cuda":
                torch.cuda.synchronize()  # what a kernel did wrong may show only now
            connection.send(("done", target))
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            connection.send(("fault", f"{type(error).__name__}: {first[:200]}"))


def gpu_check(
    device: str = "auto",
    *,
    parts: Sequence[str] | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], None] | None = None,
) -> str:
    """Run the parts, and return the block of text.

    Args:
        device: "cuda"; "cpu" runs the stand-ins; "auto" is the GPU, or one line if there is none.
        parts: The names of the parts; None is all of them.
        seconds: The time for all of them. What does not fit is left out, and said to be.
        say: A function that gets a line as each part begins.

    Raises:
        ValueError: If a part or the device is unknown.
    """
    if device == "auto" and not torch.cuda.is_available():
        return NO_GPU
    if unknown := sorted(set(parts or ()) - set(PARTS)):
        raise ValueError(f"there is no part {unknown[0]!r}; there is {', '.join(PARTS)}")
    target = CUDA if resolve_device(device).type == "cuda" else CPU
    lines: list[str] = []
    tell = lines.append
    tell(HEADER if target is CUDA else f"{HEADER[:-6]} (STAND-INS ON A CPU: no figure means anything) -----")
    began = time.perf_counter()
    chosen = [name for name in PARTS if parts is None or name in parts]
    fine, worker, start = 0, None, _START
    for number, name in enumerate(chosen, 1):
        if say:
            say(f"[{number}/{len(chosen)}] {name}")
        left = seconds - (time.perf_counter() - began)
        if left < 10:
            tell(f"LEFT OUT {name}: no time left")
            continue
        if PARTS[name].hides_gpu or worker is None:
            worker, start = _replace(worker, hide=PARTS[name].hides_gpu), _START
        at = time.perf_counter()
        said, fault, target = worker.run(name, target, min(PARTS[name].seconds + start, left))
        start = 0.0
        lines += said
        if fault:
            tell(f"FAILED {name}: {fault}")
        else:
            fine += 1
        tell(f"({name}: {time.perf_counter() - at:.0f} s)")
        if fault or PARTS[name].hides_gpu:
            worker = _replace(worker, new=False)
    if worker:
        worker.stop()
    tell(f"----- {fine} of {len(chosen)} parts ran to their end, {time.perf_counter() - began:.0f} s -----")
    return "\n".join(lines)


def _replace(worker: _Worker | None, *, hide: bool = False, new: bool = True) -> _Worker | None:
    """Stop a process, and start another, which may not see the GPU."""
    if worker:
        worker.stop()
    if not new:
        return None
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hide:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return _Worker()
    finally:
        if hide and before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif hide:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
