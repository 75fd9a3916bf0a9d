"""The folder where the lab keeps what it has fetched or computed once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def keep_compiled() -> None:
    """Have Triton keep what it compiles in this place too, unless `$TRITON_CACHE_DIR` names another."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


def cache_dir() -> Path:
    """Return `$LABKIT_CACHE`, or `labkit` in the place that the operating system has for caches."""
    if chosen := os.environ.get("LABKIT_CACHE"):
        return Path(chosen).expanduser().absolute()
    return system_folder("Caches", "XDG_CACHE_HOME", ".cache") / "labkit"


def system_folder(mac: str, variable: str, usual: str) -> Path:
    """Return a user's folder for one kind of files: `mac` in a Mac's Library, what the variable says on Linux
    or `usual` in the home, and on Windows the one folder for all that stays on the machine.
    """
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / mac
    return Path(os.environ.get(variable) or Path.home() / usual)


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a name to write to. What is there at the end becomes the file: whole, or not at all."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
