"""Exercise 07.2: find the batch from which on a step takes longer to compute than to move."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from labkit import notebook
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import whole
from labkit.exercises.e07_cost import shape_of, step_cost
from labkit.views.style import plural

Cost = Callable[[list[int], list[int]], tuple[float, float]]

T4_BANDWIDTH = 320e9
T4_PEAK = 65e12
"""Bytes and fp16 operations per second of an NVIDIA T4, by the vendor's figures."""


def turning_point(context: int, cost: Cost, bandwidth: float, peak: float) -> int | None:
    """The smallest number of decoding rows for which a step takes at least as long to compute as to move.

    Args:
        context: number of tokens that each row has in the cache; it computes one more.
        cost: function of the tokens that each row computes and those it has in the cache; returns the bytes
            and the operations of the step. Both grow in a straight line with the number of equal rows.
        bandwidth: bytes per second.
        peak: operations per second.

    Returns:
        The number of rows, at least 1; None if there is no such number.
    """
    (moved, computed), (moved_2, computed_2) = cost([1], [context]), cost([1, 1], [context, context])
    row_bytes, row_operations = moved_2 - moved, computed_2 - computed
    gains = row_operations / peak - row_bytes / bandwidth  # seconds that computing gains on moving, a row
    behind = moved / bandwidth - computed / peak  # seconds that it is behind with one row
    if behind <= 0:
        return 1
    if gains <= 0:
        return None
    rows = 1 + math.ceil(behind / gains)
    while rows > 1 and _binds(cost, rows - 1, context, bandwidth, peak):  # rounding may have added one
        rows -= 1
    return rows


def _seconds(cost: Cost, rows: int, context: int, bandwidth: float, peak: float) -> tuple[float, float]:
    moved, computed = cost([1] * rows, [context] * rows)
    return moved / bandwidth, computed / peak


def _binds(cost: Cost, rows: int, context: int, bandwidth: float, peak: float) -> bool:
    to_move, to_compute = _seconds(cost, rows, context, bandwidth, peak)
    return to_compute >= to_move


def _plain(fixed: float, per_token: float, row_operations: float, operations: float = 0) -> Cost:
    """A cost in round numbers: `fixed` bytes and `per_token` bytes for each token in the cache."""

    def cost(num_tokens: list[int], kv_tokens: list[int]) -> tuple[float, float]:
        return fixed + per_token * sum(kv_tokens), operations + row_operations * sum(num_tokens)

    return cost


def _watched(cost: Cost) -> Cost:
    """The same cost, but it refuses a step that nobody needs to ask for."""

    def watched(num_tokens: Sequence[int], kv_tokens: Sequence[int]) -> tuple[float, float]:
        rows = len(num_tokens)
        if rows > _MOST_ROWS or len(kv_tokens) != rows:
            rule = "a step has as many rows in one list as in the other"
            if rows > _MOST_ROWS:
                rule = f"ask for no more than {_MOST_ROWS:,} rows: no answer here is above {_LARGEST:,}"
            raise Wrong(rule, f"cost was asked for lists of {rows:,} and {len(kv_tokens):,} rows")
        return cost(list(num_tokens), list(kv_tokens))

    return watched


def _of_model(name: str, size: int) -> Cost:
    return functools.partial(step_cost, shape=shape_of(name, value_bytes=size), bytes_per_weight=size)


_LARGEST = 3500  # as the notebook says: a search that tries one number after the other ends in time
_MOST_ROWS = 100_000

# What the cost is, the cost itself, context, bandwidth and peak.
_POINTS: tuple[tuple[str, Cost, int, float, float], ...] = (
    ("95 bytes of weights; 10 operations a row", _plain(95, 0, 10), 0, 10.0, 10.0),
    ("5 bytes of weights; 10 operations a row", _plain(5, 0, 10), 0, 10.0, 10.0),
    ("5 bytes of weights; 20 operations, and 10 a row", _plain(5, 0, 10, 20), 0, 10.0, 10.0),
    ("5 bytes of weights, 9 a token; 40 operations, and 10 a row", _plain(5, 9, 10, 40), 2, 10.0, 10.0),
    ("90 bytes of weights; 10 operations a row", _plain(90, 0, 10), 0, 20.0, 30.0),
    ("95 bytes of weights, 1 a token; 10 operations a row", _plain(95, 1, 10), 5, 10.0, 10.0),
    ("95 bytes of weights, 1 a token; 10 operations a row", _plain(95, 1, 10), 40, 10.0, 10.0),
    ("95 bytes of weights, 1 a token; 10 operations a row", _plain(95, 1, 10), 10, 10.0, 10.0),
    ("9,995 bytes of weights, 1 a token; 10 operations a row", _plain(9995, 1, 10), 7, 10.0, 10.0),
    ("SmolLM2 in fp16 on a T4", _of_model("SmolLM2-135M", 2), 0, T4_BANDWIDTH, T4_PEAK),
    ("SmolLM2 in fp32 on a CPU", _of_model("SmolLM2-135M", 4), 128, 20e9, 150e9),
    ("SmolLM2 in fp16 on a T4", _of_model("SmolLM2-135M", 2), 1000, T4_BANDWIDTH, T4_PEAK),
    ("Llama-3.2-1B in fp16 on a T4", _of_model("Llama-3.2-1B", 2), 200, T4_BANDWIDTH, T4_PEAK),
)


def _examine(function: Callable[..., Any]) -> None:
    for name, cost, context, bandwidth, peak in _POINTS:
        returned = function(context, _watched(cost), bandwidth, peak)
        call = f"turning_point({context}, cost, {bandwidth:g}, {peak:g}), where cost is: {name}"
        right = turning_point(context, cost, bandwidth, peak)
        answer = None if returned is None else whole(returned)
        expect(
            returned is None or (answer is not None and answer >= 1),
            "return a whole number of rows, at least 1, or None",
            f"{call}\nreturned {returned!r}",
        )
        if answer == right:
            continue
        if right is None:
            rule = "if each row takes longer to move than to compute, no batch is large enough: return None"
            shown = 1
        elif answer is None:
            rule, shown = "there is such a batch: find it, however large it is", right
        elif answer < right:
            rule, shown = "with so few rows, the step still takes longer to move than to compute", answer
        else:
            rule, shown = (
                "find the smallest batch: a smaller one already takes as long to compute as to move",
                right,
            )
        to_move, to_compute = _seconds(cost, shown, context, bandwidth, peak)
        raise Wrong(
            rule,
            f"{call}\nyours: {answer!r}\nright: {right!r}\nwith {plural(shown, 'row')} the step takes "
            f"{to_move:.3g} s to move and {to_compute:.3g} s to compute",
        )


def _run(function: Callable[..., Any]) -> Run:
    cost = _of_model("SmolLM2-135M", 2)
    contexts = (0, 8, 16, 24, 32, 40, 48, 64, 128)
    yours, package = (
        [one(context, cost, T4_BANDWIDTH, T4_PEAK) for context in contexts]
        for one in (function, turning_point)
    )
    yours = [None if rows is None else int(rows) for rows in yours]
    expect(
        yours == package,
        "with the figures of a T4, it must find the same batches as the package",
        f"tokens in the cache: {list(contexts)}\nyours: {yours}\nright: {package}",
    )
    found = [context for context, rows in zip(contexts, yours, strict=True) if rows is not None]
    sentence = (
        "SmolLM2 in fp16, by the vendor's figures of a T4 (computed, not measured): decode takes as long to "
        f"compute as to move from {yours[0]} rows on if their caches are empty, and from "
        f"{yours[len(found) - 1]:,} rows on if each holds {found[-1]} tokens. With {contexts[len(found)]} "
        "tokens, no batch is large enough."
    )
    picture = notebook.lines(
        contexts,
        {"yours": yours, "the package's": package},
        "Rows from which on decode takes as long to compute as to move (T4, fp16)",
        x_name="tokens in the cache of each row",
        y_name="rows",
        digits=0,
        log="y",
    )
    return Run(sentence, [("Where there is no number, no batch is large enough:", picture)])


TURNING_POINT = Exercise("07.2", "when computing takes over", turning_point, _examine, _run)
