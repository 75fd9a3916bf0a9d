"""The processes of a parallel model, as one of them sees them: sums, copies, and what they cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=60)  # for one exchange: a process that hangs so long is given up


class ParallelError(RuntimeError):
    """A process of a parallel model ended, hung or failed. The message says which, and why."""


class Group:
    """All processes that hold a part of one model, and this one's place among them.

    It is no part of PyTorch's default group, of which a process has only one, so that several models can run
    side by side. On a CPU the processes talk through gloo, over the loopback interface alone; on GPUs, NCCL.

    Args:
        meeting: a file, the same for all, where the processes find each other.
        rank, world_size: the place of this process, and how many there are.
        device: where its tensors are.
    """

    def __init__(self, meeting: str, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size = rank, world_size
        self.layer_bytes = self.other_bytes = 0  # sent by this process since `drain`
        self.seconds = 0.0
        store = dist.FileStore(meeting, world_size)
        store.set_timeout(TIMEOUT)
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(store, rank, world_size)
        else:
            options = dist.ProcessGroupGloo._Options()  # the public constructor chooses the interface itself
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            options._timeout = TIMEOUT
            self._group = dist.ProcessGroupGloo(store, rank, world_size, options)

    def all_reduce(self, x: Tensor, *, of_layer: bool = True) -> Tensor:
        """Replace x by its sum over all processes, and return it.

        A ring sends 2 (p - 1) / p of the tensor from each of p processes (Patarasuk and Yuan 2009): first so
        that each has one piece of the sum, then so that all have all pieces.
        """
        sent = 2 * (self.world_size - 1) * x.nbytes // self.world_size
        if of_layer:
            self.layer_bytes += sent
        else:
            self.other_bytes += sent
        with self._timed():
            self._group.allreduce([x]).wait()
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace x by what the first process has, and return it."""
        if self.rank == 0:
            self.other_bytes += x.nbytes * (self.world_size - 1)
        with self._timed():
            self._group.broadcast(x, 0).wait()
        return x

    def collect(self, x: Tensor) -> list[Tensor]:
        """Bring tensors of one shape to the first process, which gets all of them; the others get none."""
        with self._timed():
            if self.rank:
                self._group.send([x], 0, self.rank).wait()
                return []
            found = [x] + [torch.empty_like(x) for _ in range(1, self.world_size)]
            arriving = [self._group.recv([found[rank]], rank, rank) for rank in range(1, self.world_size)]
            for one in arriving:
                one.wait()
            self.other_bytes += x.nbytes * (self.world_size - 1)
            return found

    def drain(self) -> dict[str, float]:
        """Return what was sent since the last call, as fields of `StepRecord`."""
        found = {
            "sent_in_layers": self.layer_bytes,
            "sent_elsewhere": self.other_bytes,
            "sending": self.seconds,
        }
        self.layer_bytes, self.other_bytes, self.seconds = 0, 0, 0.0
        return found

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
