"""What a fake GPU notes: how much it was asked for, and each launch of a Triton kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Counts:
    """What was asked of a GPU.

    Attributes:
        kernels: How often each operator launched a kernel, by name.
        captured: The same, for kernels that graphs launch.
        traffic: The bytes that the kernels of each operator read and write, launched or captured. Triton's
            are not among them: what they read of the cache depends on values.
        replays: How often a graph was launched.
        uploads, waits: How often numbers were copied to the GPU, and how often the CPU waited for it.
        doubles: The operators that made fp64.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)
    replays: int = 0
    uploads: int = 0
    waits: int = 0
    doubles: Counter[str] = field(default_factory=Counter)

    @property
    def operators(self) -> int:
        """How often Python launched something: a kernel, a graph or a copy."""
        return self.kernels.total() + self.replays + self.uploads + self.waits

    @property
    def launches(self) -> int:
        """How many kernels the GPU ran."""
        return self.kernels.total() + self.captured.total()


@dataclass(frozen=True)
class Launch:
    """The launch of a Triton kernel: the arguments by name, with fake tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel's function."""
        return self.kernel.fn.__name__
