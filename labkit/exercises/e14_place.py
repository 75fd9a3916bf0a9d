"""Exercise 14.2: prompts are computed in one engine; choose the one in which each answer grows."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from labkit import notebook
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import Job, answers, exactly, few, prompt_of, tiny_engine, whole
from labkit.transfer import KVPages, export_kv, import_kv

PAGE = 4
SEATS = 4
POOLS = (60, 24, 24)
"""Pages of the engines in which answers grow."""


class Decoder(NamedTuple):
    """What a policy knows of an engine in which answers grow.

    Seats and pages are free as long as nobody has arrived to take them: the prompts in `coming` will.

    Attributes:
        free_seats: The number of free seats.
        free_pages: The number of free pages.
        coming: The lengths of the prompts that are on their way here.
        keys: How many tokens' keys and values each of its steps reads: those of all that run.
    """

    free_seats: int
    free_pages: int
    coming: tuple[int, ...]
    keys: int


Place = Callable[[int, list[Decoder], int], int | None]


def place(prompt_tokens: int, decoders: list[Decoder], page_size: int) -> int | None:
    """The engine with a seat, and pages for the prompt and one token more, that reads the fewest keys."""

    def pages(tokens: int) -> int:
        return -(-(tokens + 1) // page_size)

    def fits(decoder: Decoder) -> bool:
        room = decoder.free_pages - sum(map(pages, decoder.coming))
        return decoder.free_seats > len(decoder.coming) and room >= pages(prompt_tokens)

    def load(index: int) -> int:
        return decoders[index].keys + sum(decoders[index].coming)

    return min((i for i, decoder in enumerate(decoders) if fits(decoder)), key=load, default=None)


# -- what is right --------------------------------------------------------------------------------

_SHAPE = "return the index of an engine, from 0 on, or None if the prompt must wait"
_LEAVE = "leave the list of engines as it is"
_SEAT = "an answer needs a free seat, and each prompt that is on its way takes one of them"
_ROOM = "there must be pages for the prompt and one more token, beside those of the prompts on their way"
_WAIT = "where no engine has a seat and room for it, the prompt waits: None"
_NOT_WAIT = "a prompt waits only if no engine has a seat and room for it"
_KEYS = (
    "of the engines with a seat and room, take the one with the fewest keys to read, those coming included"
)

_NOTHING: tuple[int, ...] = ()
# The length of a prompt, the engines, and the rule that a wrong answer breaks. Pages of 4 tokens.
_CASES: tuple[tuple[int, tuple[Decoder, ...], str], ...] = (
    (5, (Decoder(1, 9, _NOTHING, 0),), _NOT_WAIT),
    (5, (Decoder(0, 9, _NOTHING, 40),), _WAIT),
    (5, (Decoder(2, 1, _NOTHING, 40),), _WAIT),
    (5, (Decoder(0, 9, _NOTHING, 8), Decoder(1, 9, _NOTHING, 30)), _SEAT),
    (5, (Decoder(1, 9, (6,), 3), Decoder(1, 9, _NOTHING, 30)), _SEAT),
    (9, (Decoder(3, 2, _NOTHING, 4), Decoder(1, 9, _NOTHING, 30)), _ROOM),
    (8, (Decoder(3, 2, _NOTHING, 4), Decoder(1, 9, _NOTHING, 30)), _ROOM),  # one more token, one more page
    (8, (Decoder(3, 5, (7, 3), 4), Decoder(1, 4, _NOTHING, 30)), _ROOM),
    (7, (Decoder(2, 2, _NOTHING, 50), Decoder(0, 9, _NOTHING, 0)), _NOT_WAIT),
    (7, (Decoder(3, 4, (7,), 12), Decoder(0, 9, _NOTHING, 0)), _NOT_WAIT),
    (5, (Decoder(1, 9, _NOTHING, 40), Decoder(1, 9, _NOTHING, 20)), _KEYS),
    (5, (Decoder(3, 90, _NOTHING, 40), Decoder(1, 9, _NOTHING, 20)), _KEYS),
    (5, (Decoder(3, 20, (30,), 10), Decoder(2, 9, _NOTHING, 20)), _KEYS),
    (5, (Decoder(3, 20, (8, 9), 0), Decoder(2, 9, _NOTHING, 20)), _KEYS),
)


def _examine(function: Callable[..., Any]) -> None:
    for prompt, decoders, rule in _CASES:
        _ask(function, prompt, decoders, 4, rule)
    rng = random.Random(14)
    for _ in range(300):
        size, count = rng.choice((1, 2, 4, 8, 16)), rng.randrange(1, 6)
        decoders = tuple(
            Decoder(
                rng.randrange(4),
                rng.randrange(1, 120 // size + 2),
                tuple(rng.randrange(1, 40) for _ in range(rng.choice((0, 0, 1, 2)))),
                rng.randrange(200),
            )
            for _ in range(count)
        )
        _ask(function, rng.randrange(1, 60), decoders, size, "")


def _ask(
    function: Callable[..., Any], prompt: int, decoders: tuple[Decoder, ...], size: int, rule: str
) -> None:
    given = list(decoders)
    returned = function(prompt, given, size)
    told = f"a prompt of {prompt} tokens, pages of {size}\n"
    told += "\n".join(f"engine {i}: {_told(decoder)}" for i, decoder in enumerate(decoders))
    told += f"\nyours: {returned!r}"
    expect(tuple(given) == decoders, _LEAVE, told)
    index = None if returned is None else whole(returned)
    if isinstance(returned, bool) or (returned is not None and index is None):
        raise Wrong(_SHAPE, told)
    expect(index is None or 0 <= index < len(decoders), _SHAPE, told)
    right = _right(prompt, decoders, size)
    told += f"\nright: {' or '.join(map(str, right)) if right else None}"
    if index is None:
        expect(not right, rule or _NOT_WAIT, told)
    elif index not in right:
        seat, room = _has(decoders[index], prompt, size)
        broken = _WAIT if not right else _SEAT if not seat else _ROOM if not room else _KEYS
        raise Wrong(broken, told)


def _told(decoder: Decoder) -> str:
    coming = f"prompts of {few(decoder.coming)} coming" if decoder.coming else "nobody coming"
    seats, pages, _, keys = decoder
    return f"{seats} free seats, {pages} free pages, {coming}, {keys} keys"


def _has(decoder: Decoder, prompt: int, size: int) -> tuple[bool, bool]:
    """Whether an engine has a seat and whether it has room."""
    taken = sum(-(-(tokens + 1) // size) for tokens in decoder.coming)
    seat = decoder.free_seats - len(decoder.coming) > 0
    return seat, decoder.free_pages - taken >= -(-(prompt + 1) // size)


def _right(prompt: int, decoders: Sequence[Decoder], size: int) -> list[int]:
    """All engines that the rules allow; none if the prompt must wait."""
    fit = {
        i: decoder.keys + sum(decoder.coming)
        for i, decoder in enumerate(decoders)
        if all(_has(decoder, prompt, size))
    }
    return [i for i, load in fit.items() if load == min(fit.values())]


# -- with real engines, in steps ------------------------------------------------------------------


@dataclass
class Fleet:
    """What became of a load.

    Attributes:
        ticks: The number of rounds, in each of which every engine can make a step.
        again: The number of prompt tokens that were computed again, because their pages were evicted.
        answers: The tokens of each answer.
    """

    ticks: int = 0
    again: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)


def load() -> list[Job]:
    """Forty requests of uneven length, of which a few come at once."""
    rng = random.Random(1)
    return [
        Job(rng.choice((6, 9, 14, 40, 62)), rng.choice((4, 8, 16)), step=4 * (n // 3), name=str(n))
        for n in range(40)
    ]


def serve_apart(choose: Place, travel: int = 3) -> Fleet:
    """Compute prompts in one engine, and let their answers grow in three others.

    Args:
        choose: the policy. A prompt for which it returns None waits, and those behind it do as well.
        travel: after how many rounds the pages of a prompt arrive.
    """
    jobs = load()
    sizes = {"block_size": PAGE, "max_num_seqs": SEATS, "max_num_batched_tokens": 48}
    prefill = tiny_engine(num_blocks=400, **sizes)
    engines = [tiny_engine(num_blocks=num_blocks, **sizes) for num_blocks in POOLS]
    prompts = {job.name: prompt_of(n, job.prompt_tokens) for n, job in enumerate(jobs)}
    lengths = {job.name: job.answer_tokens for job in jobs}
    ready: list[tuple[str, KVPages]] = []
    travelling: list[tuple[int, int, str, KVPages]] = []  # when it arrives, where, whose, what
    fleet = Fleet()
    for fleet.ticks in itertools.count():
        for job in jobs:
            if job.step == fleet.ticks:
                prefill.add_request(prompts[job.name], exactly(1), request_id=job.name)
        if prefill.has_unfinished:
            for end in prefill.step().finished:
                ready.append((end.request_id, export_kv(prefill, prompts[end.request_id])))
        while ready:
            name, pages = ready[0]
            seen = [_seen(engine, i, travelling, prompts) for i, engine in enumerate(engines)]
            index = choose(len(prompts[name]), seen, PAGE)
            if index is None:
                break
            travelling.append((fleet.ticks + travel, int(index), name, pages))
            del ready[0]
        for arrival in [one for one in travelling if one[0] == fleet.ticks]:
            travelling.remove(arrival)
            _, index, name, pages = arrival
            import_kv(engines[index], pages, compare=False)
            engines[index].add_request(prompts[name], exactly(lengths[name]), request_id=name)
        for engine in engines:
            if engine.has_unfinished:
                record = engine.step()
                fleet.again += sum(max(0, row.num_tokens - PAGE) for row in record.rows)
        done = sum(output.finished for engine in engines for output in engine.outputs.values())
        if done == len(jobs):
            break
        if fleet.ticks > 3000:
            raise Wrong(_NOT_WAIT, f"after {fleet.ticks} rounds {done} of {len(jobs)} answers were done")
    for engine in engines:
        fleet.answers |= answers(engine)
    return fleet


def _seen(
    engine: Engine, index: int, travelling: Sequence[tuple[int, int, str, KVPages]], prompts: dict[str, Any]
) -> Decoder:
    known = list(engine.scheduler.requests.values())
    running = [request for request in known if request.status == "running"]
    coming = [len(prompts[name]) for _, where, name, _ in travelling if where == index]
    coming += [len(request.token_ids) for request in known if request.status != "running"]
    keys = sum(len(request.token_ids) for request in running)
    return Decoder(SEATS - len(running), engine.pool.num_free, tuple(coming), keys)


def in_turn() -> Place:
    """A policy that asks nobody."""
    turns = itertools.count()
    return lambda prompt_tokens, decoders, page_size: next(turns) % len(decoders)


def most_pages(prompt_tokens: int, decoders: list[Decoder], page_size: int) -> int:
    """A policy that takes the engine with the most free pages as it stands, and never lets a prompt wait."""
    return max(range(len(decoders)), key=lambda i: decoders[i].free_pages)


@functools.cache
def whole_answers() -> dict[str, list[int]]:
    """What one engine answers, which computes prompts itself."""
    engine = tiny_engine(num_blocks=400, block_size=PAGE)
    for n, job in enumerate(load()):
        engine.add_request(prompt_of(n, job.prompt_tokens), exactly(job.answer_tokens), request_id=job.name)
    while engine.has_unfinished:
        engine.step()
    return answers(engine)


def _run(function: Callable[..., Any]) -> Run:
    yours, others = serve_apart(function), {"in turn": in_turn(), "most free pages": most_pages}
    expect(yours.answers == whole_answers(), "the answers are those of one engine")
    found = {"yours": yours} | {name: serve_apart(way) for name, way in others.items()}
    turn = found["in turn"]
    sentence = (
        f"{len(yours.answers)} prompts were placed with it: all were done after {yours.ticks} rounds (in "
        f"turn: {turn.ticks}), and {yours.again} of their tokens were computed again (in turn: {turn.again})."
    )
    again = {name: fleet.again for name, fleet in found.items()}
    return Run(sentence, [("What a wrong place costs:", notebook.bars(again, "Tokens computed again"))])


PLACE = Exercise("14.2", "choose where an answer grows", place, _examine, _run)
