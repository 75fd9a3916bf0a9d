"""One immutable record per step: what ran, who waited and why, whose blocks changed. No tensors here.

Every picture, check and export reads this and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = {"p": "prefill", "c": "chunk", "d": "decode", "i": "idle"}
# Where a request is whose prompt another engine computes, until it arrives here.
PLACES = {
    "unsent": "waits here for a seat and for room for its pages, before its prompt is sent",
    "there": "has its prompt computed by the prefill engine",
    "arriving": "has its pages on the way here",
}


class TraceError(ValueError):
    """A trace file cannot be read. The message says which line is wrong and why."""


def printable(text: str) -> str:
    """A name or a reason for display, on one line: a terminal obeys what is not printable."""
    return "".join(char if char.isprintable() else "�" for char in text)


class Arrival(NamedTuple):
    """A request joins the queue."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    parent: str = ""  # the request whose prompt must be computed first: one of the answers of n > 1


class Priority(NamedTuple):
    """A request's priority changes (lower runs first)."""

    request_id: str
    priority: int


class Admission(NamedTuple):
    """A request gets a seat. `num_cached_tokens` need not be computed: they lie in the `shared` blocks.

    `num_looked_up` tokens were looked up in the prefix cache: 0 where a fork shares its parent's blocks.
    """

    request_id: str
    num_cached_tokens: int = 0
    shared: tuple[int, ...] = ()
    num_looked_up: int = 0


class Blocks(NamedTuple):
    """Blocks that a request took (appended to its block table) or gave back, in table order."""

    request_id: str
    blocks: tuple[int, ...]


class Copy(NamedTuple):
    """Copy on write: in the request's block table `new` takes the place of the shared block `old`."""

    request_id: str
    old: int
    new: int


class Finish(NamedTuple):
    """A request ends: `reason` is stop, length, abort or error. Its blocks go back to the pool."""

    request_id: str
    reason: str
    blocks: tuple[int, ...]


class Moved(NamedTuple):
    """A request is somewhere else from now on: `place` is one of `PLACES`, until it arrives in this engine.

    `amount` counts the tokens of its prompt or, of one that is arriving, the bytes of its pages.
    """

    request_id: str
    place: str
    amount: int


class Holding(NamedTuple):
    """The blocks of a request in the prefill engine's pool, and how many of its tokens are computed."""

    request_id: str
    num_computed_tokens: int
    blocks: tuple[int, ...]


class OtherPool(NamedTuple):
    """The pool of the engine that computes prompts: what each request held there last.

    A request that has left since the record before is still in it.
    """

    num_blocks: int
    tables: tuple[Holding, ...] = ()


class Row(NamedTuple):
    """What one request did in one step. `kind` is prefill, chunk, decode or idle (a padded seat)."""

    request_id: str
    kind: str
    start: int
    num_tokens: int
    sampled: tuple[int, ...]
    padding: int
    drafted: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()

    @property
    def num_accepted(self) -> int:
        """How many of the drafted tokens were accepted, and so are part of the answer."""
        return max(0, len(self.sampled) - 1) if self.drafted else 0

    @property
    def num_forced(self) -> int:
        """How many of the sampled tokens were the only ones that the form of the answer allowed."""
        return self.allowed.count(1)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine.

    From `requests` to `allowed`, the columns have one entry per request that ran; `padding`, `drafted` and
    `allowed` are empty where no request has any.

    - `kinds` has one letter per request: p, the whole prompt (or all that was missing of it); c, a chunk of
      the prompt; d, decode; i, an idle seat of a static batch.
    - `starts` says how many tokens were computed before the step.
    - `sampled` holds the new tokens. All but the last are accepted drafts.
    - `padding` counts slots that were computed for nothing, in a static batch.
    - `drafted` holds the tokens that were guessed and verified in this step; `held_back` says why there were
      not more.
    - `allowed` says, for each sampled token of an answer that has a form, how many tokens the form allowed in
      its place: 1 where it forced one. It is empty for a row without a form, and where no row has one.
    - `waiting` counts the queue after the step was planned; `blocked` names its head and why it waits.
    - `free_blocks` counts after the step, when the requests that finished in it have given theirs back.
    - `published` blocks can be found by later requests from now on, `evicted` ones no longer can. Of those
      published, the contents of `restored` ones were not computed: they had been evicted, and came back.
    - `returned` blocks were taken for rejected drafts: they leave their block tables after the step.
    - `sent_in_layers` and `sent_elsewhere` count the bytes that each process of a parallel model sent to the
      others, and `sending` the seconds that this took the first of them, with waiting for the others.
    - `moved` says which requests went where, before they arrive here, and `other_pool` what the engine that
      computes their prompts holds (None: what it held before, if there is one).
    - `time` is when the step ended, in seconds since the trace began, and `seconds` how long it took.
      `threads` is the number of a CPU's threads from this step on, where it follows what other processes
      leave and has just changed; else 0. Only these three and `sending` differ from run to run, so they do
      not count when records are compared.
    """

    step: int
    requests: tuple[str, ...] = ()
    kinds: str = ""
    starts: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    sampled: tuple[tuple[int, ...], ...] = ()
    padding: tuple[int, ...] = ()
    drafted: tuple[tuple[int, ...], ...] = ()
    allowed: tuple[tuple[int, ...], ...] = ()
    arrived: tuple[Arrival, ...] = ()
    reprioritised: tuple[Priority, ...] = ()
    admitted: tuple[Admission, ...] = ()
    preempted: tuple[Blocks, ...] = ()
    taken: tuple[Blocks, ...] = ()
    copied: tuple[Copy, ...] = ()
    finished: tuple[Finish, ...] = ()
    returned: tuple[Blocks, ...] = ()
    published: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    restored: tuple[int, ...] = ()
    waiting: int = 0
    blocked: tuple[str, str] | None = None
    held_back: str = ""
    free_blocks: int = 0
    sent_in_layers: int = 0
    sent_elsewhere: int = 0
    sending: float = field(default=0.0, compare=False)
    moved: tuple[Moved, ...] = ()
    other_pool: OtherPool | None = None
    time: float = field(default=0.0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    threads: int = field(default=0, compare=False)

    @property
    def rows(self) -> list[Row]:
        """One `Row` per request that ran, in batch order."""
        padding = self.padding or (0,) * len(self.requests)
        drafted = self.drafted or ((),) * len(self.requests)
        allowed = self.allowed or ((),) * len(self.requests)
        columns = (self.requests, self.kinds, self.starts, self.num_tokens, self.sampled)
        rows = zip(*columns, padding, drafted, allowed, strict=True)
        return [Row(r, KINDS[k], *rest) for r, k, *rest in rows]

    @property
    def total_tokens(self) -> int:
        """How many tokens were computed, without padding."""
        return sum(self.num_tokens)

    @property
    def total_sampled(self) -> int:
        """How many tokens were generated."""
        return sum(map(len, self.sampled))

    @property
    def total_drafted(self) -> int:
        """How many tokens were guessed, accepted or not."""
        return sum(map(len, self.drafted))

    @property
    def total_sent(self) -> int:
        """How many bytes each process of a parallel model sent to the others."""
        return self.sent_in_layers + self.sent_elsewhere

    @property
    def total_accepted(self) -> int:
        """How many of the guessed tokens were accepted."""
        return sum(row.num_accepted for row in self.rows) if self.drafted else 0


@dataclass(frozen=True)
class TraceMeta:
    """The sizes and settings of the engine. `started` is wall-clock time, in seconds since 1970."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    scheduler: str = "continuous"
    kv_policy: str = "paged"
    model: str = ""
    device: str = ""
    dtype: str = ""
    started: float = field(default=0.0, compare=False)
