"""What goes from the scheduler to the model runner, and what comes back. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from labkit.core.request import Request
from labkit.outputs import TokenLogprobs
from labkit.trace.records import Admission, Arrival, Blocks, Copy, Finish, Priority


@dataclass(slots=True)
class StepPlan:
    """One step: row i computes `num_tokens[i]` tokens of `requests[i]`, from position `starts[i]` on.

    A row that computes the last known token of its request samples the next one. `kinds` names the work of
    each row in one letter (see `StepRecord`). Only the trace uses it.
    """

    requests: list[Request] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)  # from here on, what the trace records
    preempted: list[Blocks] = field(default_factory=list)
    taken: list[Blocks] = field(default_factory=list)
    blocked: tuple[str, str] | None = None  # the head of the queue, and why it waits
    failed: dict[str, str] = field(default_factory=dict)  # requests that got no block, and why they ended
    # Static batches only: how much padding each row computes beside its tokens, and the number of idle seats.
    padding: list[int] = field(default_factory=list)
    num_idle: int = 0
    # n > 1: a child's row maps to its parent's, whose logits it samples from. Blocks are copied first.
    forks: dict[int, int] = field(default_factory=dict)
    copied: list[Copy] = field(default_factory=list)
    # The drafts of a row are counted in its `num_tokens`. The row samples after its last known token, and
    # after each draft. `held_back` says why there are not more drafts.
    drafts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    held_back: str = ""

    def add(self, request: Request, num_tokens: int) -> None:
        """Add a row that computes the next `num_tokens` tokens of a request."""
        start, known = request.num_computed_tokens, len(request.token_ids)
        if start >= request.num_prompt_tokens and known - start == 1 == num_tokens:
            kind = "d"  # decode
        elif start == request.num_cached_tokens and num_tokens == known - start:
            kind = "p"  # prefill, in one piece
        else:
            kind = "c" if num_tokens else "i"  # a chunk, or an idle seat
        self.requests.append(request)
        self.kinds.append(kind)
        self.starts.append(start)
        self.num_tokens.append(num_tokens)

    def draft(self, row: int, drafts: tuple[int, ...]) -> None:
        """Let a row that computes all its known tokens check these drafts, too."""
        self.drafts[row] = drafts
        self.num_tokens[row] += len(drafts)


@dataclass(slots=True)
class StepResult:
    """What the model runner computed from a plan, row by row."""

    # New tokens: none after a chunk that is not the last; else accepted drafts and the token after them.
    sampled: list[tuple[int, ...]]
    logprobs: list[tuple[TokenLogprobs, ...]] = field(default_factory=list)  # empty, or one entry per row
    errors: dict[int, str] = field(default_factory=dict)  # rows that failed, and what went wrong
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # what each row adds
    traffic: dict[str, Any] = field(default_factory=dict)  # with other processes, as fields of `StepRecord`


@dataclass(slots=True)
class Changes:
    """What happened to requests since the last record. Only rejected drafts needed `returned` blocks."""

    arrived: list[Arrival] = field(default_factory=list)
    reprioritised: list[Priority] = field(default_factory=list)
    finished: list[Finish] = field(default_factory=list)
    returned: list[Blocks] = field(default_factory=list)
    threads: int = 0  # of the CPU, where their number has changed
