"""What the two processes tell each other over pipes. No tensors here.

Pickles are safe there: the pipes are private, and both ends are this program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labkit.trace.records import OtherPool


@dataclass
class Load:
    """Make an engine that computes prompts."""

    config: dict[str, Any]  # the arguments of `EngineConfig`


@dataclass
class Prompt:
    """Compute a prompt."""

    request_id: str
    token_ids: list[int]
    priority: int


@dataclass
class Forget:
    """A prompt is no longer needed."""

    request_id: str


@dataclass
class Progress:
    """What the engine that computes prompts holds in a step."""

    pool: OtherPool


@dataclass
class Leaving:
    """A prompt is computed, and its pages come next."""

    request_id: str
    num_bytes: int


@dataclass
class Computed:
    """A prompt's pages, or why there are none."""

    request_id: str
    pages: bytes
    seconds: float  # that the prompt took, from its first step to the last
    error: str = ""
