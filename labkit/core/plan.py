"""What goes from the scheduler to the runner, and what comes back. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field

from labkit.core.request import Request
from labkit.outputs import TokenLogprobs
from labkit.trace.records import Admission, Blocks, Copy


@dataclass(slots=True)
class StepPlan:
    """One step: row i computes `num_tokens[i]` tokens of `requests[i]`, from `starts[i]` on.

    A row that reaches the end of what its request knows samples the next token. `kinds` says in one letter
    what that amounts to (see `StepRecord`); it is written for the trace, nothing is decided by it.
    `padding` (empty, or one number per row) counts wasted rows that a static batch computes as well.
    `forks` maps a row to the row whose logits it samples from: children of n > 1 start with their parent's
    last prompt token. `drafts` maps a row to guesses of what comes next, counted in its `num_tokens`: it
    samples after the last token known and after each guess, as long as these are right; `held_back` says why
    there are no more of them. `copied` pages are copied before the forward pass. `failed` says of requests
    that got no page why they have ended.
    """

    requests: list[Request] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    padding: list[int] = field(default_factory=list)
    forks: dict[int, int] = field(default_factory=dict)
    drafts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    held_back: str = ""
    admitted: list[Admission] = field(default_factory=list)
    preempted: list[Blocks] = field(default_factory=list)
    taken: list[Blocks] = field(default_factory=list)
    copied: list[Copy] = field(default_factory=list)
    blocked: tuple[str, str] | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, request: Request, num_tokens: int) -> None:
        start, known = request.num_computed_tokens, len(request.token_ids)
        if start >= request.num_prompt_tokens and known - start == 1 == num_tokens:
            kind = "d"
        elif start == request.num_cached_tokens and num_tokens == known - start:
            kind = "p"
        else:
            kind = "c" if num_tokens else "i"
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
    """What the runner made of a plan, row by row: the tokens sampled (none for a chunk that is not the last).

    For a row with drafts these are the drafts that were right, and the token after them.

    `logprobs` is empty or has one entry per row; `errors` maps rows that failed to what went wrong;
    `stopped` holds the rows whose text has reached a stop string.
    """

    sampled: list[tuple[int, ...]]
    logprobs: list[tuple[TokenLogprobs, ...]] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
