"""The other processes of a parallel model: started, told what to do, watched, and ended.

Each is `python -m labkit.parallel.worker`, which reads messages from its standard input.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from labkit.outputs import in_one_line
from labkit.parallel import processes
from labkit.parallel.group import Group, ParallelError
from labkit.parallel.messages import Load, Message
from labkit.parallel.processes import ends

_PATIENCE = 5.0  # seconds to wait for the last words of a process that failed


class Workers:
    """The processes of rank 1 and on.

    Args:
        world_size: how many processes there are, this one included.
    """

    group: Group

    def __init__(self, world_size: int) -> None:
        self.failure = ""  # why the model is of no use any more
        self.dropped: deque[int] = deque()  # caches that are gone; any thread may add one
        self._lock = threading.RLock()  # engines on several threads can share a model
        self._folder = tempfile.TemporaryDirectory(prefix="labkit-")
        self.meeting = str(Path(self._folder.name) / "meeting")
        self.processes = [processes.start("labkit.parallel.worker") for _ in range(1, world_size)]

    def tell(self, message: Message) -> None:
        """Send a message to each of them."""
        data = pickle.dumps(message)
        for process in self.processes:
            ends(process.stdin).write(data)
            ends(process.stdin).flush()

    def load(self, arguments: Sequence[dict[str, Any]], threads: int, device: torch.device) -> None:
        """Let each load its part, and make the group. Raises `ParallelError` if one cannot.

        Args:
            arguments: those of `load_model`, for each of them.
            threads: how many threads of PyTorch each gets.
            device: where the tensors of this process are.
        """
        with self.together():
            for process, own in zip(self.processes, arguments, strict=True):
                processes.send(ends(process.stdin), Load(own, self.meeting, threads))
            for process in self.processes:
                pickle.load(ends(process.stdout))  # nothing, as soon as it has loaded
            self.group = Group(self.meeting, 0, 1 + len(self.processes), device)

    def drain(self) -> list[int]:
        """Return the caches that are gone since the last call."""
        return [self.dropped.popleft() for _ in range(len(self.dropped))]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do something that takes part of all processes; whatever goes wrong in it ends them all.

        Raises:
            ParallelError: if one of them ended, hung or failed, now or earlier.
        """
        with self._lock:
            if self.failure:
                raise ParallelError(self.failure)
            try:
                yield
            except BaseException as error:
                self.failure = self._explain(error)
                self.close()
                if isinstance(error, Exception):
                    raise ParallelError(self.failure) from error
                raise

    def _explain(self, error: BaseException) -> str:
        """Say which process failed and why. Others fail because of it, and what they say is of no use."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and all(process.poll() is None for process in self.processes):
            time.sleep(0.02)
        for rank, process in enumerate(self.processes, 1):
            if process.poll() is not None:
                with contextlib.suppress(Exception):
                    return f"process {rank} of this model failed: {pickle.load(process.stdout)}"
                return f"process {rank} of this model ended (exit code {process.returncode})"
        return f"the processes of this model failed: {in_one_line(error)}"

    def close(self) -> None:
        """End all of them. It can be called again."""
        self.failure = self.failure or "this model was closed"
        for process in self.processes:
            processes.end(process)
        self._folder.cleanup()
