"""The files of a folder that `save_pretrained` wrote in many shards, to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def shard_of(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"
