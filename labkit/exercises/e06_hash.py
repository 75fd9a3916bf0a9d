"""Exercise 06.2: give a full page a name by which the prefix cache finds it again."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from labkit import notebook
from labkit.core.block_pool import BlockPool
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import exactly, expect_same_answers, tiny_engine
from labkit.exercises.elsewhere import call_elsewhere
from labkit.trace.trace import Trace

BLOCK_SIZE = 4
NO_PARENT = 0  # the parent of every first page
_MANY, _LONG = 200_000, 5_000  # pages, and those of one long text


def block_hash(parent_hash: int, tokens: tuple[int, ...]) -> int:
    """A name for a full page, made from its tokens and from all pages before it."""
    text = repr((parent_hash, tokens))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def hashed_pool(function: Callable[[Any, tuple[int, ...]], Any]) -> type[BlockPool]:
    """A pool whose prefix cache finds pages by a hash alone, for `Engine(config, pool=...)`."""

    class Hashed(BlockPool):
        def _hash(self, parent: Any, token_ids: Sequence[int], i: int) -> Any:
            return function(parent, tuple(token_ids[i * self.block_size : (i + 1) * self.block_size]))

        def match(self, token_ids: Sequence[int]) -> list[int]:
            blocks: list[int] = []
            name: Any = NO_PARENT
            if self.enable_prefix_caching:
                for i in range((len(token_ids) - 1) // self.block_size):
                    name = self._hash(name, token_ids, i)
                    if (name, ()) not in self.block_of:
                        break
                    blocks.append(self.block_of[name, ()])
            return blocks

        def publish(self, request_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
            if not self.enable_prefix_caching:
                return
            done, name = self._chain.get(request_id, (0, NO_PARENT))
            full = num_computed_tokens // self.block_size
            for i in range(done, full):
                block, name = self.tables[request_id][i], self._hash(name, token_ids, i)
                if block not in self.key_of and (name, ()) not in self.block_of:
                    self.block_of[name, ()] = block
                    self.key_of[block], self.node_of[block] = (name, ()), name
                    self._next_node += 1
                    self._published.append(block)
            self._chain[request_id] = (max(done, full), name)

    return Hashed


# The rule, and two pages that must have different names.
_PAIRS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("a page with another first token must have another name", (5, 6, 7, 8), (9, 6, 7, 8)),
    ("a page with another last token must have another name: every token counts", (5, 6, 7, 8), (5, 6, 7, 9)),
    ("every token counts", (5, 6, 7, 8), (5, 60, 7, 8)),
    ("other tokens must have another name, even if their sum is the same", (1, 4, 2, 2), (2, 3, 2, 2)),
    ("the order of the tokens counts", (1, 2, 3, 4), (4, 3, 2, 1)),
    ("the order of the tokens counts", (1, 2, 3, 4), (2, 1, 3, 4)),
    ("the order of the tokens counts", (5, 6, 7, 8), (5, 7, 6, 8)),
    ("how often a token occurs counts", (5, 5, 6, 7), (5, 6, 6, 7)),
    ("token 0 is a token like any other", (0, 5, 6, 7), (5, 0, 6, 7)),
    ("token 0 is a token like any other", (0, 0, 0, 5), (0, 0, 5, 0)),
    (
        "it counts where one token ends and the next begins: (1, 23) is not (12, 3)",
        (1, 23, 4, 5),
        (12, 3, 4, 5),
    ),
    (
        "it counts where one token ends and the next begins: (1, 23) is not (12, 3)",
        (11, 1, 4, 5),
        (1, 11, 4, 5),
    ),
    ("every bit of a token counts: token ids go far above 255", (1, 2, 3, 4), (257, 2, 3, 4)),
    ("every bit of a token counts: token ids go far above 65,535", (1, 2, 3, 4), (65537, 2, 3, 4)),
    ("a weighted sum is not enough: other tokens easily give the same sum", (10, 41, 3, 4), (11, 10, 3, 4)),
    ("every token id must do: vocabularies go beyond 100,000", (55_300, 57_000, 3, 4), (151_000, 7, 3, 4)),
    *(
        (
            "a page may have any number of tokens, and each of them counts",
            (*range(n - 1), 5),
            (*range(n - 1), 7),
        )
        for n in (1, 2, 8, 16, 32, 64)
    ),
)


def _examine(function: Callable[..., Any]) -> None:
    first = function(NO_PARENT, (5, 6, 7, 8))
    try:
        hash(first)
    except TypeError:
        first = None
    if first is None:
        raise Wrong(
            "return a number, or something else that can be the key of a dictionary",
            f"block_hash(0, (5, 6, 7, 8)) returned {function(NO_PARENT, (5, 6, 7, 8))!r}",
        )
    # Two equal pages that are different objects. Python keeps small numbers only once: use large ones.
    pages = [tuple([base + i for i in range(4)]) for base in (40_000, 40_000)]
    names = [function(NO_PARENT, page) for page in pages]
    told = f"block_hash(0, {pages[0]}) returned {names[0]!r}, then {names[1]!r} for an equal tuple"
    expect(names[0] == names[1], "the same tokens after the same page must have the same name", told)
    whole_or_text = not isinstance(first, float)
    expect(
        whole_or_text, "return a whole number, text or bytes: a float has 53 bits", f"it returned {first!r}"
    )
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
        ("equal pages after different pages must have different names: the parent counts", (a, c), (b, c)),
        (
            "a page with a parent and the same page without one must have different names: the parent counts",
            (a, c),
            (c,),
        ),
        ("the order of the pages counts as well: A B is not B A", (a, b), (b, a)),
        ("a page that comes twice must not cancel out", (a, a, b), (b,)),
        ("the whole chain counts, not only the page before", (a, b, c), (c, b, c)),
    ):
        names = [_chain(function, *pages) for pages in (one, other)]
        told = f"the pages {_listed(one)} and the pages {_listed(other)} end in the same name, {names[0]!r}"
        expect(names[0] != names[1], rule, told)


def _listed(pages: Sequence[tuple[int, ...]]) -> str:
    return " ".join(map(str, pages))


def _examine_many(function: Callable[..., Any]) -> None:
    """Ask for many pages: with n pages and b bits, about n * n / 2 ** (b + 1) pairs have the same name."""
    tokens = iter(random.Random(6).choices(range(50_000), k=4 * _MANY))
    seen: dict[Any, tuple[int, ...]] = {}
    for page in zip(tokens, tokens, tokens, tokens, strict=True):
        name = function(NO_PARENT, page)
        if seen.setdefault(name, page) != page:
            raise Wrong(
                "two pages have the same name: use enough bits (64 or more), and mix them all",
                f"after {len(seen):,} pages, {page} has the name of {seen[name]}: {name!r}",
            )
    for name, page in list(seen.items())[:3]:
        again = function(NO_PARENT, page)
        told = f"block_hash(0, {page}) returned {name!r}, and {again!r} after {len(seen):,} other pages"
        expect(again == name, "the same tokens after the same page must have the same name, always", told)
    name, names = NO_PARENT, set()
    for place in range(_LONG):  # one text that repeats itself: only the parent tells its pages apart
        name = function(name, (7, 8, 7, 8))
        if name in names:
            told = f"page {place} of a text of equal pages has the name of a page before it"
            raise Wrong("every bit of the parent counts: keep all of it", told)
        names.add(name)


def _examine_elsewhere(function: Callable[..., Any]) -> None:
    """Ask two more processes, which hash texts in other ways, and one of them in another order."""
    # New pages, whose names it cannot have written down.
    pages = [(61_001, 2, 3, 4), (300, 61_002, 3, 4), (70_000, 5, 5, 61_003)]
    calls = [(NO_PARENT, page) for page in pages]
    calls.append((function(NO_PARENT, (5, 6, 7, 8)), pages[1]))
    one = call_elsewhere(function, calls, hash_seed=1)
    other = call_elsewhere(function, calls[::-1], hash_seed=2)
    if one is None or other is None:  # it cannot be sent to another process; it may still be right
        return
    here = [repr(function(*call)) for call in calls]
    for call, *names in zip(calls, here, one, other[::-1], strict=True):
        expect(
            len(set(names)) == 1,
            "another process must find the same name: Python's hash() of a text differs from process to "
            "process, and so do addresses, counters and random numbers",
            f"block_hash{call} returned {names[0]} here, and {names[1]} and {names[2]} in other processes",
        )


_ALONE = 2  # steps that the first request of a kind runs alone, so that the others find its pages


def _prompts() -> list[list[int]]:
    """Questions after one of two texts, which differ in their first page only."""
    common = [300 + 7 * i for i in range(4 * BLOCK_SIZE)]
    other = [900 + 5 * i for i in range(BLOCK_SIZE)] + common[BLOCK_SIZE:]
    questions = [[1200 + 50 * number + 3 * i for i in range(5)] for number in range(10)]
    return [(other if number in (1, 9) else common) + question for number, question in enumerate(questions)]


def ask_all(pool: type[BlockPool] = BlockPool, *, caching: bool = True) -> Engine:
    """Run ten prompts: first one after each text, then the others, which can find what those have left."""
    engine = tiny_engine(
        pool=pool, num_blocks=64, block_size=BLOCK_SIZE, max_num_seqs=10, enable_prefix_caching=caching
    )
    for number, prompt in enumerate(_prompts()):
        engine.add_request(prompt, exactly(12))
        for _ in range(_ALONE if number < 2 else 0):
            engine.step()
    engine.run()
    return engine


@functools.cache
def _asked(caching: bool) -> Engine:
    return ask_all(caching=caching)


def cached_tokens(trace: Trace) -> int:
    """How many tokens were found in the prefix cache and not computed."""
    return sum(admission.num_cached_tokens for record in trace for admission in record.admitted)


def _run(function: Callable[..., Any]) -> Run:
    engine, exact, without = ask_all(hashed_pool(function)), _asked(True), _asked(False)
    expect_same_answers(engine, without, "the answers must be those of an engine without a prefix cache")
    found, expected = cached_tokens(engine.trace), cached_tokens(exact.trace)
    expect(
        found == expected,
        "your hash must find what an exact comparison finds",
        f"it found {found} tokens, an exact comparison finds {expected}",
    )
    prompts = sum(map(len, _prompts()))
    sentence = (
        f"With your hash the engine found {found} of {prompts} prompt tokens in its prefix cache (exact "
        f"comparison {expected}), and gave the same answers as without a cache."
    )
    hits = {"your hash": found, "exact comparison": expected, "no prefix cache": cached_tokens(without.trace)}
    step = 2 * _ALONE  # the step in which all the others are admitted
    pictures = [
        (
            "Found, and not computed again:",
            notebook.bars(hits, "Prompt tokens from the cache", unit="tokens"),
        ),
        (f"Pages in step {step}, by your hash:", notebook.heatmap(engine.trace, step)),
        ("By exact comparison:", notebook.heatmap(exact.trace, step)),
    ]
    return Run(sentence, pictures)


HASH = Exercise("06.2", "a name for a page", block_hash, _examine, _run)
