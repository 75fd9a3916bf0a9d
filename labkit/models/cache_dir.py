"""The folder where the lab keeps what it has fetched or computed once."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def keep_compiled() -> None:
    """Have Triton keep what it compiles in this place too, unless `$TRITON_CACHE_DIR` names another."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


def cache_dir() -> Path:
    """Return `$LABKIT_CACHE`, or `labkit` in the place that the operating system has for caches."""
    if chosen := os.environ.get("LABKIT_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "labkit"
