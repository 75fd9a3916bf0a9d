"""The output of a request: its tokens, its text, and when they came. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from labkit.trace import latency

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's log-probabilities at one position, before bias, penalties and filters.

    `token` is the chosen token. `top` has the likeliest tokens as (token id, log-probability), best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


PromptLogprobs = list[TokenLogprobs | None]  # token by token; nothing foretells the first


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds on the engine's clock (`time.perf_counter`).

    `labkit.trace.latency` says what each latency means.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    finish_time: float | None = None
    token_times: list[float] = field(default_factory=list)  # one per token; those of a step are equal
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token; None before it has come."""
        return latency.ttft(self.arrival_time, self.token_times)

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies, token by token (`latency.itl`)."""
        return latency.itl(self.token_times)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None before the second."""
        return latency.tpot(self.token_times)

    @property
    def queue_time(self) -> float | None:
        """The time before the first step that worked on the request; None before that step."""
        return latency.queue_time(self.arrival_time, self.first_scheduled_time)

    @property
    def e2e_latency(self) -> float | None:
        """The time from arrival to the end; None before the end."""
        return latency.e2e(self.arrival_time, self.finish_time)


@dataclass
class RequestOutput:
    """What a request has produced so far. It is complete once `finish_reason` is set.

    `text` never ends in half a character, and a complete one has no stop string, unless that was to be kept.
    `error` says what went wrong if `finish_reason` is "error". For n > 1, `index` counts the answers to one
    prompt. `prompt` is the text of the prompt, or None if it came as token ids. `prompt_logprobs`, if asked
    for, has an entry for each of its tokens, and None for the first; the answers to one prompt share it.
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
    prompt: str | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def outputs(self) -> list[RequestOutput]:
        """The answer, as vLLM has it: `output.outputs[0].text`. With n > 1 each answer is an output here."""
        return [self]

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


def in_one_line(error: BaseException) -> str:
    """Return an error as outputs report it: its class, and the first line of its message, shortened."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
