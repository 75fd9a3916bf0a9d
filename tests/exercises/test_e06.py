"""Exercises of notebook 06: right answers pass, and each wrong one is refused for what is wrong with it."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from labkit.core.request import Request
from labkit.core.waiting_queue import order
from labkit.exercises import Wrong, e06_victim, elsewhere
from labkit.exercises.common import answers
from labkit.exercises.e06_hash import ask_all, block_hash, hashed_pool
from labkit.exercises.e06_victim import choose_victim, compete, preemptions, recomputed, victim_scheduler
from labkit.schedulers.audit import check_pool
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- 06.1, whose pages to take --------------------------------------------------------------------


def stub(running: list[Request]) -> Request:
    raise NotImplementedError


def allowed(running: Sequence[Request]) -> list[Request]:
    last = max(request.priority for request in running)
    return [r for r in running if r.priority == last and r is not min(running, key=order)]


def least_left(running: list[Request]) -> Request:
    return min(allowed(running), key=lambda r: (r.max_len - len(r.token_ids), -r.arrival))


def fewest_computed(running: list[Request]) -> Request:
    return min(allowed(running), key=lambda r: (r.num_computed_tokens, -r.arrival))


def oldest_but_one(running: list[Request]) -> Request:
    return min(allowed(running), key=order)


def any_of_them(running: list[Request]) -> Request:
    return random.Random(len(running)).choice(allowed(running))


def by_sorting(running: list[Request]) -> Request:
    return sorted(running, key=order).pop()


@pytest.mark.parametrize(
    "function", [choose_victim, least_left, fewest_computed, oldest_but_one, any_of_them, by_sorting]
)
def test_a_right_choice_is_accepted(function: Callable[..., object]) -> None:
    verdict = assert_accepted("06.1", function)
    assert "(9), " in verdict.text and "(107)" in verdict.text  # the reference's preemptions and steps
    assert len(verdict.pictures) == 2


def test_what_the_solution_says_of_two_policies() -> None:
    for function, expected in ((choose_victim, (9, 122, 107)), (least_left, (7, 135, 100))):
        trace = compete(victim_scheduler(function)).trace
        assert (preemptions(trace), recomputed(trace), len(trace)) == expected


def test_the_reference_is_the_engines_own_choice() -> None:
    assert compete(victim_scheduler(choose_victim)).trace.records == compete().trace.records


def test_the_stub_of_the_choice_is_open() -> None:
    assert_open("06.1", stub)


def test_the_solution_of_the_choice_is_right() -> None:
    assert_accepted("06.1", function_from(solution("06", "06.1"), "choose_victim"))


def oldest(running: list[Request]) -> Request:
    return min(running, key=order)


def newest_whatever_priority(running: list[Request]) -> Request:
    return max(running, key=lambda request: request.arrival)


def last_in_the_list(running: list[Request]) -> Request:
    return running[-1]


def most_urgent(running: list[Request]) -> Request:
    return min(running, key=lambda request: (request.priority, -request.arrival))


def most_computed(running: list[Request]) -> Request:
    return max(running, key=lambda request: (request.priority, request.num_computed_tokens))


def name_alone(running: list[Request]) -> str:
    return choose_victim(running).request_id


def place_alone(running: list[Request]) -> int:
    return running.index(choose_victim(running))


def nobody(running: list[Request]) -> None:
    return None


def somebody_else(running: list[Request]) -> Request:
    victim = choose_victim(running)
    return Request(victim.request_id, victim.token_ids, victim.params)


def takes_the_pages(running: list[Request]) -> Request:
    victim = choose_victim(running)
    victim.num_computed_tokens = 0
    return victim


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (oldest, "the first in line must never be the victim"),
        (newest_whatever_priority, "a more urgent request must not pay"),
        (last_in_the_list, "the first in line must never be the victim"),
        (most_urgent, "a more urgent request must not pay"),
        (most_computed, "the first in line must never be the victim"),
        (name_alone, "return one of the requests in the list itself"),
        (place_alone, "return one of the requests in the list itself"),
        (nobody, "it returned None"),
        (somebody_else, "return one of the requests in the list itself"),
        (takes_the_pages, "leave the requests as they are"),
    ],
)
def test_a_wrong_choice_is_refused_for_its_own_reason(function: Callable[..., object], rule: str) -> None:
    assert_refused("06.1", function, rule)


def test_the_engine_holds_a_choice_against_the_rules_too() -> None:
    """On lists that the examination does not know."""

    def mostly(running: list[Request]) -> Request:
        return oldest(running) if len(running) == 6 else choose_victim(running)

    with pytest.raises(Wrong, match=r"with requests .* running"):
        compete(victim_scheduler(mostly))


def test_a_run_without_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e06_victim, "_MAX_STEPS", 20)
    with pytest.raises(Wrong, match="every request must reach its end"):
        compete()


# -- 06.2, a name for a page ----------------------------------------------------------------------


def hash_stub(parent_hash: int, tokens: tuple[int, ...]) -> int:
    raise NotImplementedError


def in_bytes(parent_hash: int, tokens: tuple[int, ...]) -> int:
    data = parent_hash.to_bytes(32, "big") + struct.pack(f"<{len(tokens)}Q", *tokens)
    return int.from_bytes(hashlib.blake2b(data, digest_size=32).digest(), "big")


def in_text(parent_hash: Any, tokens: tuple[int, ...]) -> str:
    """A text can be a key as well."""
    return hashlib.md5(f"{parent_hash}|{','.join(map(str, tokens))}".encode()).hexdigest()


def of_integers(parent_hash: int, tokens: tuple[int, ...]) -> int:
    """Python does not salt the hash of whole numbers; it is easy to collide on purpose, but not by chance."""
    return hash((parent_hash, *tokens))


SEPARATOR = ","


def with_helper(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return _digest(SEPARATOR.join(str(number) for number in (parent_hash, *tokens)))


def _digest(text: str, depth: int = 1) -> int:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _digest(digest, depth - 1) if depth else int(digest[:32], 16)


@pytest.mark.parametrize("function", [block_hash, in_bytes, in_text, of_integers, with_helper])
def test_a_right_hash_is_accepted(function: Callable[..., object]) -> None:
    verdict = assert_accepted("06.2", function)
    assert "found 128 of 210 prompt tokens" in verdict.text
    assert len(verdict.pictures) == 3


def test_the_stub_of_the_hash_is_open() -> None:
    assert_open("06.2", hash_stub)


def test_the_solution_of_the_hash_is_right() -> None:
    assert_accepted("06.2", function_from(solution("06", "06.2"), "block_hash"))


def without_parent(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(0, tokens)


def sum_of_tokens(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return parent_hash * 1_000_003 + sum(tokens)


def unordered(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(parent_hash, tuple(sorted(tokens)))


def as_a_set(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(parent_hash, tuple(dict.fromkeys(tokens)))


def joined(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.sha256("".join(map(str, (parent_hash, *tokens))).encode()).digest(), "big")


def first_token(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(parent_hash, tokens[:1])


def without_last(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(parent_hash, tokens[:-1])


def ends_alone(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(parent_hash, (tokens[0], tokens[-1]))


def address(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return hash((parent_hash, id(tokens)))


def salted(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return hash(str((parent_hash, tokens)))


def salted_bytes(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return hash(repr(tokens).encode()) ^ (parent_hash * 3)


_NUMBERS: dict[tuple[int, tuple[int, ...]], int] = {}


def counted(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return _NUMBERS.setdefault((parent_hash, tokens), len(_NUMBERS) + 1)


def by_chance(parent_hash: int, tokens: tuple[int, ...]) -> float:
    return random.random()


def added_parent(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return parent_hash + block_hash(0, tokens)


def crossed_parent(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return parent_hash ^ block_hash(0, tokens)


def crossed_on_second(parent_hash: int, tokens: tuple[int, ...]) -> int:
    """Tells A B from B A, but a page that comes twice cancels out."""
    own = block_hash(0, tokens)
    return 0 if own == parent_hash else block_hash(parent_hash, tokens)


_EARLIER: dict[int, tuple[int, ...]] = {0: ()}


def page_before_alone(parent_hash: int, tokens: tuple[int, ...]) -> int:
    name = block_hash(0, _EARLIER[parent_hash] + tokens)
    _EARLIER[name] = tokens
    return name


def one_byte_each(parent_hash: int, tokens: tuple[int, ...]) -> int:
    data = parent_hash.to_bytes(32, "big") + bytes(token & 255 for token in tokens)
    return int.from_bytes(hashlib.sha256(data).digest(), "big")


def two_bytes_each(parent_hash: int, tokens: tuple[int, ...]) -> int:
    data = parent_hash.to_bytes(32, "big") + b"".join((t & 65535).to_bytes(2, "big") for t in tokens)
    return int.from_bytes(hashlib.sha256(data).digest(), "big")


def polynomial(parent_hash: int, tokens: tuple[int, ...]) -> int:
    for token in tokens:
        parent_hash = (parent_hash * 31 + token) % 2**64
    return parent_hash


def few_bits(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return block_hash(parent_hash, tokens) % 2**24


def checksum(parent_hash: int, tokens: tuple[int, ...]) -> int:
    return zlib.crc32(repr((parent_hash, tokens)).encode())


def a_list(parent_hash: int, tokens: tuple[int, ...]) -> list[int]:
    return [parent_hash, *tokens]


def nothing(parent_hash: int, tokens: tuple[int, ...]) -> None:
    block_hash(parent_hash, tokens)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (without_parent, "equal pages after different pages must have different names"),
        (sum_of_tokens, "even if their sum is the same"),
        (unordered, "the order of the tokens counts"),
        (as_a_set, "how often a token occurs counts"),
        (joined, "where one token ends and the next begins"),
        (first_token, "every token counts"),
        (without_last, "every token counts"),
        (ends_alone, "every token counts"),
        (address, "the same tokens after the same page must have the same name"),
        (salted, "another process must find the same name"),
        (salted_bytes, "another process must find the same name"),
        (counted, "another process must find the same name"),
        (by_chance, "the same tokens after the same page must have the same name"),
        (added_parent, "A B is not B A"),
        (crossed_parent, "A B is not B A"),
        (crossed_on_second, "a page that comes twice must not cancel out"),
        (page_before_alone, "the whole chain counts"),
        (one_byte_each, "token ids go far above 255"),
        (two_bytes_each, "token ids go far above 65,535"),
        (polynomial, "a weighted sum is not enough"),
        (few_bits, "use enough bits"),
        (checksum, "use enough bits"),
        (a_list, "something else that can be the key of a dictionary"),
        (nothing, "something else that can be the key of a dictionary"),
    ],
)
def test_a_wrong_hash_is_refused_for_its_own_reason(function: Callable[..., object], rule: str) -> None:
    _NUMBERS.clear()
    assert_refused("06.2", function, rule)


def test_a_right_hash_finds_what_the_tree_finds() -> None:
    hashed, exact = ask_all(hashed_pool(block_hash)), ask_all()
    assert hashed.trace.records == exact.trace.records


def test_a_wrong_hash_gives_wrong_tokens_in_the_engine() -> None:
    """Why the parent counts: equal tokens after another page have other keys and values."""
    assert answers(ask_all(hashed_pool(without_parent))) != answers(ask_all(caching=False))


def test_pages_of_a_hashed_pool_are_forgotten_and_found_again() -> None:
    pool = hashed_pool(block_hash)(6, 2)
    for name, length in itertools.product("abc", (5, 9)):
        tokens = [ord(name)] * length
        shared = pool.match(tokens)
        pool.share(name, shared)
        pool.allocate(name, pool.blocks_for(length) - len(shared))
        pool.publish(name, tokens, length)
        check_pool(pool)
        pool.release(name)
        check_pool(pool)
        assert len(pool.match(tokens)) == (length - 1) // 2


def test_a_function_is_sent_with_what_it_uses() -> None:
    calls = [(0, (1, 2)), (7, (3, 4))]
    expected = [repr(with_helper(*call)) for call in calls]
    assert elsewhere.call_elsewhere(with_helper, calls, hash_seed=5) == expected
    factor = 3

    def closure(parent_hash: int, tokens: tuple[int, ...], *, more: int = 1) -> int:
        print("something")
        return parent_hash * factor + more

    assert elsewhere.call_elsewhere(closure, calls, hash_seed=5) == ["1", "22"]


def test_what_cannot_be_sent_or_fails_there_is_no_verdict() -> None:
    def holds_a_generator(parent_hash: int, tokens: tuple[int, ...]) -> int:
        return next(numbers)

    numbers = iter(x for x in (1, 2))
    assert elsewhere.call_elsewhere(holds_a_generator, [(0, (1,))], hash_seed=1) is None
    assert elsewhere.call_elsewhere(with_helper, [("too", "many", "arguments")], hash_seed=1) is None
