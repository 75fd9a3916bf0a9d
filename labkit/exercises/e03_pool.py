"""Exercise 03.1: hand out pages and take them back."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

from labkit import notebook
from labkit.core.block_pool import BlockPool, InvariantError, OutOfBlocks
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import expect_same_answers, inject, tiny_engine, whole
from labkit.views.style import plural

NUM_BLOCKS, BLOCK_SIZE, SEATS = 32, 4, 6
JOBS = ((9, 14), (5, 30), (12, 4), (3, 12), (7, 26), (16, 6), (4, 8), (10, 18), (6, 10), (11, 5))
"""Prompt tokens and answer tokens of the requests that run with a learner's code."""


class Pool:
    """Keeps account of pages: which request holds which, and which are free.

    Args:
        num_blocks: number of pages in the pool; their numbers are 0 to `num_blocks - 1`.
    """

    def __init__(self, num_blocks: int) -> None:
        self.unused = list(range(num_blocks))
        self.tables: dict[str, list[int]] = {}

    def allocate(self, request_id: str, count: int) -> list[int]:
        """Append `count` free pages to a request's block table, and return just those.

        Raises:
            OutOfBlocks: fewer pages are free; it takes none.
        """
        if count > len(self.unused):
            raise OutOfBlocks(f"{count} pages asked for, {len(self.unused)} are free")
        blocks = [self.unused.pop() for _ in range(count)]
        self.tables.setdefault(request_id, []).extend(blocks)
        return blocks

    def free(self, request_id: str) -> list[int]:
        """Give back all pages of a request; returns its block table as it was.

        Raises:
            KeyError: the request holds no pages.
        """
        blocks = self.tables.pop(request_id)
        self.unused.extend(blocks)
        return blocks


class _Witness:
    """Calls a learner's pool, keeps books of its own, and compares every answer with them.

    Args:
        make: the learner's class.
        num_blocks: number of pages in the pool.
    """

    def __init__(self, make: Callable[[int], Any], num_blocks: int) -> None:
        self.pool = make(num_blocks)
        self.num_blocks = num_blocks
        self.books: dict[str, list[int]] = {}
        self.calls = [f"pool = Pool({num_blocks})"]
        self.refused: set[str] = set()  # requests whose last call was refused
        self.freed = False

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(map(len, self.books.values()))

    @property
    def story(self) -> str:
        return "\n".join([*(["..."] if len(self.calls) > 9 else []), *self.calls[-9:]])

    def _expect(self, condition: bool, rule: str) -> None:
        expect(condition, rule, self.story)

    def allocate(self, name: str, count: int) -> None:
        enough = count <= self.num_free
        call = f"pool.allocate({name!r}, {count})"
        try:
            blocks = self.pool.allocate(name, count)
        except OutOfBlocks:
            self.calls.append(f"{call} raised OutOfBlocks, with {self.num_free} free")
            if enough and self.refused:
                rule = "a refused allocate takes nothing: all pages that were free before are still free"
            elif enough and self.freed:
                rule = "pages that were given back must be handed out again"
            else:
                rule = "allocate raises OutOfBlocks only when too few are free: every page can be handed out"
            self._expect(not enough, rule)
            self.refused.add(name)
            return
        except NotImplementedError:
            raise
        except Exception as error:
            if enough:
                raise
            self.calls.append(f"{call} raised {type(error).__name__}, with {self.num_free} free")
            self._expect(False, "when too few pages are free, allocate raises OutOfBlocks and no other error")
        self.calls.append(f"{call} returned {blocks!r}")
        self._expect(
            isinstance(blocks, list | tuple) and all(whole(block) is not None for block in blocks),
            "allocate returns a list of page numbers",
        )
        blocks, returned = [int(block) for block in blocks], blocks
        if isinstance(returned, list):
            returned.clear()  # it is the caller's: a pool that keeps it as its own table has lost that now
        held = self.books.get(name, [])
        self._expect(
            enough,
            "when too few pages are free, allocate raises OutOfBlocks: it has no other pages to hand out",
        )
        self._expect(
            not (held and blocks[: len(held)] == held and len(blocks) == len(held) + count),
            "allocate returns only the new pages, not the whole block table",
        )
        self._expect(len(blocks) == count, "allocate returns `count` pages, no more and no fewer")
        self._expect(
            all(0 <= block < self.num_blocks for block in blocks),
            f"a page is a number from 0 to num_blocks - 1, here from 0 to {self.num_blocks - 1}",
        )
        self._expect(len(set(blocks)) == count, "one call never hands out a page twice")
        for owner, theirs in self.books.items():
            for page in sorted(set(theirs) & set(blocks)):
                self._expect(owner == name, f"no page has two owners: {owner!r} still holds page {page}")
                self._expect(False, f"a page stands in a block table only once: {name!r} holds page {page}")
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
            rule = "a double free is an error: free raises one for a request that holds no pages"
            if name in self.refused:
                rule = "a refused allocate leaves nothing behind: the request still holds no pages"
            raise Wrong(rule, self.story)
        self._expect(isinstance(blocks, list | tuple), "free returns the request's block table as a list")
        self._expect(
            sorted(blocks) == sorted(held),
            "a refused allocate takes nothing: it leaves the block table as it was"
            if name in self.refused
            else "free returns all pages of the request, no more and no fewer, whatever became of the lists "
            "that allocate returned: those are the caller's",
        )
        self._expect(
            list(blocks) == held,
            "free returns the pages in the order of the calls: a block table grows at its end",
        )
        self.freed = True


# The number of pages, and calls: (request, pages) allocates, (request,) frees. The smallest first.
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
    (2, (("a", 3), ("a",))),
    (150, (("a", 90), ("b", 60), ("a",), ("c", 90))),
)


def _examine(make: Callable[..., Any]) -> None:
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
    """A list that belongs to the class, and not to the object, is shared by all pools: make two of them."""
    alone = make(2)
    expected = _outcome(alone.allocate, "a", 1), _outcome(alone.free, "b")
    first, second = make(2), make(2)
    _outcome(first.allocate, "b", 2)
    got = _outcome(second.allocate, "a", 1), _outcome(second.free, "b")
    expect(
        got == expected,
        "two pools must not share their lists: make them in __init__, and keep them in self",
        "first, second = Pool(2), Pool(2)\nfirst.allocate('b', 2)\n"
        f"second.allocate('a', 1): {got[0]}; without the first it was {expected[0]}\n"
        f"second.free('b'): {got[1]}; without the first it was {expected[1]}",
    )


def _outcome(function: Callable[..., Any], *arguments: Any) -> str:
    """How many pages a call returned, or which error it raised."""
    try:
        return plural(len(function(*arguments)), "page")
    except NotImplementedError:
        raise
    except Exception as error:
        return type(error).__name__


def engine_pool(make: Callable[[int], Any]) -> Callable[[int, int], BlockPool]:
    """A `BlockPool` that asks a learner's pool for every page, for `Engine(config, pool=...)`.

    It has no prefix cache: set `enable_prefix_caching=False` in the configuration.
    """

    class Asking(BlockPool):
        def __init__(self, num_blocks: int, block_size: int) -> None:
            super().__init__(num_blocks, block_size, enable_prefix_caching=False)
            self.asked = make(num_blocks)

        def allocate(self, request_id: str, count: int) -> list[int]:
            blocks = [int(block) for block in self.asked.allocate(request_id, count)]
            for block in blocks:
                if block not in self.free:
                    raise InvariantError(
                        f"page {block} was handed to request {request_id!r}, but it is not free"
                    )
                self.free.remove(block)
                self.ref_counts[block] = 1
            self.tables.setdefault(request_id, []).extend(blocks)
            return blocks

        def release(self, request_id: str) -> list[int]:
            blocks = [int(block) for block in self.asked.free(request_id)]
            table = super().release(request_id)
            if blocks != table:
                raise InvariantError(
                    f"request {request_id!r} holds pages {table}, but free returned {blocks}"
                )
            return table

    return Asking


# -- in the engine ---------------------------------------------------------------------------------


def make_engine(pool: Callable[[int, int], BlockPool] = BlockPool) -> Engine:
    """A tiny engine with all the requests in its queue."""
    engine = tiny_engine(
        pool=pool,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=SEATS,
        enable_prefix_caching=False,
    )
    for prompt_tokens, answer_tokens in JOBS:
        inject(engine, prompt_tokens, answer_tokens)
    return engine


@functools.cache
def reference_run() -> Engine:
    """The engine after a run with its own pool."""
    engine = make_engine()
    engine.run()
    return engine


def fullest_step() -> int:
    """The step of the reference in which most pages have an owner; the last, if there are several."""
    trace = reference_run().trace
    return max(range(len(trace)), key=lambda step: (len(trace.state(step).owners), step))


def _run(make: Callable[..., Any]) -> Run:
    engine, reference = make_engine(engine_pool(make)), reference_run()
    engine.run()
    expect_same_answers(engine, reference, "the tokens must not depend on which pages hold them")
    step = fullest_step()
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


POOL = Exercise("03.1", "a pool of pages", Pool, _examine, _run)
