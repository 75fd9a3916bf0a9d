"""What comes back for a request: its tokens, its text, and when they came. No tensors here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, as the model gives them: before bias, penalties and filters.

    `token` is the chosen one; `top` holds the likeliest (token id, log-probability), best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class RequestMetrics:
    """Moments in the life of a request, in seconds on the engine's clock (`time.perf_counter`)."""

    arrival_time: float
    first_scheduled_time: float | None = None
    finish_time: float | None = None
    token_times: list[float] = field(default_factory=list)  # when each generated token came out
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, from arrival."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between one token and the next."""
        return [b - a for a, b in itertools.pairwise(self.token_times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: decode time / (n - 1)."""
        gaps = self.itl
        return sum(gaps) / len(gaps) if gaps else None

    @property
    def queue_time(self) -> float | None:
        """Time spent waiting before the first step that worked on the request."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def e2e_latency(self) -> float | None:
        return None if self.finish_time is None else self.finish_time - self.arrival_time


@dataclass
class RequestOutput:
    """What a request has produced so far; complete once `finish_reason` is set.

    `text` never ends in half a character and, once finished, holds no stop string. `error` says what went
    wrong when `finish_reason` is "error". For n > 1, `index` counts the answers of one prompt.
    """

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    metrics: RequestMetrics
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    index: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
