"""Compile `ops.cpp` and its header once for this machine, and load it as `torch.ops.labkit_cpu`.

The compiler is called directly, and not through `torch.utils.cpp_extension`: that needs ninja and Python's
headers, which many machines with a compiler lack, and a build that was killed there leaves a lock for which
later ones wait.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("ops.cpp", "vectors.h"))
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300  # that a compiler may take
# What ATen's own kernels are compiled with, for what it finds on this CPU.
_VECTORS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
_LOCK = threading.Lock()  # whoever comes first loads them, once for the process


def why_not(folder: Path, say: Callable[[str], None] | None = None) -> str | None:
    """Load the operations, after compiling them if need be. Return why that cannot be done, or None.

    Args:
        folder: the folder where what was compiled is kept.
        say: a function that gets a line before the compiler runs, which takes some 15 seconds.
    """
    with _LOCK:
        return None if is_loaded() else _load(folder, say)


def is_loaded() -> bool:
    """Whether this process has the operations. They cannot be loaded twice."""
    return hasattr(torch.ops.labkit_cpu, "paged_attention")


@functools.cache
def _load(folder: Path, say: Callable[[str], None] | None) -> str | None:
    if sys.platform != "linux":
        return f"they are made for Linux, not {sys.platform}"
    library = library_path(folder)
    try:
        if not library.is_file():
            _compile(library, say)
        torch.ops.load_library(library)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error).strip().splitlines()[-1]
    return None


def library_path(folder: Path) -> Path:
    """Return where the compiled operations are; the name changes with all that they depend on."""
    facts = (_SOURCE.read_bytes(), _HEADER.read_bytes(), torch.__version__, platform.machine(), *_flags())
    return folder / f"labkit_cpu_{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"


def _flags() -> list[str]:
    level = torch.backends.cpu.get_cpu_capability()
    vectors = _VECTORS.get(level, [])
    defines = [f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"] if vectors else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", abi, *vectors, *defines]


def _compile(library: Path, say: Callable[[str], None] | None) -> None:
    """Compile the operations. Raise OSError or SubprocessError, whose last line says why it failed."""
    chosen = os.environ.get("CXX")
    compiler = shutil.which(chosen) if chosen else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"there is no C++ compiler ({chosen or ', '.join(_COMPILERS)})")
    if say:
        say("Compiling the kernels for this CPU, once.")
    home = Path(torch.__file__).parent
    headers = [f"-I{home / part}" for part in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as room:  # so that nobody loads half of it
        made = Path(room) / library.name
        command = [compiler, *_flags(), *headers, str(_SOURCE), "-o", str(made), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
            raise OSError(f"{compiler} failed: {lines[0]}")
        made.replace(library)
