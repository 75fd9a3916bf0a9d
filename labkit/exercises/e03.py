"""Exercises of notebook 03: hand out pages and take them back, and find the place of a token in them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit import notebook
from labkit.config import EngineConfig
from labkit.core.attention import Span, row_order
from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.core.kv_cache import PagedKVCache
from labkit.core.model_runner import ModelRunner
from labkit.core.plan import StepPlan, StepResult
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams
from labkit.views.style import plural

NUM_BLOCKS, BLOCK_SIZE, SEATS = 32, 4, 6
JOBS = ((9, 14), (5, 30), (12, 4), (3, 12), (7, 26), (16, 6), (4, 8), (10, 18), (6, 10), (11, 5))
"""Prompt tokens and answer tokens of the requests that a learner's code runs."""


# -- the engine -----------------------------------------------------------------------------------


@functools.cache
def _tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


def make_engine(pool: Callable[[int, int], BlockPool] = BlockPool) -> Engine:
    """The engine, with all the requests in its queue, on a model that answers the same on every machine."""
    config = EngineConfig(
        model=_tiny(),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=SEATS,
        enable_prefix_caching=False,
    )
    engine = Engine(config, pool=pool)
    for number, (prompt, answer) in enumerate(JOBS):
        token_ids = [300 + (37 * number + 11 * place) % 500 for place in range(prompt)]
        engine.add_request(token_ids, SamplingParams(max_tokens=answer, ignore_eos=True))
    return engine


def _answers(engine: Engine) -> dict[str, list[int]]:
    return {name: output.token_ids for name, output in engine.outputs.items()}


def _run_to_end(engine: Engine) -> Engine:
    while engine.has_unfinished:
        engine.step()
    return engine


@functools.cache
def _reference() -> Engine:
    return _run_to_end(make_engine())


def _fullest_step() -> int:
    """The step of the reference in which the most pages are owned; what comes later has been reused."""
    trace = _reference().trace
    return max(range(len(trace)), key=lambda step: (len(trace.state(step).owners), step))


# -- 03.1 -----------------------------------------------------------------------------------------


class Pool:
    """Pages by number: who holds which, and which are free.

    Args:
        num_blocks: pages in the pool, 0 to `num_blocks - 1`.
    """

    def __init__(self, num_blocks: int) -> None:
        self.unused = list(range(num_blocks))
        self.tables: dict[str, list[int]] = {}

    def allocate(self, request_id: str, count: int) -> list[int]:
        """Append `count` free pages to a request's block table, and return just those.

        Raises:
            OutOfBlocks: if fewer are free; nothing is taken then.
        """
        if count > len(self.unused):
            raise OutOfBlocks(f"{count} pages asked for, {len(self.unused)} are free")
        blocks = [self.unused.pop() for _ in range(count)]
        self.tables.setdefault(request_id, []).extend(blocks)
        return blocks

    def free(self, request_id: str) -> list[int]:
        """Give back all pages of a request; returns its block table as it was.

        Raises:
            KeyError: if it holds none.
        """
        blocks = self.tables.pop(request_id)
        self.unused.extend(blocks)
        return blocks


class _Witness:
    """Calls a learner's pool, keeps books of its own, and holds every answer against them."""

    def __init__(self, make: Callable[[int], Any], num_blocks: int) -> None:
        self.pool = make(num_blocks)
        self.num_blocks = num_blocks
        self.books: dict[str, list[int]] = {}
        self.calls = [f"pool = Pool({num_blocks})"]
        self.refused: set[str] = set()  # whose last call was refused
        self.freed = False

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(map(len, self.books.values()))

    @property
    def story(self) -> str:
        return "\n".join([*(["..."] if len(self.calls) > 9 else []), *self.calls[-9:]])

    def _hold(self, condition: bool, rule: str) -> None:
        expect(condition, rule, self.story)

    def allocate(self, name: str, count: int) -> None:
        enough = count <= self.num_free
        call = f"pool.allocate({name!r}, {count})"
        try:
            blocks = self.pool.allocate(name, count)
        except OutOfBlocks:
            self.calls.append(f"{call} raised OutOfBlocks, with {self.num_free} free")
            if enough and self.refused:
                rule = "a refused allocate takes nothing: all the pages that were free are free still"
            elif enough and self.freed:
                rule = "pages that were given back must be handed out again"
            else:
                rule = "OutOfBlocks is for when too few pages are free: every page must be handed out"
            self._hold(not enough, rule)
            self.refused.add(name)
            return
        except NotImplementedError:
            raise
        except Exception as error:
            if enough:
                raise
            self.calls.append(f"{call} raised {type(error).__name__}, with {self.num_free} free")
            self._hold(False, "when too few pages are free, allocate raises OutOfBlocks, and nothing else")
        self.calls.append(f"{call} returned {blocks!r}")
        self._hold(
            isinstance(blocks, list | tuple) and all(type(block) is int for block in blocks),
            "allocate returns a list of page numbers",
        )
        blocks = list(blocks)
        held = self.books.get(name, [])
        self._hold(
            enough, "when too few pages are free, allocate raises OutOfBlocks: it cannot hand out others"
        )
        self._hold(
            not (held and blocks[: len(held)] == held and len(blocks) == len(held) + count),
            "allocate returns the new pages alone, not the whole block table",
        )
        self._hold(len(blocks) == count, "allocate returns as many pages as were asked for")
        self._hold(
            all(0 <= block < self.num_blocks for block in blocks),
            f"pages are numbered 0 to num_blocks - 1, so here 0 to {self.num_blocks - 1}",
        )
        self._hold(len(set(blocks)) == count, "no page is handed out twice in one call")
        for owner, theirs in self.books.items():
            both = set(theirs) & set(blocks)
            self._hold(
                not both,
                f"no page may have two owners: {owner!r} still holds page {min(both, default='')}"
                if owner != name
                else f"a page stands in a block table once: {owner!r} holds page {min(both, default='')}",
            )
        self.books.setdefault(name, []).extend(blocks)
        self.refused.discard(name)

    def free(self, name: str) -> None:
        held = self.books.pop(name, None)
        call = f"pool.free({name!r})"
        try:
            blocks = self.pool.free(name)
        except NotImplementedError:
            raise
        except Exception as error:
            if held is not None:
                raise
            self.calls.append(f"{call} raised {type(error).__name__}")
            return
        self.calls.append(f"{call} returned {blocks!r}")
        if held is None:
            raise Wrong(
                "a double free must be refused: free raises an error for a request that holds no pages",
                self.story,
            )
        self._hold(isinstance(blocks, list | tuple), "free returns the request's block table, as a list")
        self._hold(
            sorted(blocks) == sorted(held),
            "a refused allocate takes nothing, so it must not change the block table"
            if name in self.refused
            else "free gives back all pages of the request, no more and no fewer",
        )
        self._hold(
            list(blocks) == held,
            "a block table only grows at its end: free returns the pages in the order they were handed out",
        )
        self.freed = True


# Calls, the smallest first: (request, pages), or (request,) to give its pages back.
_SCRIPTS: tuple[tuple[int, tuple[tuple[str, int] | tuple[str], ...]], ...] = (
    (1, (("a", 1),)),
    (4, (("a", 2), ("b", 2))),
    (4, (("a", 1), ("b", 1), ("a", 2), ("a",))),
    (2, (("a", 3), ("a", 2))),
    (3, (("a", 2), ("b", 2), ("b", 1))),
    (3, (("a", 1), ("a", 3), ("a",))),
    (3, (("a", 3), ("a",), ("b", 3))),
    (4, (("a", 2), ("b", 1), ("a",), ("c", 3), ("b",), ("c",))),
    (3, (("a", 2), ("a",), ("a", 1), ("a",))),
    (4, (("a", 2), ("a",), ("a",), ("b", 2), ("c", 2))),
    (4, (("a", 2), ("b",), ("b", 2))),
)


def _examine_pool(make: Callable[..., Any]) -> None:
    _examine_apart(make)
    for num_blocks, script in _SCRIPTS:
        witness = _Witness(make, num_blocks)
        for call in script:
            witness.allocate(*call) if len(call) == 2 else witness.free(*call)
    rng = random.Random(3)
    witness = _Witness(make, 24)
    for _ in range(600):
        name = rng.choice("abcdefgh")
        if name in witness.books and rng.random() < 0.4:
            witness.free(name)
        else:
            witness.allocate(name, rng.randrange(1, 7))


def _examine_apart(make: Callable[..., Any]) -> None:
    """What stands in the class, and not in the object, is one for all pools: a second pool would see it."""
    alone = make(2)
    expected = _outcome(alone.allocate, "a", 1), _outcome(alone.free, "b")
    first, second = make(2), make(2)
    _outcome(first.allocate, "b", 2)
    got = _outcome(second.allocate, "a", 1), _outcome(second.free, "b")
    expect(
        got == expected,
        "two pools must not share what they know: keep it in self, and make it anew in __init__",
        "first, second = Pool(2), Pool(2)\nfirst.allocate('b', 2)\n"
        f"second.allocate('a', 1): {got[0]}; without the first it was {expected[0]}\n"
        f"second.free('b'): {got[1]}; without the first it was {expected[1]}",
    )


def _outcome(function: Callable[..., Any], *arguments: Any) -> str:
    """How many pages came back, or which error."""
    try:
        return plural(len(function(*arguments)), "page")
    except NotImplementedError:
        raise
    except Exception as error:
        return type(error).__name__


def engine_pool(make: Callable[[int], Any]) -> Callable[[int, int], BlockPool]:
    """A `BlockPool` that asks a learner's pool for every page, for `Engine(config, pool=...)`.

    It has no prefix cache: set `enable_prefix_caching=False`.
    """

    class Asking(BlockPool):
        def __init__(self, num_blocks: int, block_size: int) -> None:
            super().__init__(num_blocks, block_size, enable_prefix_caching=False)
            self.asked = make(num_blocks)

        def allocate(self, request_id: str, count: int) -> list[int]:
            blocks = list(self.asked.allocate(request_id, count))
            for block in blocks:
                if block not in self.free:
                    raise InvariantError(
                        f"page {block} was handed to request {request_id!r}, and is not free"
                    )
                self.free.remove(block)
                self.ref_counts[block] = 1
            self.tables.setdefault(request_id, []).extend(blocks)
            return blocks

        def release(self, request_id: str) -> list[int]:
            blocks = list(self.asked.free(request_id))
            table = super().release(request_id)
            if blocks != table:
                raise InvariantError(f"request {request_id!r} holds pages {table}, and free gave {blocks}")
            return table

    return Asking


def _run_pool(make: Callable[..., Any]) -> Run:
    engine = _run_to_end(make_engine(engine_pool(make)))
    reference = _reference()
    expect(
        _answers(engine) == _answers(reference),
        "the tokens must not depend on which pages hold them",
        "the engine gave other tokens with your pool",
    )
    step = _fullest_step()
    theirs = reference.trace.state(step).tables
    owned = sum(map(len, theirs.values()))
    moved = sum(engine.trace.state(step).tables[name] != table for name, table in theirs.items())
    sentence = (
        f"Your pool ran {len(JOBS)} requests in the engine, with an audit of every step: {len(engine.trace)} "
        f"steps (reference {len(reference.trace)}), {owned} pages at once, the same tokens. In step {step}, "
        f"{moved} of {len(theirs)} block tables differ from the reference's, and that does not matter."
    )
    pictures = [
        (f"Your pool in step {step}:", notebook.heatmap(engine.trace, step)),
        ("The reference in the same step:", notebook.heatmap(reference.trace, step)),
    ]
    return Run(sentence, pictures)


# -- 03.2 -----------------------------------------------------------------------------------------


def slot_mapping(block_table: Sequence[int], block_size: int, start: int, count: int) -> list[int]:
    """The slots of a request's tokens `[start, start + count)`.

    Slot s is place `s % block_size` of page `s // block_size`.

    Raises:
        ValueError: if the block table has too few pages for so many tokens.
    """
    needed = -(-(start + count) // block_size)
    if count and needed > len(block_table):
        raise ValueError(
            f"{start + count} tokens need {needed} pages, the block table has {len(block_table)}"
        )
    return [block_table[t // block_size] * block_size + t % block_size for t in range(start, start + count)]


# What it shows, the block table, the page size, and the tokens [start, start + count).
_PLACES: tuple[tuple[str, list[int], int, int, int], ...] = (
    ("the first token lies at the first place of the first page in the table", [0], 4, 0, 1),
    ("the next token lies at the next place of the same page", [0], 4, 1, 1),
    ("page p begins at slot p * block_size: take the page's number from the block table", [5], 4, 0, 2),
    ("a full page ends a page: token block_size lies in the next page of the table", [5, 2], 4, 3, 2),
    ("positions count from the start of the request, not of the step", [5, 2, 9], 4, 6, 3),
    ("the last place of the last page is a place", [3], 4, 3, 1),
    ("the last place of the last page is a place", [3, 8], 4, 0, 8),
    ("pages need not lie in order", [7, 1, 6, 0], 3, 0, 12),
    ("one slot for each of the `count` tokens, in their order", [4, 2], 16, 10, 10),
    ("a page may hold a single token", [6, 3, 8], 1, 0, 3),
    ("where no token is asked for, there is no slot", [2], 4, 4, 0),
)
# A block table, the page size, and more tokens than its pages hold.
_TOO_SHORT: tuple[tuple[list[int], int, int, int], ...] = (
    ([], 4, 0, 1),
    ([5], 4, 4, 1),
    ([5, 2], 4, 0, 9),
    ([5, 2], 4, 11, 1),
)


def _examine_slots(function: Callable[..., Any]) -> None:
    for rule, table, size, start, count in _PLACES:
        _compare_slots(function, rule, table, size, start, count)
    for table, size, start, count in _TOO_SHORT:
        call = f"slot_mapping({table}, {size}, {start}, {count})"
        tokens, pages = plural(start + count, "token"), plural(-(-(start + count) // size), "page")
        rule = f"a table that is too short raises ValueError: {pages} for {tokens}"
        try:
            slots = function(list(table), size, start, count)
        except ValueError:
            continue
        except NotImplementedError:
            raise
        except Exception as error:
            raise Wrong(rule, f"{call} raised {type(error).__name__}") from None
        raise Wrong(rule, f"{call} returned {slots!r}")
    rng = random.Random(32)
    for _ in range(60):
        size = rng.choice((1, 2, 3, 4, 8, 16, 32))
        table = rng.sample(range(64), rng.randrange(1, 9))
        start = rng.randrange(len(table) * size)
        count = rng.randrange(1, len(table) * size - start + 1)
        rule = "the slots of a longer request are off"
        _compare_slots(function, rule, table, size, start, count)


def _compare_slots(
    function: Callable[..., Any], rule: str, table: list[int], size: int, start: int, count: int
) -> None:
    given = list(table)
    call = f"slot_mapping({table}, {size}, {start}, {count})"
    try:
        slots = function(given, size, start, count)
    except (ValueError, IndexError) as error:
        raise Wrong(rule, f"{call} raised {type(error).__name__}, though its pages are enough") from error
    expect(given == table, "the block table must be left as it is", f"{call} made it {given}")
    if not isinstance(slots, list | tuple) or any(type(slot) is not int for slot in slots):
        raise Wrong("it returns a list of slot numbers", f"{call} returned {slots!r}")
    expected = slot_mapping(table, size, start, count)
    expect(list(slots) == expected, rule, f"{call} returned {list(slots)}, and not {expected}")


class _LearnersCache(PagedKVCache):
    """Writes keys and values where the learner's function says, not where the engine would."""

    blocks: Tensor
    places: Tensor

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        self.k[layer, self.blocks, self.places] = k
        self.v[layer, self.blocks, self.places] = v


class _LearnersRunner(ModelRunner):
    """Asks a learner's function for the slots of every row before the forward pass."""

    cache: _LearnersCache
    function: Callable[..., Any]
    error: Exception | None = None
    written = 0

    def run(self, plan: StepPlan) -> StepResult:
        try:
            slots = torch.tensor(self._slots(plan))
        except Exception as error:  # which the engine would take for a failed step, and go on
            self.error = error
            raise
        self.cache.blocks, self.cache.places = slots // self.cache.block_size, slots % self.cache.block_size
        self.written += len(slots)
        return super().run(plan)

    def _slots(self, plan: StepPlan) -> list[int]:
        spans = [
            Span(start, count, self.pool.tables[request.request_id])
            for request, start, count in zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
            if count
        ]
        slots: list[int] = []
        for span in [spans[i] for i in row_order(spans)]:
            slots += self.function(list(span.table), self.cache.block_size, span.start, span.num_queries)
        return slots


def _engine_with_slots(function: Callable[..., Any]) -> Engine:
    engine = make_engine()
    keys = engine.runner.cache.k
    layers, _, size, heads, width = keys.shape
    cache = _LearnersCache(layers, NUM_BLOCKS, size, heads, width, dtype=keys.dtype, device=keys.device)
    runner = _LearnersRunner(engine.model.module, cache, engine.pool, backend=engine.runner.backend)
    runner.function = function
    engine.runner = runner
    while engine.has_unfinished:
        engine.step()
        if runner.error:
            raise runner.error
    return engine


def _run_slots(function: Callable[..., Any]) -> Run:
    engine, reference = _engine_with_slots(function), _reference()
    expect(
        torch.equal(engine.runner.cache.blocks, reference.runner.cache.blocks),
        "the engine's cache must hold what the reference's holds",
        "with your slots it holds something else",
    )
    expect(
        _answers(engine) == _answers(reference),
        "the tokens must be those of the reference",
        "with your slots the engine gave others",
    )
    step = _fullest_step()
    sentence = (
        f"Your function said where the engine writes: {engine.runner.written} tokens in {len(engine.trace)} "
        f"steps, each key and value in the same slot as the reference's, and the same tokens come out."
    )
    return Run(sentence, [(f"What you filled, in step {step}:", notebook.heatmap(engine.trace, step))])


EXERCISES: tuple[Exercise, ...] = (
    Exercise("03.1", "a pool of pages", Pool, _examine_pool, _run_pool),
    Exercise("03.2", "where a token lies", slot_mapping, _examine_slots, _run_slots),
)
