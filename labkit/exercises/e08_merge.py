"""Exercise 08.1: unite the softmaxes of two sets of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit import notebook
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.e08_engine import Read, backend_of, run_engine

State = tuple[Tensor, Tensor, Tensor]

# -- partial softmaxes -----------------------------------------------------------------------------


def state_of(scores: Tensor, values: Tensor) -> State:
    """The state of a set of tokens, from their scores (heads, n) and their values (n, dim).

    Returns:
        m (heads, 1), the largest score; l (heads, 1), the sum of exp(score - m); a (heads, dim), the sum of
        exp(score - m) * value. For a head that sees nothing, m is minus infinity, and l and a are 0.
    """
    nothing = scores.new_full((len(scores), 1), -torch.inf)
    m = scores.amax(-1, keepdim=True) if scores.shape[1] else nothing
    weights = torch.exp(scores - finite(m))
    return m, weights.sum(-1, keepdim=True), weights @ values


def merge(one: State, other: State) -> State:
    """The state of two sets of tokens together: both are brought to the larger maximum, then they add up."""
    (m1, l1, a1), (m2, l2, a2) = one, other
    m = torch.maximum(m1, m2)
    w1, w2 = torch.exp(m1 - finite(m)), torch.exp(m2 - finite(m))
    return m, l1 * w1 + l2 * w2, a1 * w1 + a2 * w2


def finite(m: Tensor) -> Tensor:
    """A maximum that can be subtracted: -inf less -inf is no number."""
    return m.clamp(min=torch.finfo(m.dtype).min)


# -- what is right ---------------------------------------------------------------------------------


def made_up_values(n: int, dim: int = 2) -> Tensor:
    """Values (n, dim) between -2 and 2, fp64, the same everywhere."""
    return (torch.arange(n * dim, dtype=torch.float64).view(n, dim) * 7 % 9 - 4) / 2


def _ramp(heads: int, n: int, top: float = 0.0) -> Tensor:
    """Scores (heads, n), fp64, whose new maxima come late."""
    at = torch.arange(n, dtype=torch.float64)
    return torch.stack([(at * (5 + 2 * head) % 11) / 3 + at / 7 for head in range(heads)]) + top


_INF = math.inf
_M = "for each head, m of two sets together is the larger of their two maxima"
_L = "l must be brought to the new maximum before it is added: multiply it by exp(old maximum - new maximum)"
_A = "a must be brought to the new maximum before it is added, as l is"
OVERFLOW = "nothing may overflow: take exp only of an old maximum less the new one, which is never above 0"
_EMPTY = (
    "a set of no tokens (m = -inf, l = 0, a = 0) changes nothing, and two such sets give one: "
    "-inf less -inf is no number"
)
_HEADS = "each head has a maximum of its own, and may have seen nothing while another has"

# Scores (heads, n) of two sets, and the rule that the case is about.
_CASES: tuple[tuple[list[list[float]], list[list[float]], str], ...] = (
    ([[0.0]], [[0.0]], "for two sets with the same maximum, l and a add up as they are"),
    ([[0.0]], [[1.0]], ""),
    ([[1.0]], [[0.0]], ""),
    ([[0.0], [2.0]], [[1.0], [-1.0]], _HEADS),
    ([[1000.0, 990.0]], [[995.0]], OVERFLOW),
    ([[-1000.0]], [[-1002.0, -1001.0]], OVERFLOW),
    ([[0.5]], [[-_INF]], _EMPTY),
    ([[-_INF]], [[0.5, 1.0]], _EMPTY),
    ([[-_INF]], [[-_INF]], _EMPTY),
    ([[-_INF], [1.0]], [[0.0], [2.0]], _HEADS),
    ([[-_INF], [1.0]], [[-_INF], [2.0]], _HEADS),
)


def _examine(function: Callable[..., Any]) -> None:
    for first, second, rule in _CASES:
        one, two = (torch.tensor(scores, dtype=torch.float32) for scores in (first, second))
        values = made_up_values(one.shape[1] + two.shape[1]).float()
        _merged(function, one, two, values, rule)
    for n in (1, 3, 100):  # sets of unequal size, with several heads
        scores, values = _ramp(3, n + 2), made_up_values(n + 2, 4)
        _merged(function, scores[:, :n], scores[:, n:], values, "")
    for gap in (6.0, 12.0, 25.0):  # in double precision even a small weight is seen
        small, large = torch.tensor([[0.0, -gap]]).double(), torch.tensor([[-gap, 0.5 - gap]]).double()
        _merged(function, small.T, large.T, torch.tensor([[1.0], [-3.0]]).double(), "", close=1e-12)
    _in_any_order(function)


def _merged(
    function: Callable[..., Any], one: Tensor, two: Tensor, values: Tensor, rule: str, close: float = 5e-4
) -> None:
    """Compare the united state of two sets with the state of all their tokens.

    Args:
        close: most that it may be off, smaller than any mistake; an answer that uses logarithms loses digits
            in fp32 at scores of 1000.
    """
    n = one.shape[1]
    states = state_of(one, values[:n]), state_of(two, values[n:])
    kept = [tuple(part.clone() for part in state) for state in states]
    got = _state(function(*states), states[0])
    told = f"merge({_told(kept[0])},\n      {_told(kept[1])})\nyours: {_told(got)}"
    for state, before in zip(states, kept, strict=True):
        same = all(map(torch.equal, state, before))
        expect(same, "leave the two states as they are: make new tensors", told)
    want = state_of(torch.cat((one, two), 1).double(), values.double())
    told += f"\nright: {_told(want)}"
    if not all(part.isfinite().all() for part in got[1:]) or got[0].isnan().any():
        raise Wrong(rule or OVERFLOW, told)
    for own, true, name_rule in zip(got, want, (_M, _L, _A), strict=True):
        fine = torch.allclose(own.double(), true, rtol=close, atol=close)
        expect(fine, name_rule if not rule or rule is OVERFLOW else f"{rule}; {name_rule}", told)
    theirs = {part.untyped_storage().data_ptr() for state in states for part in state}
    new = all(part.untyped_storage().data_ptr() not in theirs for part in got)
    late = rule is _EMPTY or close < 5e-4  # before, another mistake shows better what is wrong
    expect(
        new or not late,
        "make new tensors: whoever changes what you return must not change what you were given",
        told,
    )


def _in_any_order(function: Callable[..., Any]) -> None:
    scores, values = _ramp(2, 37, top=300.0), made_up_values(37, 3)
    _, l, a = state_of(scores, values)  # noqa: E741
    for seed in range(4):
        rng, states, at = random.Random(seed), [], 0
        while at < 37:
            n = rng.randrange(1, 9)
            states.append(state_of(scores[:, at : at + n], values[at : at + n]))
            at += n
        rng.shuffle(states)
        blocks = len(states)
        while len(states) > 1:  # in pairs, any of them
            pair = states.pop(rng.randrange(len(states))), states.pop(rng.randrange(len(states)))
            states.append(_state(function(*pair), pair[0]))
        off = float((states[0][2] / states[0][1] - a / l).abs().max())
        what = f"37 tokens in {blocks} unequal sets, merged in a random order in float64: off by {off:.2g}"
        expect(
            off < 1e-12,
            "the result must not depend on how the tokens are divided into sets, or on the order of the sets",
            what,
        )


def _state(got: Any, like: State) -> State:
    """What a function returned, if it is a state."""
    rule = "return three tensors (m, l, a) with the shapes of those that it was given"
    if not isinstance(got, tuple | list) or len(got) != 3 or not all(isinstance(x, Tensor) for x in got):
        raise Wrong(rule, f"it returned {got!r}")
    for name, own, given in zip("mla", got, like, strict=True):
        same = own.shape == given.shape and own.dtype == given.dtype
        told = (
            f"{name} has shape {tuple(own.shape)} in {own.dtype}, not {tuple(given.shape)} in {given.dtype}"
        )
        expect(same, rule, told)
    return tuple(got)


def _told(state: Sequence[Tensor]) -> str:
    def shown(part: Tensor) -> str:
        if part.numel() > 12:
            return f"{tuple(part.shape)} ..."
        # A row of one number is shown as a number: m = [0, 2] has two heads.
        rows = [[f"{x:.4g}" for x in row] for row in part.tolist()]
        texts = [row[0] if len(row) == 1 else f"[{', '.join(row)}]" for row in rows]
        return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"

    return "(" + ", ".join(f"{name} = {shown(part)}" for name, part in zip("mla", state, strict=True)) + ")"


def _run(function: Callable[..., Any]) -> Run:
    merges, longest = 0, [state_of(torch.zeros(1, 0), torch.zeros(0, 1))]

    def attention(q: Tensor, read: Read, table: Sequence[int], length: int, size: int) -> Tensor:
        nonlocal merges, longest
        states = []
        for i in range(-(-length // size)):
            keys, values = read(table[i])
            used = min(size, length - i * size)
            state = state_of(q @ keys[:used].T, values[:used])
            states.append(function(states[-1], state) if states else state)
        merges += len(states) - 1
        if len(states) > len(longest):
            longest = states
        _, l, a = states[-1]  # noqa: E741
        return a / l

    trace, answers = run_engine(backend_of(attention))
    _, own = run_engine()
    expect(answers == own, "the engine must write the same tokens with it", f"yours: {answers}\nright: {own}")
    curves = {
        "m, the maximum so far": [round(float(m[0, 0]), 2) for m, _, _ in longest],
        "l, the sum so far": [round(float(total[0, 0]), 2) for _, total, _ in longest],
    }
    picture = notebook.lines(
        range(1, len(longest) + 1),
        curves,
        "One head of request a while its pages stream by",
        x_name="pages seen",
        y_name="m and l",
        digits=2,
    )
    sentence = (
        f"The engine wrote {sum(map(len, answers.values()))} tokens with it, {merges:,} merges in all: "
        "the same tokens as with its own attention."
    )
    return Run(sentence, [("Your run:", notebook.timeline(trace)), ("Inside it:", picture)])


MERGE = Exercise("08.1", "unite two partial softmaxes", merge, _examine, _run)
