"""The quantised copy of a model, made once and kept in the lab's cache."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from labkit.core.model import Transformer
from labkit.kernels.int8 import from_quantized, pick_kernel, quantize
from labkit.models.architecture import build, shape_of
from labkit.models.cache_dir import cache_dir, written_whole
from labkit.models.checkpoint import Config
from labkit.models.progress import Say, tell

_VERSION = 2  # of what `build` and `quantize` make; a new number leaves older copies aside


def int8_model(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    say: Say | None,
) -> Transformer:
    """Quantise a model, or take the copy that was kept.

    Args:
        config: the model's configuration.
        tensors: its tensors, as for `build`; they are not read if there is a copy.
        folder: the folder that they come from; None keeps no copy.
        dtype: the dtype of activations.
        say: a function that gets a line about each thing that takes time; None is silence.

    Raises:
        ValueError: if the tensors do not fit the configuration.
    """
    kernel, why = pick_kernel(device)
    tell(say, f"Products of 8 bits by {why}.")
    module_of = functools.partial(from_quantized, shape_of(config), dtype=dtype, device=device, kernel=kernel)
    copy = cache_dir() / "int8" / f"{_key(folder)}.safetensors" if folder else None
    if copy and copy.is_file():
        try:
            return module_of(load_file(copy))
        except (SafetensorError, ValueError, OSError):  # the copy is damaged: make another
            copy.unlink(missing_ok=True)
    begin = time.perf_counter()
    quantized = quantize(build(config, tensors, dtype=torch.float32, device=torch.device("cpu")))
    kept = "; the copy is kept for the next time" if copy else ""
    tell(say, f"Quantised in {time.perf_counter() - begin:.1f} s{kept}.")
    if copy:
        _keep(copy, quantized, say)
    return module_of(quantized)


def _keep(copy: Path, tensors: dict[str, Tensor], say: Say | None) -> None:
    """Save a copy, whole or not at all."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(copy) as part:
            save_file(tensors, part)
    except OSError as error:  # a full or read-only disk: we do without the copy
        tell(say, f"The copy could not be kept: {error}")


def _key(folder: Path) -> str:
    """Return a name that changes when the weights do: a hash of their files' places, sizes and times."""
    facts: list[object] = [_VERSION, str(folder.resolve())]
    for file in sorted((*folder.glob("*.safetensors"), folder / "config.json")):
        state = file.stat()
        facts += [file.name, state.st_size, state.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
