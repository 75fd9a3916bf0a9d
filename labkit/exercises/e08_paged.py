"""Exercise 08.2: attend over pages where they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit import notebook
from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.e08_engine import Read, backend_of, bytes_moved, run_engine
from labkit.exercises.e08_merge import OVERFLOW, made_up_values, merge, state_of


def paged_attention(q: Tensor, read: Read, table: Sequence[int], length: int, size: int) -> Tensor:
    """Attention of some queries over the pages of a request, one page at a time.

    Args:
        q: (heads, dim), already scaled; the query heads that share one key head.
        read: function that lends the keys and the values of a page, each (size, dim).
        table: the pages of the request in order, and others behind them.
        length: number of tokens that the query sees.
        size: number of tokens that a page holds.

    Returns:
        (heads, dim).
    """
    state = state_of(q.new_zeros(len(q), 0), q.new_zeros(0, q.shape[1]))
    for i in range(-(-length // size)):
        keys, values = read(table[i])
        used = min(size, length - i * size)
        state = merge(state, state_of(q @ keys[:used].T, values[:used]))
    _, l, a = state  # noqa: E741
    return a / l


class LargestTensor(TorchFunctionMode):
    """Inside a `with`, watches every operation of PyTorch: `numbers` is the size of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


# -- what is right ---------------------------------------------------------------------------------

_NULL = 99  # fills block tables behind the pages of a request


class _Lender:
    """Lends pages of one key head, one at a time, and overwrites what it lent before.

    Args:
        keys, values: (length, dim) of the request; they fill its pages, and what lies behind them is NaN.
        blocks: the pages of the request.
        size: number of tokens that a page holds.
    """

    def __init__(self, keys: Tensor, values: Tensor, blocks: Sequence[int], size: int) -> None:
        self.reads: Counter[int] = Counter()
        self.size, self.blocks, self.lent = size, list(blocks), []
        both = torch.full((2, len(blocks) * size, keys.shape[1]), torch.nan)
        both[0, : len(keys)], both[1, : len(keys)] = keys, values
        self.pages = {block: both[:, i * size : (i + 1) * size] for i, block in enumerate(blocks)}

    def read(self, block: int) -> tuple[Tensor, Tensor]:
        block = int(block)
        if block not in self.pages:
            what = "the null page" if block == _NULL else f"page {block}, which belongs to another request"
            raise Wrong(
                "read only the pages that hold tokens of this request, the first ceil(length / size)",
                f"its pages are {self.blocks}, and it read {what}",
            )
        self.reads[block] += 1
        for tensor in self.lent:
            tensor.fill_(torch.nan)
        self.lent = list(self.pages[block].clone().unbind(0))
        return self.lent[0], self.lent[1]


# Tokens, page size, query heads, dimensions of a head, and a factor for the queries.
_SHAPES = (
    (1, 1, 1, 2, 1.0),
    (3, 4, 1, 2, 1.0),
    (4, 4, 2, 2, 1.0),
    (5, 4, 2, 2, 1.0),
    (12, 4, 3, 4, 400.0),
    (150, 4, 3, 8, 1.0),
    (149, 16, 3, 8, 1.0),
)


def _examine(function: Callable[..., Any]) -> None:
    for length, size, heads, dim, strength in _SHAPES:
        used = -(-length // size)
        keys, values = made_up_values(length, dim).float().roll(1, 0), made_up_values(length, dim).float()
        q = made_up_values(heads, dim).float() * strength + 0.25
        blocks = [(7 * i + 5) % 89 for i in range(used)]
        table = [*blocks, _NULL, _NULL]
        lender = _Lender(keys, values, blocks, size)
        told = f"length = {length}, size = {size}, table = {_short(table)}"
        with LargestTensor() as most:
            got = function(q.clone(), lender.read, list(table), length, size)
        if not isinstance(got, Tensor) or got.shape != q.shape:
            what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise Wrong("return the weighted mean of the values, (heads, dim)", f"{told}: it returned {what}")
        scores = q.double() @ keys.double().T
        want = scores.softmax(-1) @ values.double()
        if got.isnan().any():
            rule = (
                "behind the last token of the request a page may hold anything, and the next `read` "
                "overwrites what was lent: use `keys[:used]` and `values[:used]` before you read on"
            )
            if strength > 1:
                rule = OVERFLOW
            raise Wrong(rule, f"{told}: the result is NaN")
        off = float((got.double() - want).abs().max())
        read = sum(lender.reads.values())
        expect(
            off < 1e-4,
            "the result must be softmax(q @ keys.T) @ values",
            f"{told}: yours is off by {off:.2g}",
        )
        again = [block for block, count in lender.reads.items() if count > 1]
        what = f"{told}: {read} reads of {used} pages; page {again[0] if again else ''} more than once"
        expect(not again, "read each page once: its keys and its values come together", what)
        allowed = 2 * max(size * dim, heads * dim, heads * size)
        expect(
            most.numbers <= allowed,
            "keep one page at a time: no tensor may grow with the length",
            f"{told}: your largest tensor has {most.numbers:,} numbers, a page has {2 * size * dim:,}",
        )


def _short(table: Sequence[int]) -> str:
    return (
        str(list(table)) if len(table) < 9 else f"[{', '.join(map(str, table[:4]))}, ... {len(table)} pages]"
    )


def _run(function: Callable[..., Any]) -> Run:
    gathered = in_place = reads = 0

    def counted(q: Tensor, read: Read, table: Sequence[int], length: int, size: int) -> Tensor:
        def counting(block: int) -> tuple[Tensor, Tensor]:
            nonlocal reads, in_place
            keys, values = read(block)
            reads += 1
            in_place += keys.nbytes + values.nbytes
            return keys, values

        return function(q, counting, table, length, size)

    backend = backend_of(counted)

    def decode(
        first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> Sequence[Any]:
        nonlocal gathered
        gathered += len(cache.blocks) * bytes_moved(rows, cache)[0]
        return backend.decode(first, rows, cache, windows)

    trace, answers = run_engine(replace(backend, decode=decode))
    _, own = run_engine()
    expect(answers == own, "the engine must write the same tokens with it", f"yours: {answers}\nright: {own}")
    picture = notebook.bars(
        {"gathered, as PyTorch needs it": gathered / 1024, "in place, yours": in_place / 1024},
        "Keys and values moved for all decode steps",
        unit="KiB",
    )
    sentence = (
        f"The engine wrote {sum(map(len, answers.values()))} tokens with it, the same as its own. Yours read "
        f"{reads:,} pages of a head; gathering moves {gathered / in_place:.1f} times the bytes."
    )
    return Run(sentence, [("What it saved:", picture), ("Your run:", notebook.timeline(trace))])


PAGED = Exercise("08.2", "attend over pages where they lie", paged_attention, _examine, _run)
