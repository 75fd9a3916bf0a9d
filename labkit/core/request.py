"""A request in the engine: a list of tokens, and how many of them are computed. No tensors here.

`num_computed_tokens` counts the tokens whose keys and values are in the cache. Everything the scheduler does
follows from the distance between it and the number of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

from labkit.outputs import FinishReason
from labkit.sampling_params import SamplingParams

Status = Literal["waiting", "running", "finished"]


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
