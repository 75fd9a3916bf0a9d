"""Exercise 03.2: find the slot of a token in the pages of its request."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit import notebook
from labkit.core.attention import Span, row_order
from labkit.core.kv_cache import PagedKVCache
from labkit.core.model_runner import ModelRunner
from labkit.core.plan import StepPlan, StepResult
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import expect_same_answers, whole
from labkit.exercises.e03_pool import NUM_BLOCKS, fullest_step, make_engine, reference_run
from labkit.views.style import plural


def slot_mapping(block_table: Sequence[int], block_size: int, start: int, count: int) -> list[int]:
    """The slots of a request's tokens `[start, start + count)`.

    Slot s is place `s % block_size` of page `s // block_size`.

    Raises:
        ValueError: the block table has too few pages for these tokens.
    """
    needed = -(-(start + count) // block_size)
    if count and needed > len(block_table):
        raise ValueError(
            f"{start + count} tokens need {needed} pages, the block table has {len(block_table)}"
        )
    return [block_table[t // block_size] * block_size + t % block_size for t in range(start, start + count)]


# The rule, the block table, the page size, and the tokens [start, start + count).
_PLACES: tuple[tuple[str, list[int], int, int, int], ...] = (
    ("the first token lies at the first place of the first page in the table", [0], 4, 0, 1),
    ("the next token lies at the next place of the same page", [0], 4, 1, 1),
    ("page p begins at slot p * block_size: take the number of the page from the block table", [5], 4, 0, 2),
    ("a page holds block_size tokens: token block_size lies in the next page of the table", [5, 2], 4, 3, 2),
    ("positions count from the start of the request, not of the step", [5, 2, 9], 4, 6, 3),
    ("the last place of the last page can be used", [3], 4, 3, 1),
    ("the last place of the last page can be used", [3, 8], 4, 0, 8),
    ("the pages of a table may lie in any order", [7, 1, 6, 0], 3, 0, 12),
    ("return one slot for each of the `count` tokens, in their order", [4, 2], 16, 10, 10),
    ("a page may hold a single token", [6, 3, 8], 1, 0, 3),
    ("for a count of 0, return an empty list", [2], 4, 4, 0),
)
# A block table, the page size, and more tokens than its pages hold.
_TOO_SHORT: tuple[tuple[list[int], int, int, int], ...] = (
    ([], 4, 0, 1),
    ([5], 4, 4, 1),
    ([5, 2], 4, 0, 9),
    ([5, 2], 4, 11, 1),
)


def _examine(function: Callable[..., Any]) -> None:
    for rule, table, size, start, count in _PLACES:
        _compare(function, rule, table, size, start, count)
    for table, size, start, count in _TOO_SHORT:
        call = f"slot_mapping({table}, {size}, {start}, {count})"
        tokens, pages = plural(start + count, "token"), plural(-(-(start + count) // size), "page")
        rule = f"raise ValueError for a block table that is too short: {tokens} need {pages}"
        try:
            slots = function(list(table), size, start, count)
        except ValueError:
            continue
        except NotImplementedError:
            raise
        except Exception as error:
            raise Wrong(rule, f"{call} raised {type(error).__name__}") from None
        raise Wrong(rule, f"{call} returned {slots!r}")
    for table, start in (([2], 9), ([], 3)):
        rule = "for a count of 0, return an empty list, however short the table is"
        _compare(function, rule, table, 4, start, 0)
    rng = random.Random(32)
    for _ in range(60):
        size = rng.choice((1, 2, 3, 4, 8, 16, 32))
        table = rng.sample(range(64), rng.randrange(1, 9))
        start = rng.randrange(len(table) * size)
        count = rng.randrange(1, len(table) * size - start + 1)
        rule = "the slots of a longer request must be right as well"
        _compare(function, rule, table, size, start, count)


def _compare(
    function: Callable[..., Any], rule: str, table: list[int], size: int, start: int, count: int
) -> None:
    given = list(table)
    call = f"slot_mapping({table}, {size}, {start}, {count})"
    try:
        slots = function(given, size, start, count)
    except (ValueError, IndexError) as error:
        raise Wrong(rule, f"{call} raised {type(error).__name__}, although its pages are enough") from error
    expect(given == table, "leave the block table as it is", f"{call} changed it to {given}")
    if not isinstance(slots, list | tuple) or any(whole(slot) is None for slot in slots):
        raise Wrong("return a list of slot numbers", f"{call} returned {slots!r}")
    expected = slot_mapping(table, size, start, count)
    found = [int(slot) for slot in slots]
    expect(found == expected, rule, f"{call} returned {found}, not {expected}")


class _LearnersCache(PagedKVCache):
    """Writes keys and values where the learner's function says, not where the engine says."""

    to_blocks: Tensor
    to_places: Tensor

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        self.k[layer, self.to_blocks, self.to_places] = k
        self.v[layer, self.to_blocks, self.to_places] = v


class _LearnersRunner(ModelRunner):
    """Asks a learner's function for the slots of every row before the forward pass."""

    cache: _LearnersCache
    function: Callable[..., Any]
    error: Exception | None = None
    written = 0

    def run(self, plan: StepPlan) -> StepResult:
        try:
            slots = torch.tensor(self._slots(plan))
        except Exception as error:  # the engine takes it for a failed step and goes on: keep it
            self.error = error
            raise
        size = self.cache.block_size
        self.cache.to_blocks, self.cache.to_places = slots // size, slots % size
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
            found = self.function(list(span.table), self.cache.block_size, span.start, span.num_queries)
            slots += [int(slot) for slot in found]
        return slots


def _engine_with_slots(function: Callable[..., Any]) -> Engine:
    engine = make_engine()
    module, pool = engine.model.module, engine.pool
    cache = _LearnersCache(module.kv_shape, NUM_BLOCKS, pool.block_size)
    runner = _LearnersRunner(module, cache, pool, backend=engine.runner.backend)
    runner.function = function
    engine.runner = runner
    while engine.has_unfinished:
        engine.step()
        if runner.error:
            raise runner.error
    return engine


def _run(function: Callable[..., Any]) -> Run:
    engine, reference = _engine_with_slots(function), reference_run()
    expect(
        # Kernels of the CPU, which the reference may use, round in another order.
        torch.allclose(engine.runner.cache.blocks, reference.runner.cache.blocks, rtol=0, atol=1e-4),
        "the engine's cache must hold what the reference's holds",
        "with your slots it holds something else",
    )
    expect_same_answers(engine, reference, "the tokens must be those of the reference")
    step = fullest_step()
    sentence = (
        f"Your function said where the engine writes: {engine.runner.written} tokens in {len(engine.trace)} "
        f"steps, each key and value in the same slot as the reference's, and the same tokens come out."
    )
    return Run(sentence, [(f"What you filled, in step {step}:", notebook.heatmap(engine.trace, step))])


SLOTS = Exercise("03.2", "where a token lies", slot_mapping, _examine, _run)
