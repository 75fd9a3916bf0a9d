"""labkit: a teaching lab round a real LLM inference engine."""

from labkit.config import EngineConfig
from labkit.engine import LLM, Engine
from labkit.request import SamplingParams
from labkit.trace import Trace

__all__ = ["LLM", "Engine", "EngineConfig", "SamplingParams", "Trace"]
