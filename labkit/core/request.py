"""A request in the engine: a list of tokens, and how many of them are computed. No tensors here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from labkit.outputs import FinishReason, PromptLogprobs, in_one_line
from labkit.sampling_params import SamplingParams

Status = Literal["waiting", "running", "finished"]


class TokenReader(Protocol):
    """Turns the tokens of an answer into text as they come, and knows where a stop string ends it."""

    text: str  # what may be shown so far

    def push(self, token: int) -> bool: ...  # take the next token; True if it completes a stop string

    def finish(self) -> bool: ...  # no more tokens will come: release the text held back


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """One answer that is being generated: the scheduler plans it, and the model runner computes it.

    `token_ids` is the prompt followed by the answer so far. Tokens `[0, num_computed_tokens)` have their keys
    and values in the cache; `[num_computed_tokens, len(token_ids))` are still to be computed. Prefill, a
    chunk of it, decode, and the return after a preemption differ only in that distance.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first
    seed: int = 0
    max_len: int = 0  # the most tokens of prompt and answer; 0: as max_tokens allows
    stop_ids: frozenset[int] = frozenset()  # the end of sequence, unless it is ignored, and stop_token_ids
    prompt: str | None = None  # its text, if it came as text
    reader: TokenReader | None = None
    form: Any = None  # what its answer must be like: an `AnswerForm` of `labkit.structured`
    arrival: int = 0  # its place in the order of arrival, which the scheduler sets
    status: Status = "waiting"
    error: str | None = None
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # found in the prefix cache when it was last admitted
    capacity: int = 0  # how many tokens its blocks have room for
    family: str = ""  # the id of the first of the n answers to the prompt
    children: list[Request] = field(default_factory=list)  # the other answers, until the prompt is computed
    shares_tail: bool = False  # whether the n answers may still share the block in which they begin
    drafts: tuple[int, ...] = ()  # tokens that may come next; the next step checks them
    prompt_logprobs: PromptLogprobs = field(default_factory=lambda: [None])  # as far as asked for and known

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)  # it grows, and the caller's list does not
        self.num_prompt_tokens = len(self.token_ids)
        self.max_len = self.max_len or self.num_prompt_tokens + self.params.max_tokens
        self.family = self.family or self.request_id

    @property
    def output_token_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token: int) -> FinishReason | None:
        """Append the next token of the answer; return why the request ends with it, or None."""
        self.token_ids.append(token)
        try:  # the reader sees every token, a stop token too: it skips those that are no text
            ends = [part.push(token) for part in (self.form, self.reader) if part is not None]
        except Exception as error:  # no other request shall suffer
            self.error = in_one_line(error)
            return "error"
        if any(ends) or token in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_len else None

    def ahead(self, tokens: Sequence[int]) -> Request:
        """Return a copy of this request, as it would be if these tokens came next."""
        twin = copy.copy(self)
        twin.token_ids = [*self.token_ids, *tokens]
        return twin

    def __repr__(self) -> str:
        done = f"computed {self.num_computed_tokens} of {len(self.token_ids)} tokens"
        return f"Request({self.request_id!r}, {self.status}, {done}, prompt {self.num_prompt_tokens})"
