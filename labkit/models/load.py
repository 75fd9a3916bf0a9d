"""Load a model: a short name, a Hub id or a folder goes in, a model ready to run comes out."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from labkit.config import ModelConfig
from labkit.core.model import Transformer
from labkit.kernels import packed_linear
from labkit.kernels.cpu import layers
from labkit.models import architecture, checkpoint, gguf_fetch
from labkit.models.cache_dir import cache_dir
from labkit.models.checkpoint import Config
from labkit.models.devices import auto_reason, resolve_device, resolve_dtype
from labkit.models.errors import ModelError, is_out_of_memory
from labkit.models.generation_config import not_obeyed
from labkit.models.hub import TINY, find, is_folder
from labkit.models.int8_cache import int8_model
from labkit.models.no_tokenizer import NoTokenizer
from labkit.models.progress import Say, tell
from labkit.models.split import part_of_config, part_of_tensors, parts
from labkit.models.tiny import tiny_random

if TYPE_CHECKING:
    from labkit.models.adapter import AdaptedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. Many engines can share one.

    Attributes:
        name: the short name, the Hub id, or the name of the folder.
        module: the weights, on their device and in their dtype.
        tokenizer: the tokenizer, with its chat template if the model has one; or what refuses text.
        config: the architecture, with the names of `config.json` as attributes.
        eos_token_ids: every token that ends an answer.
        quantization: None, or "int8".
        generation: what `generation_config.json` holds; `labkit.models.generation_config` reads it.
    """

    name: str
    module: Transformer | AdaptedModel
    tokenizer: PreTrainedTokenizerBase | NoTokenizer
    config: Config
    eos_token_ids: frozenset[int]
    quantization: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` if a configuration asks for another model than this one was loaded as."""
        asked: dict[str, object] = {}  # what is not left at its default
        if config.dtype != "auto":
            asked["dtype"] = resolve_dtype(config.dtype, self.device)
        if config.device != "auto":
            asked["device"] = resolve_device(config.device).type
        if config.quantization:
            asked["quantization"] = config.quantization
        has = {"dtype": self.dtype, "device": self.device.type, "quantization": self.quantization}
        for name, value in asked.items():
            if value != has[name]:
                default = getattr(ModelConfig, name)
                raise ValueError(
                    f"{name} must be {default} for a loaded model: it is {has[name]}, not {value}"
                )
        for name in ("fused_projections", "packed_weights", "cpu_kernels"):
            if not getattr(config, name):
                raise ValueError(f"{name} must be left alone for a loaded model: load_model takes it")


def load_model(
    model: str | os.PathLike[str] = gguf_fetch.NAME,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    fused_projections: bool = True,
    packed_weights: bool = True,
    cpu_kernels: bool = True,
    rank: int = 0,
    world_size: int = 1,
    say: Say | None = print,
) -> LoadedModel:
    """Load a model, after fetching it if need be.

    Args:
        model: "smollm2-135m", "tiny-random" (made in memory), a Hub id such as "Qwen/Qwen2.5-0.5B-Instruct",
            or a folder that `save_pretrained` wrote. Without a tokenizer in it, prompts are token ids.
        dtype: one of the names in `devices.DTYPES`, or "auto": fp32 on a CPU; on a GPU bf16 where it has that
            in hardware, else fp16; always fp32 for "tiny-random", whose tokens are the same everywhere.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto": the GPU that CUDA sees, else the CPU.
        quantization, fused_projections, packed_weights, cpu_kernels: switches as in `EngineConfig`.
        rank, world_size: which part to load, of how many, where several processes share a model
            (`labkit.parallel` puts the parts together).
        say: a function that gets a line about each thing that takes time; None is silence, without progress
            bars of our own.

    Raises:
        ModelError: if the model cannot be found, fetched, read, understood or held in memory, or an argument
            is wrong.
    """
    if quantization not in (None, "int8"):
        raise ModelError(f"quantization must be None or 'int8', not {quantization!r}")
    to = resolve_device(device)
    build = functools.partial(
        build_transformer,
        device=to,
        quantization=quantization,
        fused_projections=fused_projections,
        packed_weights=packed_weights,
        cpu_kernels=cpu_kernels,
        rank=rank,
        world_size=world_size,
    )
    if model == TINY:
        config, tensors, tokenizer = tiny_random()
        as_type = resolve_dtype("float32" if dtype == "auto" else dtype, to)
        module = build(config, tensors.items(), dtype=as_type)
        ends = _eos_token_ids(config, tokenizer, {})
        return LoadedModel(TINY, module, tokenizer, config, ends, quantization)

    as_type = resolve_dtype(dtype, to)
    folder = find(model, say=say)
    started = time.perf_counter()
    name = folder.resolve().name if is_folder(model) else str(model)
    config, tokenizer = checkpoint.read_config(folder), checkpoint.read_tokenizer(folder)
    generation = checkpoint.read_generation_config(folder)
    ends = _eos_token_ids(config, tokenizer, generation)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}), and only decoders run here")
    ours = architecture.supports(config)
    unusual = {
        "quantization": quantization is not None,
        "fused_projections=False": not fused_projections,
        "tensor_parallel_size": world_size > 1,
    }
    if not ours and any(unusual.values()):
        what = next(name for name, asked in unusual.items() if asked)
        raise ModelError(f"{what} cannot be had for {name}: a {config.model_type} runs as transformers does")
    tell(say, f"Loading {name} from {folder}.")
    with _explained(name, folder, to):
        if ours:
            module = build(config, checkpoint.read_tensors(folder), dtype=as_type, folder=folder, say=say)
        else:
            # Imported here because it brings in the modelling code of transformers, which takes two seconds.
            from labkit.models import adapter

            module = adapter.load(folder, dtype=as_type, device=to, say=say)
    seconds = time.perf_counter() - started
    what = quantization or str(as_type).removeprefix("torch.")
    if say:  # the reason is measured
        why = "" if quantization or dtype != "auto" else f" ({auto_reason(to)})"
        say(f"Loaded {name} in {seconds:.1f} s: {what} on {to}{why}.")
    if ignored := not_obeyed(generation):
        tell(say, f"Not obeyed of its generation_config.json: {', '.join(ignored)}.")
    _give_back()
    return LoadedModel(name, module, tokenizer, config, ends, quantization, generation)


def build_transformer(
    config: Config,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
    fused_projections: bool = True,
    packed_weights: bool = True,
    cpu_kernels: bool = True,
    rank: int = 0,
    world_size: int = 1,
    folder: Path | None = None,
    say: Say | None = None,
) -> Transformer:
    """Build our own transformer from a checkpoint, quantised and laid out as the switches say.

    Args:
        config, tensors, dtype, device: what `architecture.build` takes.
        rank, world_size: as in `load_model`.
        folder: the folder that the tensors come from, where there is one: a quantised copy of it is kept.

    Raises:
        ValueError: if the tensors do not fit the configuration.
    """
    if world_size > 1:
        whole = architecture.shape_of(config)
        part = parts(whole, world_size)[rank]
        config, tensors = (
            part_of_config(config, part, whole.head_dim),
            part_of_tensors(tensors, whole, part),
        )
        folder = None  # the quantised copy of a whole model is of no use here
    if quantization:
        module = int8_model(config, tensors, folder, dtype=dtype, device=device, say=say)
    else:
        module = architecture.build(config, tensors, dtype=dtype, device=device)
        if not fused_projections:
            packed_linear.split(module)
        if packed_weights and packed_linear.can_pack(module):
            packed_linear.pack(module)
    possible = cpu_kernels and device.type == "cpu" and dtype in layers.DTYPES
    if possible and (lacking := layers.fuse(module, cache_dir() / "kernels", say)):
        tell(say, f"Without kernels of our own on this CPU, which is slower: {lacking}.")
    return module


def _give_back() -> None:
    """Give what loading has used, some 200 MB, back to the system: glibc would keep it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _explained(name: str, folder: Path, device: torch.device) -> Iterator[None]:
    """Turn what goes wrong while weights are loaded into a `ModelError` that says what it means."""
    try:
        yield
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        raise ModelError(
            f"{name} does not fit into the memory of {device}: its files have {size:.1f} GB"
        ) from error


def _eos_token_ids(
    config: Config, tokenizer: PreTrainedTokenizerBase | NoTokenizer, generation: dict
) -> frozenset[int]:
    """Collect every end: each of the three places may name one, several or none, and they may differ."""
    ids: set[int] = set()
    of_config = getattr(config, "eos_token_id", None)  # not every configuration has the field
    for found in (generation.get("eos_token_id"), of_config, tokenizer.eos_token_id):
        ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(ids)
