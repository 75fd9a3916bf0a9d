"""The files of a model's folder: which must be there, what they hold, and whether they are whole.

Weights are read from `safetensors` alone, never from pickles, and no code that lies in the folder is run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from labkit.models.errors import DamagedError, ModelError, first_line
from labkit.models.no_tokenizer import NoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Config: TypeAlias = "PreTrainedConfig | SimpleNamespace"  # what `read_config` returns

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_FORMATS = {
    **{".gguf": "GGUF", ".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax", ".npz": "NumPy"},
    **{".safetensors": "safetensors under other names"},
}
# Files in which tools for quantising say what they did, beside `quantization_config` in config.json.
QUANTISERS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
UNPACKED = ("mxfp4",)  # what transformers turns back into plain weights by itself

FROM_FILES: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)

# What a `config.json` must say, and in which type, to be understood without `transformers`.
EXPLICIT: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), int),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), bool),
    **{"rms_norm_eps": float, "hidden_act": str, "rope_parameters": dict, "eos_token_id": (int, list)},
}


def check_folder(folder: Path) -> Path:
    """Return the folder if it has all that a model needs. A tokenizer it can do without.

    Raises:
        ModelError: if a file is missing or stands for another; the message names it.
    """
    for file in sorted(folder.iterdir()):
        if _is_pointer(file):
            raise ModelError(f"{file} is a pointer of git-lfs, not the file itself: run `git lfs pull` there")
    if (folder / "adapter_config.json").is_file():  # beside a whole model, too: its answers would be others
        raise ModelError(f"{folder} has a LoRA adapter: merge it into its model, and save that alone")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json{_formats(folder)}")
    _shards(folder)
    if (folder / "tokenizer_config.json").is_file():
        _check_tokenizer(folder)
    return folder


def _check_tokenizer(folder: Path) -> None:
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): save one there too")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _is_pointer(file: Path) -> bool:
    """Return whether a file is what git leaves in the place of a large one that was not fetched."""
    if not file.is_file() or file.stat().st_size > 1024:  # a pointer has three short lines
        return False
    return file.read_bytes().startswith(b"version https://git-lfs")


def _formats(folder: Path) -> str:
    """Say which formats of weights are in a folder that are not read, or nothing."""
    others = [file for file in folder.iterdir() if not file.match("model*.safetensors")]
    found = {OTHER_FORMATS[file.suffix] for file in others if file.suffix in OTHER_FORMATS}
    if not found:
        return ""
    return f"; it has {', '.join(sorted(found))}, and only what save_pretrained writes is read"


def check_whole(folder: Path) -> Path:
    """Return the folder if it has all files of a model, a tokenizer too, and none is cut short.

    This takes milliseconds.

    Raises:
        ModelError: if a file is missing.
        DamagedError: if one is cut short.
    """
    check_folder(folder)
    _check_tokenizer(folder)
    for name in JSON_FILES:
        _read_if_there(folder / name)
    for _ in read_tensors(folder):  # compares each file's size with its header, and reads no values
        pass
    return folder


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the values of each tensor, file by file.

    A tensor is a view into the mapped file, on the CPU, in the dtype that it was saved in: the disk is read
    only where values are used.

    Raises:
        ModelError: if a file is missing.
        DamagedError: if a file is cut short or does not hold what the index says.
    """
    for file, names in _shards(folder).items():
        try:
            with safe_open(folder / file, framework="pt", device="cpu") as shard:
                for name in names or shard.keys():
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{folder / file} is damaged or cannot be read: {error}") from error


def read_config(folder: Path) -> Config:
    """Read `config.json`.

    `transformers` knows what a file leaves out and what older files mean, but importing its configurations
    takes a second. So the file of a Llama that says everything itself, as recent ones do, is taken as it is.

    Raises:
        ModelError: if it cannot be used.
    """
    with _usable("config.json", folder):
        config = _read_json(folder / "config.json")
    _check_unquantised(folder, config)
    with _usable("config.json", folder):
        if _is_explicit(config):
            return SimpleNamespace(**config)
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, **FROM_FILES)


def _check_unquantised(folder: Path, config: dict) -> None:
    """Raise `ModelError` if a model was saved quantised: we quantise plain weights ourselves."""
    keys = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
    said: dict | None = next((config[key] for key in keys if isinstance(config.get(key), dict)), None)
    how = next((how for name, how in QUANTISERS.items() if (folder / name).is_file()), None)
    if said:
        how = said.get("quant_method", "by an unknown method")
    if how and how not in UNPACKED:
        raise ModelError(
            f"the weights in {folder} are quantised ({how}), and labkit reads plain ones alone: "
            'take the model that they were made from, and quantization="int8" if it is to be small'
        )


def _is_explicit(config: dict) -> bool:
    """Whether a configuration is a Llama's and says all that we need, with plain rotary positions."""
    if config.get("model_type") != "llama" or config.get("rope_scaling"):  # which would count more
        return False
    if not all(isinstance(config.get(name), kind) for name, kind in EXPLICIT.items()):
        return False
    rope = config["rope_parameters"]
    return rope.get("rope_type") == "default" and isinstance(rope.get("rope_theta"), float)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | NoTokenizer:
    """Read the tokenizer, with its chat template. Raises `ModelError` if it cannot be used."""
    if not has_tokenizer(folder):
        return NoTokenizer()
    with _usable("the tokenizer", folder):
        named = _read_if_there(folder / "tokenizer_config.json").get("tokenizer_class")
        if named == "TokenizersBackend":  # the class that takes tokenizer.json as it is
            return PreTrainedTokenizerFast.from_pretrained(folder, **FROM_FILES)
        from transformers import AutoTokenizer  # here, because it imports the configurations, too

        return AutoTokenizer.from_pretrained(folder, **FROM_FILES)


def read_generation_config(folder: Path) -> dict:
    """Read `generation_config.json`, which a model need not have. Raises `DamagedError`."""
    return _read_if_there(folder / "generation_config.json")


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Return the files of weights and the tensors to take from each (None: all of them).

    Raises:
        ModelError: if one is missing.
    """
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if any(file.suffix in PICKLES for file in folder.iterdir()):
            raise ModelError(
                f"{folder} has only pickled weights (.bin, .pt), which can hold code and are never read; "
                "save the model as safetensors"
            )
        raise ModelError(f"{folder} has no model.safetensors and no {index.name}{_formats(folder)}")
    homes = _read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise DamagedError(f"{index} is damaged: it does not say which file holds which tensor")
    shards: dict[str, list[str] | None] = {}
    for tensor, file in homes.items():
        if Path(str(file)).name != file:
            raise ModelError(f"{index} leads out of its folder, to {file!r}")
        shards.setdefault(file, []).append(tensor)
    missing = [file for file in shards if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} files of weights: {missing[0]} ...")
    return shards


@contextlib.contextmanager
def _usable(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can come out as any kind of error
        raise ModelError(f"{what} in {folder} cannot be used: {first_line(error)}") from error


def _read_if_there(file: Path) -> dict:
    return _read_json(file) if file.is_file() else {}


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file} is damaged or cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file} is damaged: it holds no JSON object")
    return content
