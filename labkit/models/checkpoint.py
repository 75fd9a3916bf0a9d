"""The files of a model's folder: which must be there, what they hold, and whether they are whole.

Weights are read from `safetensors` alone, never from pickles, and no code that lies in the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from labkit.models.errors import DamagedError, ModelError, first_line

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_folder(folder: Path) -> Path:
    """Return the folder if it has all the files of a model.

    Raises:
        ModelError: if a file is missing; the message names it.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json")
    _shards(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): save one there too")
    return folder


def check_whole(folder: Path) -> Path:
    """Return the folder if it has all the files of a model and none is cut short. Takes milliseconds.

    Raises:
        ModelError: if a file is missing.
        DamagedError: if one is cut short.
    """
    check_folder(folder)
    for name in JSON_FILES:
        if (folder / name).is_file():
            _read_json(folder / name)
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


def read_config(folder: Path) -> PreTrainedConfig:
    """Read `config.json`. Raises `ModelError` if it cannot be used."""
    return _read(AutoConfig, folder, "config.json")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer, with its chat template. Raises `ModelError` if it cannot be used."""
    return _read(AutoTokenizer, folder, "the tokenizer")


def read_generation_config(folder: Path) -> dict:
    """Read `generation_config.json`, which a model need not have. Raises `DamagedError`."""
    file = folder / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


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
        raise ModelError(f"{folder} has no model.safetensors and no {index.name}")
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


def _read(kind: type, folder: Path, what: str) -> PreTrainedConfig | PreTrainedTokenizerBase:
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file can come out as any kind of error
        raise ModelError(f"{what} in {folder} cannot be used: {first_line(error)}") from error


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file} is damaged or cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file} is damaged: it holds no JSON object")
    return content
