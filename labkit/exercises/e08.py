"""Exercises of notebook 08: unite partial softmaxes, and attend over pages where they lie."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit import notebook
from labkit.config import EngineConfig
from labkit.core.attention import Span
from labkit.core.kv_cache import PagedKVCache
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.kernels.backend import Backend
from labkit.kernels.gathered_sdpa import SDPA, gathered_chunks, gathered_rows, static_rows
from labkit.models.load import LoadedModel, load_model
from labkit.trace.trace import Trace

State = tuple[Tensor, Tensor, Tensor]
Read = Callable[[int], tuple[Tensor, Tensor]]
PagedAttention = Callable[[Tensor, Read, Sequence[int], int, int], Tensor]

# -- partial softmaxes -----------------------------------------------------------------------------


def state_of(scores: Tensor, values: Tensor) -> State:
    """What is known of some tokens, from their scores (heads, n) and their values (n, dim).

    Returns:
        m (heads, 1), the largest score; l (heads, 1), the sum of exp(score - m); a (heads, dim), the sum of
        exp(score - m) * value. Where nothing is to be seen, m is minus infinity, and l and a are 0.
    """
    nothing = scores.new_full((len(scores), 1), -torch.inf)
    m = scores.amax(-1, keepdim=True) if scores.shape[1] else nothing
    weights = torch.exp(scores - _finite(m))
    return m, weights.sum(-1, keepdim=True), weights @ values


def merge(one: State, other: State) -> State:
    """The state of two sets of tokens together: each is brought to the larger maximum, then they add up."""
    (m1, l1, a1), (m2, l2, a2) = one, other
    m = torch.maximum(m1, m2)
    w1, w2 = torch.exp(m1 - _finite(m)), torch.exp(m2 - _finite(m))
    return m, l1 * w1 + l2 * w2, a1 * w1 + a2 * w2


def _finite(m: Tensor) -> Tensor:
    """A maximum that can be subtracted: infinity less infinity is no number."""
    return m.clamp(min=torch.finfo(m.dtype).min)


def paged_attention(q: Tensor, read: Read, table: Sequence[int], length: int, size: int) -> Tensor:
    """Attention of a query over its pages, one page at a time.

    Args:
        q: (heads, dim), already scaled; the heads that share one key head.
        read: gives the keys and the values of a page, each (size, dim).
        table: the pages of the request in order, and others behind them.
        length: tokens that the query sees.
        size: tokens to a page.

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
    """While it is entered, sees what every operation of PyTorch gives: `numbers` in the largest tensor."""

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


# -- in the engine ---------------------------------------------------------------------------------


@dataclass
class PagedRows:
    """Rows of a single query each, given to a function one by one, and one key head at a time.

    `tables` and `lengths` are the pages and the tokens of each row.
    """

    first: int
    last: int
    tables: list[Sequence[int]]
    lengths: list[int]
    cache: PagedKVCache
    attention: PagedAttention

    def attend(self, q: Tensor, pages: Tensor, *, scale: float, window: int | None) -> Tensor:
        if window is not None:
            raise ValueError("these rows know no sliding window")
        out = torch.empty_like(q)
        group = q.shape[1] // self.cache.num_kv_heads
        for row, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            for head in range(self.cache.num_kv_heads):
                mine = slice(head * group, (head + 1) * group)  # query heads that share this key head
                read = functools.partial(_read, pages, head)
                out[row, mine] = self.attention(
                    q[row, mine] * scale, read, table, length, self.cache.block_size
                )
        return out


def _read(pages: Tensor, head: int, block: int) -> tuple[Tensor, Tensor]:
    """The keys and the values of one head in one page, each (block_size, head_dim): views, no copies."""
    keys, values = pages[block]
    return keys[head], values[head]


def backend_of(attention: PagedAttention) -> Backend:
    """An attention backend whose decode rows go through a function; the others through PyTorch's."""

    def decode(
        first: int, rows: Sequence[Span], cache: PagedKVCache, windows: Sequence[int | None]
    ) -> list[PagedRows]:
        tables, lengths = [row.table for row in rows], [row.length for row in rows]
        return [PagedRows(first, first + len(rows), tables, lengths, cache, attention)]

    return Backend("yours", "a function of a notebook", decode, gathered_chunks, static_rows)


_PROMPTS = ("the sea is", "a prime number is one that", "once upon a time there was a very old house by the")
_ANSWERS = (30, 22, 12)
_SIZE = 4


def serve(backend: Backend = SDPA) -> tuple[Trace, dict[str, list[int]]]:
    """Three requests on the real engine with tiny-random, over pages of 4 tokens.

    Returns:
        The trace, and the tokens of each answer by the request's name.
    """
    from labkit.engine import Engine
    from labkit.sampling_params import SamplingParams

    engine = Engine(EngineConfig(model=_tiny(), num_blocks=64, block_size=_SIZE))
    engine.runner.backend = backend
    for name, prompt, tokens in zip("abc", _PROMPTS, _ANSWERS, strict=True):
        engine.add_request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), request_id=name)
    while engine.has_unfinished:
        engine.step()
    return engine.trace, {name: engine.outputs[name].token_ids for name in "abc"}


@functools.cache
def _tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


# -- 08.1 ------------------------------------------------------------------------------------------


def _values(n: int, dim: int = 2) -> Tensor:
    """Values (n, dim) between -2 and 2, fp64, the same everywhere."""
    return (torch.arange(n * dim, dtype=torch.float64).view(n, dim) * 7 % 9 - 4) / 2


def _ramp(heads: int, n: int, top: float = 0.0) -> Tensor:
    """Scores (heads, n), fp64, whose new maxima come late."""
    at = torch.arange(n, dtype=torch.float64)
    return torch.stack([(at * (5 + 2 * head) % 11) / 3 + at / 7 for head in range(heads)]) + top


_INF = math.inf
_M = "m of two sets together is the larger of their two maxima, for each head"
_L = "l must be brought to the new maximum before it is added: times exp(its old maximum - the new one)"
_A = "a must be brought to the new maximum before it is added, as l is"
_OVERFLOW = "nothing may overflow: the only powers to take are of a maximum less the new maximum, 0 or below"
_EMPTY = (
    "a set of no tokens (m = -inf, l = 0, a = 0) changes nothing, and two of them are one: "
    "-inf less -inf is no number"
)
_HEADS = "each head has a maximum of its own, and may have seen nothing while another has"

# Scores (heads, n) of two sets, and the rule at stake where the answer is no number, or is off everywhere.
_CASES: tuple[tuple[list[list[float]], list[list[float]], str], ...] = (
    ([[0.0]], [[0.0]], "of two sets with the same maximum, l and a add up as they are"),
    ([[0.0]], [[1.0]], ""),
    ([[1.0]], [[0.0]], ""),
    ([[0.0], [2.0]], [[1.0], [-1.0]], _HEADS),
    ([[1000.0, 990.0]], [[995.0]], _OVERFLOW),
    ([[-1000.0]], [[-1002.0, -1001.0]], _OVERFLOW),
    ([[0.5]], [[-_INF]], _EMPTY),
    ([[-_INF]], [[0.5, 1.0]], _EMPTY),
    ([[-_INF]], [[-_INF]], _EMPTY),
    ([[-_INF], [1.0]], [[0.0], [2.0]], _HEADS),
    ([[-_INF], [1.0]], [[-_INF], [2.0]], _HEADS),
)


def _examine_merge(function: Callable[..., Any]) -> None:
    for first, second, rule in _CASES:
        one, two = (torch.tensor(scores, dtype=torch.float32) for scores in (first, second))
        values = _values(one.shape[1] + two.shape[1]).float()
        _merged(function, one, two, values, rule)
    for n in (1, 3, 100):  # uneven, with several heads
        scores, values = _ramp(3, n + 2), _values(n + 2, 4)
        _merged(function, scores[:, :n], scores[:, n:], values, "")
    _in_any_order(function)


def _merged(function: Callable[..., Any], one: Tensor, two: Tensor, values: Tensor, rule: str) -> None:
    """Compare the state of two sets with that of their union."""
    n = one.shape[1]
    states = state_of(one, values[:n]), state_of(two, values[n:])
    kept = [tuple(part.clone() for part in state) for state in states]
    got = _state(function(*states), states[0])
    told = f"merge({_told(kept[0])},\n      {_told(kept[1])})\ngave {_told(got)}"
    for state, before in zip(states, kept, strict=True):
        same = all(map(torch.equal, state, before))
        expect(same, "the two states belong to others as well: make new tensors, change none", told)
    want = state_of(torch.cat((one, two), 1).double(), values.double())
    told += f"\nshould be {_told(want)}"
    close = 5e-4  # far from any mistake; who works with logarithms loses digits at 1000
    if not all(part.isfinite().all() for part in got[1:]) or got[0].isnan().any():
        raise Wrong(rule or _OVERFLOW, told)
    for own, true, name_rule in zip(got, want, (_M, _L, _A), strict=True):
        fine = torch.allclose(own.double(), true, rtol=close, atol=close)
        expect(fine, name_rule if not rule or rule is _OVERFLOW else f"{rule}; {name_rule}", told)


def _in_any_order(function: Callable[..., Any]) -> None:
    scores, values = _ramp(2, 37, top=300.0), _values(37, 3)
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
        what = f"37 tokens in {blocks} uneven blocks, merged in a random order in float64: off by {off:.2g}"
        expect(off < 1e-12, "the answer must not depend on how tokens are cut up, or on the order", what)


def _state(got: Any, like: State) -> State:
    """What a function returned, if it is a state at all."""
    rule = "it returns three tensors (m, l, a) of the shapes that it was given"
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
        # Rows of one number are shown as a number: m = [0, 2] has two heads.
        rows = [[f"{x:.4g}" for x in row] for row in part.tolist()]
        texts = [row[0] if len(row) == 1 else f"[{', '.join(row)}]" for row in rows]
        return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"

    return "(" + ", ".join(f"{name} = {shown(part)}" for name, part in zip("mla", state, strict=True)) + ")"


def _run_merge(function: Callable[..., Any]) -> Run:
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

    trace, answers = serve(backend_of(attention))
    _, own = serve()
    expect(answers == own, "the engine must write the same tokens with it", f"yours {answers}, its own {own}")
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


# -- 08.2 ------------------------------------------------------------------------------------------

_NULL = 99  # what block tables are filled up with


class _Lender:
    """Pages of one key head, lent one at a time: what was lent before is overwritten.

    Args:
        keys, values: (length, dim) of the request, to lie in these pages; what lies behind them is NaN.
        blocks: the request's pages.
        size: tokens to a page.
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
            what = "the null page" if block == _NULL else f"page {block}, which is somebody else's"
            raise Wrong(
                "read only the pages that hold tokens of this request, the first ceil(length / size) of them",
                f"its pages are {self.blocks}, and it read {what}",
            )
        self.reads[block] += 1
        for tensor in self.lent:
            tensor.fill_(torch.nan)
        self.lent = list(self.pages[block].clone().unbind(0))
        return self.lent[0], self.lent[1]


# Tokens, their page size, query heads and dimensions of a head, and what the queries are multiplied by.
_SHAPES = (
    (1, 1, 1, 2, 1.0),
    (3, 4, 1, 2, 1.0),
    (4, 4, 2, 2, 1.0),
    (5, 4, 2, 2, 1.0),
    (12, 4, 3, 4, 400.0),
    (150, 4, 3, 8, 1.0),
    (149, 16, 3, 8, 1.0),
)


def _examine_paged(function: Callable[..., Any]) -> None:
    for length, size, heads, dim, strength in _SHAPES:
        used = -(-length // size)
        keys, values = _values(length, dim).float().roll(1, 0), _values(length, dim).float()
        q = _values(heads, dim).float() * strength + 0.25
        blocks = [(7 * i + 5) % 89 for i in range(used)]
        table = [*blocks, _NULL, _NULL]
        lender = _Lender(keys, values, blocks, size)
        told = f"length = {length}, size = {size}, table = {_short(table)}"
        with LargestTensor() as most:
            got = function(q.clone(), lender.read, list(table), length, size)
        if not isinstance(got, Tensor) or got.shape != q.shape:
            what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise Wrong("it returns the mean of the values, (heads, dim)", f"{told}: it returned {what}")
        scores = q.double() @ keys.double().T
        want = scores.softmax(-1) @ values.double()
        if got.isnan().any():
            rule = (
                "a page holds anything behind the request's last token, and what `read` lends is gone at the "
                "next read: use `keys[:used]` and `values[:used]` before you read on"
            )
            if strength > 1:
                rule = _OVERFLOW
            raise Wrong(rule, f"{told}: the result is NaN")
        off = float((got.double() - want).abs().max())
        read = sum(lender.reads.values())
        expect(
            off < 1e-4, "the result must be softmax(q @ keys.T) @ values", f"{told}: it is off by {off:.2g}"
        )
        again = [block for block, count in lender.reads.items() if count > 1]
        what = f"{told}: {read} reads of {used} pages; page {again[0] if again else ''} twice or more"
        expect(not again, "read each page once: its keys and its values come together", what)
        allowed = 2 * max(size * dim, heads * dim, heads * size)
        expect(
            most.numbers <= allowed,
            "keep one page at a time: no tensor may grow with the length",
            f"{told}: your largest tensor has {most.numbers:,} numbers, a page {2 * size * dim:,}",
        )


def _short(table: Sequence[int]) -> str:
    return (
        str(list(table)) if len(table) < 9 else f"[{', '.join(map(str, table[:4]))}, ... {len(table)} pages]"
    )


def bytes_moved(rows: Sequence[Span], cache: PagedKVCache) -> tuple[int, int]:
    """Bytes of keys and values that attention of these rows moves in one layer: gathered, and in place.

    To gather is to read pages, write them side by side, and read them again. Rows of a call are as wide as
    its longest. In place, each page of a row is read once.
    """
    page = cache.nbytes // len(cache.blocks) // (cache.num_blocks + 1)
    gathered = 0
    for group in gathered_rows(0, rows, cache, [None]):
        width = group.masks[None].shape[-1] // cache.block_size
        gathered += 3 * (group.last - group.first) * width * page
    return gathered, sum(-(-row.length // cache.block_size) for row in rows) * page


def _run_paged(function: Callable[..., Any]) -> Run:
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

    trace, answers = serve(Backend("yours", "", decode, gathered_chunks, static_rows))
    _, own = serve()
    expect(answers == own, "the engine must write the same tokens with it", f"yours {answers}, its own {own}")
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


EXERCISES: tuple[Exercise, ...] = (
    Exercise("08.1", "unite two partial softmaxes", merge, _examine_merge, _run_merge),
    Exercise("08.2", "attend over pages where they lie", paged_attention, _examine_paged, _run_paged),
)
