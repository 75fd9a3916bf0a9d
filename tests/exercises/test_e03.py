"""Exercises of notebook 03: right answers pass, and each wrong one is refused for what is wrong with it."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from labkit.core.block_pool import InvariantError, OutOfBlocks
from labkit.exercises import e03, e03_slots
from labkit.exercises.common import answers
from labkit.exercises.e03_pool import Pool, engine_pool, make_engine, reference_run
from labkit.exercises.e03_slots import slot_mapping
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- 03.1, a pool of pages ------------------------------------------------------------------------


class Stub:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def allocate(self, request_id: str, count: int) -> list[int]:
        raise NotImplementedError

    def free(self, request_id: str) -> list[int]:
        raise NotImplementedError


class Queue:
    """The page that has been free the longest goes first; tables are tuples."""

    def __init__(self, num_blocks: int) -> None:
        self.line = deque(range(num_blocks))
        self.held: dict[str, tuple[int, ...]] = {}

    def allocate(self, request_id: str, count: int) -> tuple[int, ...]:
        if len(self.line) < count:
            raise OutOfBlocks
        pages = tuple(self.line.popleft() for _ in range(count))
        self.held[request_id] = self.held.get(request_id, ()) + pages
        return pages

    def free(self, request_id: str) -> tuple[int, ...]:
        if request_id not in self.held:
            raise ValueError(request_id)
        pages = self.held.pop(request_id)
        self.line.extend(reversed(pages))
        return pages


class Owners:
    """No list of free pages: who owns each page, found by a search from the top."""

    def __init__(self, num_blocks: int) -> None:
        self.owner: list[str | None] = [None] * num_blocks
        self.order: list[tuple[str, int]] = []

    def allocate(self, request_id: str, count: int) -> list[int]:
        free = [page for page, owner in enumerate(self.owner) if owner is None][::-1]
        if count > len(free):
            raise OutOfBlocks("too few")
        for page in free[:count]:
            self.owner[page] = request_id
            self.order.append((request_id, page))
        return free[:count]

    def free(self, request_id: str) -> list[int]:
        pages = [page for name, page in self.order if name == request_id]
        if not pages:
            raise LookupError(f"{request_id} holds none")
        self.order = [(name, page) for name, page in self.order if name != request_id]
        for page in pages:
            self.owner[page] = None
        return pages


class Alias(Pool):
    """Returns the table of a new request itself: whoever empties that list has emptied the table."""

    def allocate(self, request_id: str, count: int) -> list[int]:
        blocks = super().allocate(request_id, count)
        if len(self.tables[request_id]) == count:
            return self.tables[request_id]
        return blocks


def test_a_pool_that_hands_out_its_own_table_is_refused() -> None:
    assert_refused("03.1", Alias, "those are the caller's")


@pytest.mark.parametrize("pool", [Pool, Queue, Owners])
def test_a_right_pool_is_accepted_whatever_pages_it_takes(pool: type) -> None:
    verdict = assert_accepted("03.1", pool)
    assert "30 steps (reference 30)" in verdict.text
    assert len(verdict.pictures) == 2
    assert "26 of 32 blocks owned" in repr(verdict.pictures[0][1])


def test_the_stub_of_a_pool_is_open() -> None:
    assert_open("03.1", Stub)


def test_the_solution_of_the_pool_is_right() -> None:
    assert_accepted("03.1", function_from(solution("03", "03.1"), "Pool"))


class NeverAgain(Pool):
    def free(self, request_id: str) -> list[int]:
        return self.tables.pop(request_id)


class TakesAndFails(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        blocks = []
        for _ in range(count):
            if not self.unused:
                raise OutOfBlocks("none left")
            blocks.append(self.unused.pop())
        self.tables.setdefault(request_id, []).extend(blocks)
        return blocks


class FailsAndKeeps(Pool):
    """Takes no page when it refuses, but keeps the refused pages in the table."""

    def allocate(self, request_id: str, count: int) -> list[int]:
        if count > len(self.unused):
            self.tables.setdefault(request_id, []).extend(self.unused)
            raise OutOfBlocks
        return super().allocate(request_id, count)


class GivesWhatThereIs(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        return super().allocate(request_id, min(count, len(self.unused)))


class RaisesIndexError(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        blocks = [self.unused[-1 - i] for i in range(count)]
        del self.unused[len(self.unused) - count :]
        self.tables.setdefault(request_id, []).extend(blocks)
        return blocks


class ReturnsTheTable(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        super().allocate(request_id, count)
        return list(self.tables[request_id])


class GivesTwice(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        blocks = super().allocate(request_id, count)
        self.unused.append(blocks[-1])
        return blocks


class Repeats(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        super().allocate(request_id, count)
        page = self.tables[request_id][-1]
        return [page] * count


class FromOne(Pool):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.unused = [page + 1 for page in self.unused]


class SortsTheTable(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        blocks = super().allocate(request_id, count)
        self.tables[request_id].sort()
        return blocks


class ForgetsTheOld(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        blocks = super().allocate(request_id, count)
        self.tables[request_id] = blocks
        return blocks


class FreesNobody(Pool):
    def free(self, request_id: str) -> list[int]:
        return super().free(request_id) if request_id in self.tables else []


class FreesTwice(Pool):
    """Keeps the table after its pages were freed."""

    def free(self, request_id: str) -> list[int]:
        self.unused.extend(self.tables[request_id])
        return list(self.tables[request_id])


class OneDictionary(Pool):
    tables: dict[str, list[int]] = {}  # noqa: RUF012

    def __init__(self, num_blocks: int) -> None:
        self.unused = list(range(num_blocks))


class AllTogether(Pool):
    unused: list[int] = []  # noqa: RUF012
    tables: dict[str, list[int]] = {}  # noqa: RUF012

    def __init__(self, num_blocks: int) -> None:
        while len(self.unused) < num_blocks:
            self.unused.append(len(self.unused))


class KeepsOne(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        if count > len(self.unused) - 1:
            raise OutOfBlocks
        return super().allocate(request_id, count)


class ReturnsNothing(Pool):
    def allocate(self, request_id: str, count: int) -> list[int]:
        super().allocate(request_id, count)


class FreesLastFirst(Pool):
    def free(self, request_id: str) -> list[int]:
        return super().free(request_id)[::-1]


@pytest.mark.parametrize(
    ("pool", "rule"),
    [
        (NeverAgain, "pages that were given back must be handed out again"),
        (TakesAndFails, "a refused allocate takes nothing"),
        (FailsAndKeeps, "a refused allocate takes nothing"),
        (GivesWhatThereIs, "allocate raises OutOfBlocks: it has no other pages"),
        (RaisesIndexError, "allocate raises OutOfBlocks and no other error"),
        (ReturnsTheTable, "only the new pages, not the whole block table"),
        (GivesTwice, "no page has two owners"),
        (Repeats, "one call never hands out a page twice"),
        (FromOne, "a page is a number from 0 to num_blocks - 1"),
        (SortsTheTable, "a block table grows at its end"),
        (ForgetsTheOld, "free returns all pages of the request"),
        (FreesNobody, "a double free is an error"),
        (FreesTwice, "no more and no fewer"),
        (AllTogether, "two pools must not share their lists"),
        (OneDictionary, "two pools must not share their lists"),
        (KeepsOne, "every page can be handed out"),
        (ReturnsNothing, "allocate returns a list of page numbers"),
        (FreesLastFirst, "a block table grows at its end"),
    ],
)
def test_a_wrong_pool_is_refused_for_its_own_reason(pool: type, rule: str) -> None:
    verdict = assert_refused("03.1", pool, rule)
    assert "Pool(" in verdict.text.split("\n", 1)[1]  # the calls that show it


def test_what_the_engine_finds_is_told_too() -> None:
    """The audit in the engine finds a fault that the examination let pass."""

    class Late(Pool):
        """Right for a while."""

        def allocate(self, request_id: str, count: int) -> list[int]:
            blocks = super().allocate(request_id, count)
            if request_id == "6":
                self.unused += blocks
            return blocks

    with pytest.raises(InvariantError, match=r"page \d+ was handed to request '\d', but it is not free"):
        make_engine(engine_pool(Late)).run()


# -- 03.2, where a token lies ---------------------------------------------------------------------


def stub(block_table: list[int], block_size: int, start: int, count: int) -> list[int]:
    raise NotImplementedError


def by_steps(table: Sequence[int], size: int, start: int, count: int) -> list[int]:
    """Walks through all slots of the request, and takes a piece out."""
    if not count:
        return []
    slots = [page * size + place for page in table for place in range(size)]
    if start + count > len(slots):
        raise ValueError("too short")
    return slots[start : start + count]


def as_tuple(table: Sequence[int], size: int, start: int, count: int) -> tuple[int, ...]:
    if count and len(table) * size < start + count:
        raise ValueError
    return tuple(table[p] * size + o for p, o in (divmod(t, size) for t in range(start, start + count)))


@pytest.mark.parametrize("function", [slot_mapping, by_steps, as_tuple])
def test_a_right_mapping_is_accepted(function: Callable[..., object]) -> None:
    verdict = assert_accepted("03.2", function)
    assert "206 tokens in 30 steps" in verdict.text
    assert len(verdict.pictures) == 1


def test_the_stub_of_the_mapping_is_open() -> None:
    assert_open("03.2", stub)


def test_the_solution_of_the_mapping_is_right() -> None:
    assert_accepted("03.2", function_from(solution("03", "03.2"), "slot_mapping"))


def checked(function: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """Adds the ValueError that a right answer raises."""

    def mapping(table: list[int], size: int, start: int, count: int) -> list[int]:
        if count and -(-(start + count) // size) > len(table):
            raise ValueError
        return function(table, size, start, count)

    return mapping


@checked
def in_one_piece(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[0] * size + t for t in range(start, start + count)]


@checked
def without_table(table: list[int], size: int, start: int, count: int) -> list[int]:
    return list(range(start, start + count))


@checked
def from_the_step(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[t // size] * size + t % size for t in range(count)]


@checked
def pages_not_slots(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[t // size] for t in range(start, start + count)]


@checked
def page_plus_place(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[t // size] + t % size for t in range(start, start + count)]


@checked
def the_last_alone(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[t // size] * size + t % size for t in range(start, start + count)][-1:]


@checked
def eats_the_table(table: list[int], size: int, start: int, count: int) -> list[int]:
    slots = [table[t // size] * size + t % size for t in range(start, start + count)]
    while len(table) > 1:
        table.pop()
    return slots


@checked
def one_late(table: list[int], size: int, start: int, count: int) -> list[int]:
    """Thinks that position block_size is the last of the first page."""
    return [table[max(t - 1, 0) // size] * size + t % size for t in range(start, start + count)]


@checked
def as_pairs(table: list[int], size: int, start: int, count: int) -> list[tuple[int, int]]:
    return [(table[t // size], t % size) for t in range(start, start + count)]


def unchecked(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[t // size] * size + t % size for t in range(start, start + count)]


def round_the_table(table: list[int], size: int, start: int, count: int) -> list[int]:
    return [table[(t // size) % max(len(table), 1)] * size + t % size for t in range(start, start + count)]


def rounds_down(table: list[int], size: int, start: int, count: int) -> list[int]:
    if (start + count) // size > len(table):
        raise ValueError
    table = [*table, 0]
    return [table[t // size] * size + t % size for t in range(start, start + count)]


def one_page_too_many(table: list[int], size: int, start: int, count: int) -> list[int]:
    if (start + count) // size + 1 > len(table):
        raise ValueError("too short")
    return slot_mapping(table, size, start, count)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (in_one_piece, "token block_size lies in the next page of the table"),
        (without_table, "take the number of the page from the block table"),
        (from_the_step, "the next token lies at the next place"),
        (pages_not_slots, "the next token lies at the next place"),
        (page_plus_place, "page p begins at slot p * block_size"),
        (the_last_alone, "take the number of the page from the block table"),
        (eats_the_table, "leave the block table as it is"),
        (one_late, "a page holds block_size tokens"),
        (as_pairs, "return a list of slot numbers"),
        (unchecked, "raise ValueError for a block table that is too short"),
        (round_the_table, "raise ValueError for a block table that is too short"),
        (rounds_down, "raise ValueError for a block table that is too short"),
        (one_page_too_many, "raised ValueError, although its pages are enough"),
    ],
)
def test_a_wrong_mapping_is_refused_for_its_own_reason(function: Callable[..., object], rule: str) -> None:
    assert_refused("03.2", function, rule)


def test_wrong_slots_in_the_engine_give_other_tokens() -> None:
    """The engine really writes where the function says."""

    def mirrored(table: list[int], size: int, start: int, count: int) -> list[int]:
        return [
            slot // size * size + size - 1 - slot % size for slot in slot_mapping(table, size, start, count)
        ]

    engine = e03_slots._engine_with_slots(mirrored)
    assert answers(engine) != answers(reference_run())


def test_an_error_in_a_mapping_is_not_taken_for_a_failed_step() -> None:
    def breaks(table: list[int], size: int, start: int, count: int) -> list[int]:
        if start > 12:
            raise RuntimeError("late")
        return slot_mapping(table, size, start, count)

    with pytest.raises(RuntimeError, match="late"):
        e03_slots._engine_with_slots(breaks)


def test_the_references_are_documented() -> None:
    for exercise in e03.EXERCISES:
        assert inspect.getdoc(exercise.reference)
