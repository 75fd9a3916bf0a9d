"""What can be wrong with a model, said so that a reader knows what to do about it."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # PyTorch's words, in lower case


class ModelError(ValueError):
    """A model cannot be found, fetched or used; the message says why, and what can be done."""


class DamagedError(ModelError):
    """A file is not what was saved or published; fetching it again may help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice. On a CPU, PyTorch says so with a plain `RuntimeError`."""
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(known in words for known in _OUT_OF_MEMORY)
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
