"""What a person asks for, how it lives in the engine, and what comes back. No tensors here.

A request is a list of tokens and one number, `num_computed_tokens`: how many of them have their keys and
values in the cache. Everything the scheduler does follows from the distance between the two.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
Status = Literal["waiting", "running", "finished"]

MAX_LOGPROBS = 20
MAX_N = 64
MIN_TEMPERATURE = 1e-3  # below, the quotients leave the range of fp32


def check_number(field_name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Raise `ValueError` naming the field and the limit unless `low <= value <= high`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:  # NaN
        wanted = "a whole number" if whole else "a number"
        raise ValueError(f"{field_name} must be {wanted}, not {value!r}")
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{field_name} must be {limits}, not {value!r}")


def check_flag(field_name: str, value: object) -> None:
    """Raise `ValueError` naming the field unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{field_name} must be True or False, not {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How to pick the next token, and when to stop.

    Args:
        max_tokens: how many tokens to generate at most.
        temperature: 0 picks the likeliest token (greedy); higher values flatten the distribution.
        top_k: keep the k likeliest tokens (0: all).
        top_p: keep the smallest set of likeliest tokens whose probability reaches p.
        min_p: drop tokens less likely than min_p times the likeliest.
        repetition_penalty: divide (if positive, else multiply) the logits of tokens seen in prompt or answer.
        presence_penalty: subtract once for each token already in the answer.
        frequency_penalty: subtract for each time that a token occurs in the answer.
        stop: strings that end the answer; they are cut from the text.
        stop_token_ids: token ids that end the answer.
        ignore_eos: go on after the end-of-sequence token.
        seed: fixes the sampling noise. Without one, the engine draws one when the request is added.
        n: how many answers to generate for the prompt.
        logprobs: report the chosen token's log-probability and this many of the likeliest (None: none).
        logit_bias: added to the logits of these token ids before anything else.

    Raises:
        ValueError: for a value outside its limits; the message names the field and the limit.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        check_number("max_tokens", self.max_tokens, 1, math.inf, whole=True)
        check_number("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 (greedy) or between {MIN_TEMPERATURE} and 100, not {self.temperature}"
            )
        check_number("top_k", self.top_k, 0, math.inf, whole=True)
        check_number("top_p", self.top_p, 1e-6, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("n", self.n, 1, MAX_N, whole=True)
        if self.seed is not None:
            check_number("seed", self.seed, -(2**63), 2**63 - 1, whole=True)
        if self.logprobs is not None:
            check_number("logprobs", self.logprobs, 0, MAX_LOGPROBS, whole=True)
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 needs temperature > 0: greedy answers would all be the same")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        check_flag("ignore_eos", self.ignore_eos)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers, not {self.logit_bias!r}")
            bias = dict(self.logit_bias)
            _token_ids("logit_bias", list(bias))
            for token, value in bias.items():
                check_number(f"logit_bias[{token}]", value, -100, 100)
            object.__setattr__(self, "logit_bias", bias)


def _tuple(field_name: str, value: object) -> tuple:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ValueError(f"{field_name} must be a list, not {value!r}")
    return tuple(value)


def _strings(field_name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _tuple(field_name, value)
    if any(not isinstance(text, str) or not text for text in strings):
        raise ValueError(f"{field_name} must be one or more strings that are not empty, not {value!r}")
    return strings


def _token_ids(field_name: str, value: object) -> tuple[int, ...]:
    ids = _tuple(field_name, value)
    for token in ids:
        check_number(field_name, token, 0, math.inf, whole=True)
    return ids


def answer_ids(request_id: str, n: int) -> list[str]:
    """The ids of the `n` answers to one request: "7", "7.1", "7.2"."""
    return [request_id, *(f"{request_id}.{index}" for index in range(1, n))]


class Request:
    """One answer being made: what the scheduler moves and the runner computes.

    `token_ids` is the prompt followed by what was generated. Tokens `[0, num_computed_tokens)` have their
    keys and values in the cache; `[num_computed_tokens, len(token_ids))` are still to be computed. Prefill,
    a chunk of it, decode, and the return after a preemption differ in nothing but that distance.
    """

    __slots__ = (
        "arrival",
        "children",
        "drafts",
        "error",
        "finish_reason",
        "max_len",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_slots",
        "params",
        "priority",
        "request_id",
        "seed",
        "shares_tail",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        seed: int = 0,
        max_len: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.request_id = request_id
        self.token_ids: list[int] = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.priority = priority
        self.seed = seed
        self.max_len = max_len or self.num_prompt_tokens + params.max_tokens  # length at which it ends
        self.stop_ids = stop_ids  # eos (unless ignored) and stop_token_ids
        self.arrival = 0  # place in the order of arrival, set by the scheduler
        self.status: Status = "waiting"
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # found in the prefix cache at the latest admission
        self.num_slots = 0  # pages held, in tokens
        self.shares_tail = False  # its last page may be shared with the other answers of n > 1
        self.drafts: tuple[int, ...] = ()  # guesses of what comes next, for the next step to check
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.children: list[Request] = []  # the other answers of n > 1, until the prompt is computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def ahead(self, tokens: Sequence[int]) -> Request:
        """This request as it would be if these tokens came next."""
        twin = copy.copy(self)
        twin.token_ids = [*self.token_ids, *tokens]
        return twin

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status}, computed {self.num_computed_tokens} of "
            f"{len(self.token_ids)} tokens, prompt {self.num_prompt_tokens})"
        )


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
