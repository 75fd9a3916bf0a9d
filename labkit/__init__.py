"""labkit: a teaching lab round a real LLM inference engine.

Names are imported when they are first used: a trace can be read and drawn without torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.config import EngineConfig
    from labkit.engine import Engine
    from labkit.exercises import check
    from labkit.exercises.progress import progress
    from labkit.llm import LLM
    from labkit.notebook import setup
    from labkit.notebook.live_view import lab
    from labkit.sampling_params import SamplingParams
    from labkit.trace.trace import Trace
    from labkit.views.run_page import export_html

    __version__: str

__all__ = [
    "LLM",
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "Trace",
    "check",
    "export_html",
    "lab",
    "progress",
    "setup",
]

_HOMES = {
    "LLM": "labkit.llm",
    "Engine": "labkit.engine",
    "EngineConfig": "labkit.config",
    "SamplingParams": "labkit.sampling_params",
    "Trace": "labkit.trace.trace",
    "check": "labkit.exercises",
    "export_html": "labkit.views.run_page",
    "lab": "labkit.notebook.live_view",
    "progress": "labkit.exercises.progress",
    "setup": "labkit.notebook",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    own = (name for name, value in globals().items() if name.startswith("__") or _is_part(value))
    return sorted({*own, *_HOMES, "__version__"})


def _is_part(value: object) -> bool:
    """Return whether a value is a module of this package: one that somebody has imported."""
    return getattr(value, "__name__", "").startswith(f"{__name__}.")


def _version() -> str:
    """Return the version that is installed, or that of the source where nothing is installed."""
    from importlib import metadata

    try:
        return metadata.version("labkit")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        lines = project.read_text(encoding="utf-8").splitlines() if project.is_file() else []
        versions = (line.partition("=")[2] for line in lines if line.partition("=")[0].strip() == "version")
        return next(versions, "unknown").strip(' "')
