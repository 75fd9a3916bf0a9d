"""What a browser is sent: rows and messages, with the names of their fields for Python and for JavaScript.

A row is a `NamedTuple` and travels as an array, in the order of its fields. A message is a `TypedDict` and
travels as an object. `javascript()` tells the browser the names, once; with them `read` in `live_feed.js`
turns every array into an object. So neither side ever counts columns.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

# -- rows -----------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A running request, its tokens in the cache, and its blocks in order.

    In a replay, `request` is the place of its lane.
    """

    request: str | int
    computed: int
    blocks: Sequence[int]


class Span(NamedTuple):
    """Consecutive steps in which a request did the same. For a preemption, `tokens` counts blocks."""

    kind: str  # p, c, d or i as in `StepRecord.kinds`; w, waiting; x, preempted
    first: int
    last: int
    tokens: int
    drafted: int = 0
    accepted: int = 0


class Lane(NamedTuple):
    """A request's row in the timeline. `ended` is the step of its end, -1 before it."""

    request: str
    label: str
    color: int
    arrived: int
    prompt_tokens: int
    ended: int
    reason: str
    spans: Sequence[Span]


class Blocked(NamedTuple):
    """The head of the queue, and why it waits."""

    request: str
    reason: str


class Step(NamedTuple):
    """The counts of one step. `used` blocks have an owner; `wasted` slots of theirs hold no token."""

    step: int
    seconds: float
    sampled: int
    computed: int
    used: int
    running: int
    waiting: int
    blocked: Blocked | None
    wasted: int
    drafted: int = 0
    accepted: int = 0
    sent_in_layers: int = 0  # bytes, as in `StepRecord`
    sent_elsewhere: int = 0
    sending: float = 0.0  # seconds


class Event(NamedTuple):
    """One line of the log; `events.events_of` says what the numbers and the word mean."""

    step: int
    kind: str
    request: str
    first: int = 0
    second: int = 0
    word: str = ""


class Joined(NamedTuple):
    """What requests cost those that they joined, in step `step`: a verdict, and the rest of the sentence.

    There is no verdict until it is measured. Label and colour are those of the first request.
    """

    step: int
    requests: Sequence[str] = ()
    label: str = ""
    color: int = 0
    verdict: str = ""
    story: str = ""


class Elsewhere(NamedTuple):
    """A request that has not arrived in this engine; place and amount are those of `Moved`."""

    request: str
    label: str
    color: int
    place: str
    amount: int


class FarPool(NamedTuple):
    """The pool of the engine that computes prompts."""

    num_blocks: int
    tables: Sequence[Table]


class Held(NamedTuple):
    """A request that waits for the prompt of another one, which it shares."""

    request: str
    parent: str


class PlannedRow(NamedTuple):
    """What a request will do in the next step. `taken` blocks are new; `drafts` are the tokens to check."""

    request: str
    label: str
    color: int
    kind: str
    start: int
    tokens: int
    taken: Sequence[int]
    drafted: int = 0
    drafts: Sequence[str] = ()


class RanRow(NamedTuple):
    """What a request did in a step that ran. `text` is what it generated; `drafts` were checked, as text."""

    request: str
    label: str
    color: int
    kind: str
    start: int
    tokens: int
    text: str
    drafted: int = 0
    accepted: int = 0
    drafts: Sequence[str] = ()


class Shared(NamedTuple):
    """A request that gets a seat and finds `tokens` of its prompt in blocks of others."""

    request: str
    tokens: int
    blocks: Sequence[int]


class Queued(NamedTuple):
    """A member of the queue, in order. `arrives`: it was not there before."""

    request: str
    label: str
    color: int
    arrives: bool = False


class Preempted(NamedTuple):
    """A request that gives its blocks back and waits again."""

    request: str
    label: str
    color: int
    num_blocks: int


class Ended(NamedTuple):
    """A request that ends, and why."""

    request: str
    label: str
    color: int
    reason: str


class Returned(NamedTuple):
    """A request that gives blocks back because its drafts were rejected."""

    request: str
    blocks: Sequence[int]


class Owner(NamedTuple):
    """A request that has a block, where in its block table, and how many slots are filled."""

    request: str
    position: int
    filled: int


class LastOwner(NamedTuple):
    """The request that gave a block back last, and where in its block table it was."""

    request: str
    position: int


class ReplayRow(NamedTuple):
    """What a request did in one step of a replay. `lane` is the place of its lane."""

    lane: int
    kind: str
    start: int
    tokens: int
    padding: int
    drafted: int = 0
    accepted: int = 0


class ReplayLine(NamedTuple):
    """What happens to a request in one step of a replay, in words. `lane` is -1 if it is about no request."""

    lane: int
    words: str


class ReplayEnd(NamedTuple):
    """The end of a request in a replay: the step, and why."""

    step: int
    reason: str


# -- messages -------------------------------------------------------------------------------------


class Pictures(TypedDict, total=False):
    """What the live pictures need: what is new since a step, if anything, or everything there is (`full`)."""

    feed: str
    step: int
    full: bool
    meta: dict[str, Any]
    palette: Sequence[str]
    window: int
    speculative: str
    tables: Sequence[Table]
    cached: str
    lanes: Sequence[Lane]
    steps: Sequence[Step]
    events: Sequence[Event]
    queue: Sequence[str]
    held: Sequence[Held]
    elsewhere: Sequence[Elsewhere]
    far: FarPool
    joins: Sequence[Joined]
    numbers: dict[str, Any]


class Plan(TypedDict):
    """The step to come, while the engine is paused."""

    step: int
    rows: Sequence[PlannedRow]
    shared: Sequence[Shared]
    admitted: Sequence[str]
    preempted: Sequence[Preempted]
    ended: Sequence[Ended]
    evicted: int
    queue: Sequence[Queued]
    blocked: Blocked | None
    free: int
    held_back: str


class StepFacts(TypedDict):
    """One step that ran, in full."""

    step: int
    ms: float
    rows: Sequence[RanRow]
    tables: Sequence[Table]
    cached: str
    queue: Sequence[Queued]
    preempted: Sequence[Preempted]
    ended: Sequence[Ended]
    blocked: Blocked | None
    free: int
    returned: Sequence[Returned]
    held_back: str


class BlockFacts(TypedDict):
    """One block: its owners, the last one it had, and the tokens in it, each as text (None: not known).

    `begins` says what it is part of, if every chat begins with it: the system prompt, or the chat template.
    """

    block: int
    owners: Sequence[Owner]
    cached: bool
    last: LastOwner | None
    tokens: Sequence[str] | None
    begins: str


class ReplayLane(TypedDict):
    """A request's row in the timeline of a replay."""

    label: str
    name: str
    color: int
    spans: Sequence[Span]
    ends: Sequence[ReplayEnd]


class ReplayData(TypedDict):
    """What does not depend on the step that a replay looks at. `steps` holds columns."""

    meta: dict[str, Any]
    palette: Sequence[str]
    headline: Sequence[str]
    steps: dict[str, Any]
    lanes: Sequence[ReplayLane]


class ReplayFrame(TypedDict):
    """The pool, the batch and the queue during one step of a replay."""

    step: int
    tables: Sequence[Table]
    cached: str
    batch: Sequence[ReplayRow]
    queue: Sequence[ReplayLine]
    queued: int
    events: Sequence[ReplayLine]


MESSAGES = (Pictures, Plan, StepFacts, BlockFacts, ReplayData, ReplayFrame)


# -- the names, for JavaScript --------------------------------------------------------------------


def javascript() -> str:
    """A constant `WIRE`: for each row and message its fields in order, and which of them hold rows again.

    {"Lane": {"request": null, ..., "spans": ["Span"]}} says that a lane's spans are a list of `Span`.
    """
    known: dict[str, dict[str, Any]] = {}
    for message in MESSAGES:
        _describe(message, known)
    return f"const WIRE = {json.dumps(known, separators=(',', ':'))};\n"


def _describe(kind: type, known: dict[str, dict[str, Any]]) -> None:
    """Add the fields of a row or message, and of all rows and messages inside it."""
    known[kind.__name__] = {name: _inner(hint, known) for name, hint in get_type_hints(kind).items()}


def _inner(hint: Any, known: dict[str, dict[str, Any]]) -> str | list[str] | None:
    """The row or message that a field holds: its name, a list with it for several, or None for plain data."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:  # a row, or None
        return _inner(arguments[0], known)
    if origin is not None and issubclass(origin, Sequence):
        name = _inner(arguments[0], known)
        return [name] if isinstance(name, str) else None
    if is_typeddict(hint) or hasattr(hint, "_fields"):
        if hint.__name__ not in known:
            _describe(hint, known)
        return hint.__name__
    return None
