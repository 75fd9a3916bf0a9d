"""labkit: a teaching lab round a real LLM inference engine.

Names are imported when they are first used: a trace can be read and drawn without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.config import EngineConfig
    from labkit.engine import Engine
    from labkit.exercises import check
    from labkit.llm import LLM
    from labkit.notebook import setup
    from labkit.notebook.live_view import lab
    from labkit.sampling_params import SamplingParams
    from labkit.trace.trace import Trace

__all__ = ["LLM", "Engine", "EngineConfig", "SamplingParams", "Trace", "check", "lab", "setup"]

_HOMES = {
    "LLM": "labkit.llm",
    "Engine": "labkit.engine",
    "EngineConfig": "labkit.config",
    "SamplingParams": "labkit.sampling_params",
    "Trace": "labkit.trace.trace",
    "check": "labkit.exercises",
    "lab": "labkit.notebook.live_view",
    "setup": "labkit.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
