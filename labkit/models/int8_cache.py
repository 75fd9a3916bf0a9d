"""The quantised copy of a model, made once and kept in the lab's cache."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from labkit.core.model import Transformer
from labkit.kernels.int8 import from_quantized, pick_kernel, quantize
from labkit.models.gguf_fetch import cache_dir

_VERSION = 1  # of what `quantize` makes


def int8_model(
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None] | None,
) -> Transformer:
    """Quantise a model, or take the copy that was kept.

    Args:
        tensors: as for `Transformer.from_tensors`; not read if there is a copy.
        folder: where they come from; None keeps no copy.

    Raises:
        ValueError: for tensors that do not fit.
    """
    kernel, why = pick_kernel(device)
    if say:
        say(f"Products of 8 bits by {why}.")
    made = dict(dtype=dtype, device=device, kernel=kernel)
    copy = cache_dir() / "int8" / f"{_key(folder)}.safetensors" if folder else None
    if copy and copy.is_file():
        try:
            return from_quantized(config, load_file(copy), **made)
        except (SafetensorError, ValueError, OSError):  # damaged: made anew
            copy.unlink(missing_ok=True)
    begin = time.perf_counter()
    quantized = quantize(
        Transformer.from_tensors(config, tensors, dtype=torch.float32, device=torch.device("cpu"))
    )
    if say:
        say(f"Quantised in {time.perf_counter() - begin:.1f} s; the copy is kept for the next time.")
    if copy:
        _keep(copy, quantized, say)
    return from_quantized(config, quantized, **made)


def _keep(copy: Path, tensors: dict[str, Tensor], say: Callable[[str], None] | None) -> None:
    """Save a copy, whole or not at all."""
    part = copy.with_suffix(f".{os.getpid()}.part")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part)
        part.replace(copy)
    except OSError as error:  # a full or read-only disk: it goes without
        if part.is_file():
            part.unlink()
        if say:
            say(f"The copy could not be kept: {error}")


def _key(folder: Path) -> str:
    """A name for these very weights: their place, sizes and times."""
    facts: list[object] = [_VERSION, str(folder.resolve())]
    for file in sorted((*folder.glob("*.safetensors"), folder / "config.json")):
        state = file.stat()
        facts += [file.name, state.st_size, state.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
