"""Loading models: made in memory, or from folders that `save_pretrained` wrote, whole and damaged."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from labkit.core.model import Transformer
from labkit.models import adapter, architecture
from labkit.models.checkpoint import read_tensors
from labkit.models.errors import ModelError
from labkit.models.hub import find
from labkit.models.load import load_model
from labkit.models.tiny import tiny_tokenizer
from tests.conftest import reference
from tests.models.saved_models import edit_json, index_of, shard_of

pytest_plugins = ["tests.models.fixtures"]


def test_tiny_random_loads_at_once_without_network_or_cache(
    no_network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    started = time.process_time()
    model = load_model("tiny-random", say=None)
    assert time.process_time() - started < 0.5
    assert not (tmp_path / "cache").exists()
    assert (model.name, model.dtype, model.device.type) == ("tiny-random", torch.float32, "cpu")
    assert model.eos_token_ids == {model.tokenizer.eos_token_id}
    assert len(model.tokenizer) == model.config.vocab_size
    assert load_model("tiny-random", dtype="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "model",
    [
        "no-such-model",
        "",
        "/nowhere/at/all",
        "a/b/c",
        "../up",
        "nul\0byte",
        "x" * 5000,
        Path("nowhere"),
        Path("o/m"),
    ],
    ids=lambda model: repr(model)[:20],
)
def test_unknown_model_lists_the_short_names(model: str | Path, no_network: None) -> None:
    with pytest.raises(ModelError, match=r"smollm2-135m, tiny-random"):
        load_model(model, say=None)


@pytest.mark.parametrize("model", [None, 7, b"smollm2-135m", ["tiny-random"]])
def test_a_model_is_named_by_a_string_or_a_path(model: object) -> None:
    with pytest.raises(ModelError, match=type(model).__name__):
        load_model(model, say=None)


def test_tiny_random_has_no_folder() -> None:
    with pytest.raises(ModelError, match="made in memory"):
        find("tiny-random")


# --- folders that save_pretrained wrote


def test_loads_sharded_folders_of_each_family(
    family: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    seen: dict[str, torch.Tensor] = {}
    build = architecture.build

    def spy(config: object, tensors: object, **options: object) -> Transformer:
        seen.update(tensors)
        return build(config, seen.items(), **options)

    monkeypatch.setattr(architecture, "build", spy)
    model = load_model(str(saved(family)), say=None)
    expected = reference(family).state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert len(list(saved(family).glob("*.safetensors"))) > 3
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert model.name == f"my-{family}"
    assert model.config.model_type == family
    assert model.tokenizer.decode(model.tokenizer("Hello world").input_ids) == "Hello world"


def test_a_single_file_is_read_too(folder: Path) -> None:
    tensors = dict(read_tensors(folder))
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    save_file(tensors, folder / "model.safetensors")
    again = dict(read_tensors(folder))
    assert again.keys() == tensors.keys()
    assert load_model(folder, dtype="fp16", say=None).dtype == torch.float16


def test_tensors_are_read_lazily(folder: Path) -> None:
    tensors = read_tensors(folder)
    next(tensors)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(b"")  # found out only on arrival there
    with pytest.raises(ModelError, match=last.name):
        list(tensors)


def test_every_way_to_end_is_collected(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_model(folder, say=None).eos_token_ids == {2, 7, 8, 9}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load_model(folder, say=None).eos_token_ids == {2}


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut short": (
        lambda f: (f / "config.json").write_text('{"model'),
        "config.json in .* cannot be used",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "tokenizer cut short": (
        lambda f: (f / "tokenizer.json").write_text('{"ver'),
        "the tokenizer in .* cannot",
    ),
    "only pickles": (only_pickles, "pickled weights"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "no model.safetensors"),
    "shard missing": (lambda f: shard_of(f).unlink(), "lacks 1 of .* files of weights: model-"),
    "shard cut short": (lambda f: os.truncate(shard_of(f), 1000), "model-.* is damaged"),
    "shard of nothing": (lambda f: shard_of(f).write_bytes(b""), "model-.* is damaged"),
    "shard of garbage": (lambda f: shard_of(f).write_bytes(b"<html>" * 500), "model-.* is damaged"),
    "index cut short": (lambda f: index_of(f).write_text('{"weight_map": {"'), "index.json is damaged"),
    "index of another kind": (lambda f: index_of(f).write_text("[]"), "index.json is damaged"),
    "index without a map": (lambda f: index_of(f).write_text("{}"), "index.json is damaged"),
    "index leads out": (
        lambda f: edit_json(index_of(f), lambda i: i["weight_map"].update({"model.norm.weight": "../x"})),
        "leads out of its folder",
    ),
    "index names what is not there": (
        lambda f: edit_json(index_of(f), lambda i: i["weight_map"].update({"model.x": shard_of(f).name})),
        "model-.* is damaged.*model.x",
    ),
    "index lacks a tensor": (
        lambda f: edit_json(index_of(f), lambda i: i["weight_map"].pop("model.norm.weight")),
        "do not fit its config.json: .*missing.*norm.weight",
    ),
    "config of another size": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(intermediate_size=64)),
        "do not fit its config.json: .*shape",
    ),
    "generation config cut short": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder(damage: str, folder: Path, no_network: None) -> None:
    break_it, message = DAMAGE[damage]
    load_model(folder, say=None)  # whole before
    break_it(folder)
    with pytest.raises(ModelError, match=message):
        load_model(folder, say=None)


def test_other_architectures_go_to_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, **options: object) -> None:
        raise ModelError(f"not this one: {folder.name}")

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt")
    monkeypatch.setattr(adapter, "load", refuse)
    with pytest.raises(ModelError, match=r"^not this one: gpt$"):
        load_model(tmp_path / "gpt", say=None)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_never_run(file: str, folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit_json(folder / file, lambda c: c.update(auto_map=auto_map, model_type="evil", tokenizer_class="Evil"))
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(folder, say=None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("not enough memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    ],
)
def test_too_little_memory_is_said_plainly(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(architecture, "build", fail)
    with pytest.raises(ModelError, match=r"does not fit into the memory of cpu: its files have 0.\d GB"):
        load_model(folder, say=None)
    error.args = ("an illegal memory access was encountered",)  # which is something else
    if type(error) is RuntimeError:
        with pytest.raises(type(error), match="an illegal memory access"):
            load_model(folder, say=None)
