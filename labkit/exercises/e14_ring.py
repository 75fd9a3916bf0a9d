"""Exercise 14.3: the sum over all processes as a ring, piece by piece, with no byte too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit import notebook
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import answers, serve, truth, whole
from labkit.exercises.e14_layers import JOBS, WORLD, engine_of, right_answers
from labkit.exercises.e14_split import split

Round = tuple[int, int, bool]
Ring = Callable[[int, int], Sequence[Round]]


def ring(rank: int, world_size: int) -> list[Round]:
    """The piece that a process sends in each round, the one it gets, and whether that is added to its own."""
    rounds = []
    for turn in range(2 * (world_size - 1)):
        sends = (rank - turn) % world_size
        rounds.append((sends, (sends - 1) % world_size, turn < world_size - 1))
    return rounds


# -- what is right --------------------------------------------------------------------------------

_SHAPE = "return a list of rounds: (the piece it sends, the piece it gets, True if that is added to its own)"
_PIECE = "pieces are numbered from 0 to world_size - 1"
_ALIKE = "all processes have equally many rounds"
_NEIGHBOUR = "a process gets the piece that the one before it sends in the same round"
_TWICE = "no process's numbers are in a piece twice"
_DONE = "in the end every process has every piece with the numbers of all"
_MOST = "2 (p - 1) rounds are enough: with more, each sends more than 2 (p - 1) / p of the tensor"


def _examine(function: Callable[..., Any]) -> None:
    for size in (1, 2, 3, 4, 5, 2, 7, 8):
        found = [_read(function(rank, size), rank, size) for rank in reversed(range(size))][::-1]
        told = "\n".join(f"process {rank}: {rounds}" for rank, rounds in enumerate(found))
        expect(len({len(rounds) for rounds in found}) == 1, _ALIKE, told)
        _follow(found, size)
        expect(len(found[0]) <= 2 * (size - 1), _MOST, f"{size} processes, {len(found[0])} rounds")


def _read(rounds: Any, rank: int, size: int) -> list[Round]:
    told = f"process {rank} of {size}\nyours: {rounds!r}"
    try:
        triples = [(sends, gets, adds) for sends, gets, adds in rounds]
    except (TypeError, ValueError):
        raise Wrong(_SHAPE, told) from None
    found = []
    for sends, gets, adds in triples:
        pieces, added = (whole(sends), whole(gets)), truth(adds)
        if added is None or None in pieces or isinstance(sends, bool) or isinstance(gets, bool):
            raise Wrong(_SHAPE, told)
        expect(all(piece is not None and 0 <= piece < size for piece in pieces), _PIECE, told)
        found.append((int(sends), int(gets), added))
    return found


def _follow(found: Sequence[Sequence[Round]], size: int) -> None:
    """Follow whose numbers are in which piece of which process."""
    held = [[Counter([rank]) for _ in range(size)] for rank in range(size)]
    for turn, rounds in enumerate(zip(*found, strict=True)):
        sent = [Counter(held[rank][sends]) for rank, (sends, _, _) in enumerate(rounds)]
        for rank, (_, gets, adds) in enumerate(rounds):
            before = (rank - 1) % size
            told = f"{size} processes, round {turn}\nprocess {before} sends piece {rounds[before][0]}\n"
            expect(rounds[before][0] == gets, _NEIGHBOUR, f"{told}process {rank} gets piece {gets}")
            held[rank][gets] = held[rank][gets] + sent[before] if adds else sent[before]
            told += f"process {rank} has in it then: {_whose(held[rank][gets])}"
            expect(max(held[rank][gets].values()) == 1, _TWICE, told)
    for rank, pieces in enumerate(held):
        for piece, inside in enumerate(pieces):
            told = f"process {rank}, piece {piece}: {_whose(inside)}"
            expect(len(inside) == size, _DONE, f"{size} processes, {len(found[0])} rounds\n{told}")


def _whose(inside: Counter[int]) -> str:
    ranks = ", ".join(str(rank) for rank in sorted(inside.elements()))
    return f"the numbers of process {ranks}"


# -- in the engine --------------------------------------------------------------------------------


class RingSum:
    """Adds tensors of several processes up by a plan, and counts the bytes that each of them sends."""

    def __init__(self, plan: Ring) -> None:
        self.plan = plan
        self.sent = self.tensors = 0  # bytes: of the process that sent most, and of what was added up

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum, once for each tensor."""
        size = len(tensors)
        held = [list(tensor.flatten().tensor_split(size)) for tensor in tensors]
        sent_by = [0] * size
        for rounds in zip(*(self.plan(rank, size) for rank in range(size)), strict=True):
            sent = [held[rank][int(sends)] for rank, (sends, _, _) in enumerate(rounds)]
            for rank, (_, gets, adds) in enumerate(rounds):
                came = sent[(rank - 1) % size]
                held[rank][int(gets)] = held[rank][int(gets)] + came if adds else came
            for rank, piece in enumerate(sent):
                sent_by[rank] += piece.nbytes
        self.sent += max(sent_by)
        self.tensors += tensors[0].nbytes
        return [torch.cat(pieces).view_as(tensors[0]) for pieces in held]


def _run(function: Callable[..., Any]) -> Run:
    add = RingSum(function)
    engine = serve(engine_of(split, add), JOBS)
    expect(answers(engine) == right_answers(), "with your sums come the tokens of the whole model")
    sizes = range(2, 9)
    shares = []
    for size in sizes:
        one = RingSum(function)
        one([torch.full((size, 8), float(rank)) for rank in range(size)])
        shares.append(round(one.sent / one.tensors, 2))
    picture = notebook.lines(
        list(sizes),
        {"your ring": shares, "each sends all to all": [size - 1 for size in sizes]},
        "What each process sends, in sizes of the tensor",
        x_name="processes",
        y_name="times the tensor",
        digits=2,
    )
    sentence = (
        f"The engine ran {len(JOBS)} requests and added up its {WORLD} parts with it: the same tokens, and "
        f"each process sent {add.sent:,} bytes for {add.tensors:,} bytes of sums. With 8 it would be "
        f"{shares[-1]:g} times the tensor."
    )
    return Run(sentence, [("Why a ring:", picture)])


RING = Exercise("14.3", "a sum in a ring (bonus)", ring, _examine, _run)
