"""Exercises of notebook 06: who must give up their pages, and by what name a full page is found again."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from labkit import notebook
from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.core.waiting_queue import order
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.elsewhere import call_elsewhere
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams
from labkit.trace.trace import Trace

BLOCK_SIZE, SEATS = 4, 6
_MAX_STEPS = 5000  # of a run that takes some hundred


@functools.cache
def _tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


def _answers(engine: Engine) -> dict[str, list[int]]:
    return {name: output.token_ids for name, output in engine.outputs.items()}


# -- 06.1 -----------------------------------------------------------------------------------------

NUM_BLOCKS = 22
# Prompt tokens, answer tokens and priority (lower is more urgent) of the requests that compete for pages.
JOBS = (
    (7, 32, 0),
    (11, 16, 1),
    (5, 48, 0),
    (14, 8, 0),
    (6, 32, 0),
    (9, 16, 1),
    (4, 48, 0),
    (17, 8, 1),
    (8, 32, 0),
    (12, 32, 0),
    (10, 16, 1),
    (6, 8, 0),
)


def choose_victim(running: Sequence[Request]) -> Request:
    """The newest of the least urgent."""
    return max(running, key=lambda request: (request.priority, request.arrival))


def recomputed(trace: Trace) -> int:
    """Tokens that were computed once more, because their pages had been taken away."""
    reached: dict[str, int] = {}
    again = 0
    for record in trace:
        for row in record.rows:
            before, end = reached.get(row.request_id, 0), row.start + row.num_tokens
            again += max(0, min(before, end) - row.start)
            reached[row.request_id] = max(before, end)
    return again


def preemptions(trace: Trace) -> int:
    """How often a request lost its pages."""
    return sum(len(record.preempted) for record in trace)


def _candidates(*facts: tuple[str, int, int, int]) -> list[Request]:
    """Running requests from (name, priority, arrival, tokens computed)."""
    requests = []
    for name, priority, arrival, computed in facts:
        request = Request(name, [7] * (computed + 1), SamplingParams(max_tokens=99), priority=priority)
        request.arrival, request.num_computed_tokens, request.status = arrival, computed, "running"
        request.num_slots = -(-computed // BLOCK_SIZE) * BLOCK_SIZE
        requests.append(request)
    return requests


# Running requests, the smallest list first, as (name, priority, arrival, tokens computed). The list is in the
# order in which they got their seats: whoever was preempted and came back stands at the end.
_LISTS: tuple[tuple[tuple[str, int, int, int], ...], ...] = (
    (("a", 0, 0, 8), ("b", 0, 1, 8)),
    (("a", 0, 0, 20), ("b", 0, 1, 4)),
    (("a", 0, 0, 4), ("b", 0, 1, 20)),
    (("b", 0, 1, 8), ("a", 0, 0, 8)),
    (("a", 1, 0, 8), ("b", 0, 1, 8)),
    (("a", 0, 0, 8), ("b", 1, 1, 8)),
    (("a", 5, 0, 4), ("b", 0, 1, 40), ("c", 0, 2, 8)),
    (("a", 0, 0, 4), ("b", 0, 1, 8), ("c", 0, 2, 16)),
    (("c", 0, 2, 16), ("a", 0, 0, 12), ("b", 0, 1, 20)),
    (("a", -1, 0, 4), ("b", -1, 1, 8), ("c", -2, 2, 16)),
    (("d", 2, 3, 8), ("b", 1, 1, 8), ("c", 2, 2, 30), ("a", 1, 0, 12)),
    (("a", 3, 0, 8), ("b", 2, 1, 8), ("c", 1, 2, 8), ("d", 0, 3, 8)),
    (("e", 0, 4, 4), ("d", 0, 3, 9), ("c", 0, 2, 40), ("b", 0, 1, 2), ("a", 0, 0, 64)),
)


def _examine_victim(function: Callable[..., Any]) -> None:
    for facts in _LISTS:
        running = _candidates(*facts)
        victim = function(list(running))
        told = "\n".join(
            f"{name}: priority {priority}, arrival {arrival}, {computed} tokens computed"
            for name, priority, arrival, computed in facts
        )
        before = _candidates(*facts)
        same = all(
            getattr(one, field) == getattr(other, field)
            for one, other in zip(running, before, strict=True)
            for field in Request.__slots__
            if field != "params"
        )
        expect(same, "the function only chooses: it must change no request", told)
        _check_victim(victim, running, told)


def _check_victim(victim: Any, running: Sequence[Request], told: str) -> None:
    """Hold a choice against the rules."""
    if not any(victim is request for request in running):
        raise Wrong("it returns one of the requests in the list, itself", f"{told}\nyou returned {victim!r}")
    told += f"\nyour victim is {victim.request_id}"
    last = max(request.priority for request in running)
    expect(
        victim.priority == last,
        "a more urgent request must not pay while a less urgent one runs (lower numbers are more urgent)",
        told,
    )
    first = min(running, key=order)
    expect(
        victim is not first,
        "the first in line must never be the victim: somebody must be sure to reach the end",
        told + ", which is the most urgent and came first",
    )


def victim_scheduler(function: Callable[[list[Request]], Request]) -> type[Scheduler]:
    """A scheduler that asks a function whose pages to take, for `Engine(config, scheduler=...)`."""

    class Asking(Scheduler):
        def grow(self, plan: StepPlan, growing: list[Request]) -> None:
            # Each of them needs one page.
            while len(self.running) > 1 and len(growing) > self.pool.num_free:
                victim = function(list(self.running))
                names = ", ".join(request.request_id for request in self.running)
                _check_victim(victim, self.running, f"in the engine, with requests {names} running")
                self.preempt(plan, victim)
                growing = [request for request in growing if request is not victim]
            super().grow(plan, growing)  # which finds room now

    return Asking


def compete(scheduler: type[Scheduler] = Scheduler, num_blocks: int = NUM_BLOCKS) -> Engine:
    """Run the requests of this exercise in a pool that is too small for them.

    Raises:
        Wrong: if they never come to an end.
    """
    config = EngineConfig(
        model=_tiny(),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=SEATS,
        max_num_batched_tokens=64,
    )
    engine = Engine(config, scheduler=scheduler)
    for number, (prompt, answer, priority) in enumerate(JOBS):
        token_ids = [300 + (37 * number + 11 * place) % 500 for place in range(prompt)]
        engine.add_request(token_ids, SamplingParams(max_tokens=answer, ignore_eos=True), priority=priority)
    for _ in range(_MAX_STEPS):
        if not engine.has_unfinished:
            return engine
        engine.step()
    raise Wrong(
        "every request must come to its end", f"after {_MAX_STEPS} steps some still push each other out"
    )


@functools.cache
def _competed(num_blocks: int) -> Engine:
    return compete(num_blocks=num_blocks)


def _run_victim(function: Callable[..., Any]) -> Run:
    engine, reference = compete(victim_scheduler(function)), _competed(NUM_BLOCKS)
    expect(
        _answers(engine) == _answers(_competed(400)),
        "the answers must be those of a pool with room for all",
        "with your choice of victims they are others",
    )
    yours, theirs = ((preemptions(e.trace), recomputed(e.trace), len(e.trace)) for e in (engine, reference))
    names = ("preemptions", "tokens computed again", "steps")
    score = ", ".join(f"{a} {what} ({b})" for what, a, b in zip(names, yours, theirs, strict=True))
    sentence = (
        f"{len(JOBS)} requests in {NUM_BLOCKS} pages, yours (and newest first in brackets): {score}. The "
        "answers are those of a pool with room for all."
    )
    pictures = [
        ("Your choice of victims:", notebook.timeline(engine.trace)),
        ("The newest first:", notebook.timeline(reference.trace)),
    ]
    return Run(sentence, pictures)


# -- 06.2 -----------------------------------------------------------------------------------------

NO_PARENT = 0  # the parent of every first page
_MANY = 200_000


def block_hash(parent_hash: int, tokens: tuple[int, ...]) -> int:
    """A name for a full page: of its tokens, and of all the pages before it."""
    text = repr((parent_hash, tokens))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def hashed_pool(function: Callable[[Any, tuple[int, ...]], Any]) -> type[BlockPool]:
    """A pool whose prefix cache finds pages by a hash, and believes it, for `Engine(config, pool=...)`."""

    class Hashed(BlockPool):
        def _hash(self, parent: Any, token_ids: Sequence[int], i: int) -> Any:
            return function(parent, tuple(token_ids[i * self.block_size : (i + 1) * self.block_size]))

        def match(self, token_ids: Sequence[int]) -> list[int]:
            blocks: list[int] = []
            name: Any = NO_PARENT
            if self.enable_prefix_caching:
                for i in range((len(token_ids) - 1) // self.block_size):
                    name = self._hash(name, token_ids, i)
                    if (name, ()) not in self._block_of:
                        break
                    blocks.append(self._block_of[name, ()])
            return blocks

        def publish(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
            if not self.enable_prefix_caching:
                return
            done, name = self._chain.get(request_id, (0, NO_PARENT))
            full = num_computed_tokens // self.block_size
            for i in range(done, full):
                block, name = self.tables[request_id][i], self._hash(name, token_ids, i)
                if block not in self._key_of and (name, ()) not in self._block_of:
                    self._block_of[name, ()] = block
                    self._key_of[block], self._node_of[block] = (name, ()), name
                    self._next_node += 1
                    self._published.append(block)
            self._chain[request_id] = (max(done, full), name)

    return Hashed


# What it shows, and two pages that must have different names.
_PAIRS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("another first token makes another page", (5, 6, 7, 8), (9, 6, 7, 8)),
    ("another last token makes another page: every token counts", (5, 6, 7, 8), (5, 6, 7, 9)),
    ("every token counts", (5, 6, 7, 8), (5, 60, 7, 8)),
    ("tokens that add up to the same are still other tokens", (1, 4, 2, 2), (2, 3, 2, 2)),
    ("the order of the tokens counts", (1, 2, 3, 4), (4, 3, 2, 1)),
    ("the order of the tokens counts", (1, 2, 3, 4), (2, 1, 3, 4)),
    ("how often a token occurs counts", (5, 5, 6, 7), (5, 6, 6, 7)),
    ("it counts where one token ends and the next begins", (1, 23, 4, 5), (12, 3, 4, 5)),
    ("it counts where one token ends and the next begins", (11, 1, 4, 5), (1, 11, 4, 5)),
    ("token ids go far above 255", (1, 2, 3, 4), (257, 2, 3, 4)),
    ("token ids go far above 65,535", (1, 2, 3, 4), (65537, 2, 3, 4)),
    ("a weighted sum has collisions that are easy to find", (10, 41, 3, 4), (11, 10, 3, 4)),
)


def _examine_hash(function: Callable[..., Any]) -> None:
    first = function(NO_PARENT, (5, 6, 7, 8))
    try:
        hash(first)
    except TypeError:
        first = None
    if first is None:
        raise Wrong(
            "it returns a number, or something else that a dictionary can have as its key",
            f"block_hash(0, (5, 6, 7, 8)) returned {function(NO_PARENT, (5, 6, 7, 8))!r}",
        )
    # Other objects with the same contents, both alive. Large numbers, which Python does not keep only once.
    pages = [tuple([base + i for i in range(4)]) for base in (40_000, 40_000)]
    names = [function(NO_PARENT, page) for page in pages]
    told = f"block_hash(0, {pages[0]}) returned {names[0]!r}, then {names[1]!r} for an equal tuple"
    expect(names[0] == names[1], "the same tokens after the same page must have the same name", told)
    for rule, one, other in _PAIRS:
        names = [function(NO_PARENT, page) for page in (one, other)]
        told = f"{one} and {other}, both with parent 0, are both {names[0]!r}"
        expect(names[0] != names[1], rule, told)
    _examine_chain(function)
    _examine_many(function)
    _examine_elsewhere(function)


def _chain(function: Callable[..., Any], *pages: tuple[int, ...]) -> Any:
    return functools.reduce(function, pages, NO_PARENT)


def _examine_chain(function: Callable[..., Any]) -> None:
    a, b, c = (1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 9, 9)
    for rule, one, other in (
        ("equal pages after different pages are different: the parent counts", (a, c), (b, c)),
        ("a page with a parent is not the same page without one: the parent counts", (a, c), (c,)),
        ("the order of the pages counts as well: A B is not B A", (a, b), (b, a)),
        ("a page that comes twice must not cancel out", (a, a, b), (b,)),
        ("the whole chain counts, not the page before alone", (a, b, c), (c, b, c)),
    ):
        names = [_chain(function, *pages) for pages in (one, other)]
        told = f"the pages {_listed(one)} and the pages {_listed(other)} end in the same name, {names[0]!r}"
        expect(names[0] != names[1], rule, told)


def _listed(pages: Sequence[tuple[int, ...]]) -> str:
    return " ".join(map(str, pages))


def _examine_many(function: Callable[..., Any]) -> None:
    """With n pages and b bits, about n * n / 2 ** (b + 1) pairs fall together."""
    tokens = iter(random.Random(6).choices(range(50_000), k=4 * _MANY))
    seen: dict[Any, tuple[int, ...]] = {}
    for page in zip(tokens, tokens, tokens, tokens, strict=True):
        name = function(NO_PARENT, page)
        if seen.setdefault(name, page) != page:
            raise Wrong(
                "two pages fell together: it must have enough bits (64 or more), and mix them all",
                f"after {len(seen):,} pages, {page} has the name of {seen[name]}: {name!r}",
            )


def _examine_elsewhere(function: Callable[..., Any]) -> None:
    """Two more processes, in which texts hash otherwise, and which are asked in another order."""
    # Pages that it has not seen, so that it cannot have written their names down.
    pages = [(61_001, 2, 3, 4), (300, 61_002, 3, 4), (70_000, 5, 5, 61_003)]
    calls = [(NO_PARENT, page) for page in pages]
    calls.append((function(NO_PARENT, (5, 6, 7, 8)), pages[1]))
    one = call_elsewhere(function, calls, hash_seed=1)
    other = call_elsewhere(function, calls[::-1], hash_seed=2)
    if one is None or other is None:  # it cannot be sent, which says nothing about it
        return
    here = [repr(function(*call)) for call in calls]
    for call, *names in zip(calls, here, one, other[::-1], strict=True):
        expect(
            len(set(names)) == 1,
            "another process must find the same name: Python salts hash() of text anew in each, and "
            "addresses, counters and random numbers differ too",
            f"block_hash{call} returned {names[0]} here, {names[1]} and {names[2]} in other processes",
        )


_ALONE = 2  # steps that the first of a kind runs before the next comes, so that its pages can be found


def _prompts() -> list[list[int]]:
    """Questions behind one of two texts that differ in their first page; the first of each kind first."""
    common = [300 + 7 * i for i in range(4 * BLOCK_SIZE)]
    other = [900 + 5 * i for i in range(BLOCK_SIZE)] + common[BLOCK_SIZE:]
    questions = [[1200 + 50 * number + 3 * i for i in range(5)] for number in range(10)]
    return [(other if number in (1, 9) else common) + question for number, question in enumerate(questions)]


def ask_all(pool: type[BlockPool] = BlockPool, *, caching: bool = True) -> Engine:
    """Run ten prompts: one behind each text first, then the others, which can find what those have left."""
    config = EngineConfig(
        model=_tiny(), num_blocks=64, block_size=BLOCK_SIZE, max_num_seqs=10, enable_prefix_caching=caching
    )
    engine = Engine(config, pool=pool)
    for number, prompt in enumerate(_prompts()):
        engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        for _ in range(_ALONE if number < 2 else 0):
            engine.step()
    while engine.has_unfinished:
        engine.step()
    return engine


@functools.cache
def _asked(caching: bool) -> Engine:
    return ask_all(caching=caching)


def cached_tokens(trace: Trace) -> int:
    """Tokens that were found in the prefix cache and not computed."""
    return sum(admission.num_cached_tokens for record in trace for admission in record.admitted)


def _run_hash(function: Callable[..., Any]) -> Run:
    engine, exact, without = ask_all(hashed_pool(function)), _asked(True), _asked(False)
    expect(
        _answers(engine) == _answers(without),
        "the answers must be those of an engine without a prefix cache",
        "with your hash they are others: somebody got another's pages",
    )
    found, expected = cached_tokens(engine.trace), cached_tokens(exact.trace)
    expect(
        found == expected,
        "it must find what an exact comparison finds",
        f"{found} tokens were found, by exact comparison {expected}",
    )
    prompts = sum(map(len, _prompts()))
    sentence = (
        f"With your hash the engine found {found} of {prompts} prompt tokens in its prefix cache (exact "
        f"comparison {expected}), and gave the same answers as without a cache."
    )
    hits = {"your hash": found, "exact comparison": expected, "no prefix cache": cached_tokens(without.trace)}
    step = 2 * _ALONE  # in which all the others are admitted
    pictures = [
        (
            "Found, and not computed again:",
            notebook.bars(hits, "Prompt tokens from the cache", unit="tokens"),
        ),
        (f"Pages in step {step}, by your hash:", notebook.heatmap(engine.trace, step)),
        ("By exact comparison:", notebook.heatmap(exact.trace, step)),
    ]
    return Run(sentence, pictures)


EXERCISES: tuple[Exercise, ...] = (
    Exercise("06.1", "whose pages to take", choose_victim, _examine_victim, _run_victim),
    Exercise("06.2", "a name for a page", block_hash, _examine_hash, _run_hash),
)
