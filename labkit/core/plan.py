"""What goes from the scheduler to the model runner, and what comes back. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field

from labkit.core.request import Request
from labkit.outputs import TokenLogprobs
from labkit.trace.records import Admission, Arrival, Blocks, Copy, Finish, Priority


@dataclass(slots=True)
class StepPlan:
    """One step: row i computes `num_tokens[i]` tokens of `requests[i]`, from `starts[i]` on.

    A row that reaches the end of what its request knows samples the next token. `kinds` says in one letter
    what that amounts to (see `StepRecord`); it is written for the trace, and nothing is decided by it.
    """

    requests: list[Request] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    # What the scheduler did on the way, for the trace.
    admitted: list[Admission] = field(default_factory=list)
    preempted: list[Blocks] = field(default_factory=list)
    taken: list[Blocks] = field(default_factory=list)
    blocked: tuple[str, str] | None = None  # the head of the queue, and why it waits
    failed: dict[str, str] = field(default_factory=dict)  # requests that got no block, and why they ended
    # A static batch: the wasted rows that each row's seat computes as well, and the seats that are idle.
    padding: list[int] = field(default_factory=list)
    num_idle: int = 0
    # n > 1: a child maps to the row whose last token it samples from; blocks to copy before the step.
    forks: dict[int, int] = field(default_factory=dict)
    copied: list[Copy] = field(default_factory=list)
    # Drafts of a row are guesses of what comes next, counted in its `num_tokens`. The row samples after the
    # last token that it knows, and after each guess. `held_back` says why there are no more of them.
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
        """Let a row that computes all it knows check these tokens, too."""
        self.drafts[row] = drafts
        self.num_tokens[row] += len(drafts)


@dataclass(slots=True)
class StepResult:
    """What the model runner made of a plan, row by row."""

    # The new tokens: none for a chunk that is not the last; drafts that were right, and the token after them.
    sampled: list[tuple[int, ...]]
    logprobs: list[tuple[TokenLogprobs, ...]] = field(default_factory=list)  # empty, or one entry per row
    errors: dict[int, str] = field(default_factory=dict)  # rows that failed, and what went wrong


@dataclass(slots=True)
class Changes:
    """Who came, changed and went since the last record. `returned` blocks were taken for wrong drafts."""

    arrived: list[Arrival] = field(default_factory=list)
    reprioritised: list[Priority] = field(default_factory=list)
    finished: list[Finish] = field(default_factory=list)
    returned: list[Blocks] = field(default_factory=list)
