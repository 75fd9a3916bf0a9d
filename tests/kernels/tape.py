"""CUDA graphs without CUDA: a tape that records operators, and replays them on the same memory.

The tape keeps every operator with its tensors and its numbers as they were, as a graph does: what a step
should have brought anew, and did not, is wrong in the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for the device, or brings numbers from the host: a graph can hold neither.
FORBIDDEN = {"item", "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique"}


class Tape(TorchDispatchMode):
    """Records the operators run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in FORBIDDEN:
            raise AssertionError(f"{name} cannot be captured")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            inputs = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif any(x.untyped_storage().data_ptr() not in inputs for x in tensors(out)):  # else a view
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class TapeCapture:
    """Stands in for `CudaCapture`; each recording takes `cost` bytes."""

    def __init__(self, cost: int = 0) -> None:
        self.cost, self.nbytes, self.replays = cost, 0, 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.nbytes += self.cost
        with Tape() as tape:
            out = compute()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, out
