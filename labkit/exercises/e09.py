"""Exercises of notebook 09: round weights to eight bits, and multiply whole numbers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import notebook
from labkit.config import EngineConfig
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.kernels import int8
from labkit.models.architecture import build
from labkit.models.checkpoint import read_tensors
from labkit.models.hub import TINY, find
from labkit.models.load import LoadedModel, load_model
from labkit.models.teacher_forcing import teacher_forced
from labkit.models.tiny import tiny_random

Rows = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]

_TINY = torch.finfo(torch.float32).tiny

# -- right answers ---------------------------------------------------------------------------------


def quantize_rows(weight: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """Whole numbers from -levels to levels, and a scale for each row.

    Args:
        weight: (out, in), fp32.
        levels: what the largest weight of each row becomes; 127 fills eight bits.

    Returns:
        int8 (out, in), and fp32 scales (out, 1) with `weight ~ numbers * scales`.
    """
    scales = (weight.abs().amax(1, keepdim=True) / levels).clamp(min=_TINY)
    return torch.round(weight / scales).to(torch.int8), scales


def int8_product(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x @ weight.T, on whole numbers.

    Args:
        x: (tokens, in), fp32; each token is quantised with a scale of its own.
        numbers, scales: int8 (out, in) and fp32 (out, 1), of the weight.

    Returns:
        (tokens, out), fp32.
    """
    own = (x.abs().amax(1, keepdim=True) / 127).clamp(min=_TINY)
    whole = torch.round(x / own).to(torch.int32)
    return (whole @ numbers.to(torch.int32).T).float() * own * scales.T


def one_scale(weight: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, but with a single scale for all rows: what one should not do."""
    scale = weight.abs().max() / levels
    return torch.round(weight / scale).to(torch.int8), scale.expand(len(weight), 1)


# -- a model on rounded numbers --------------------------------------------------------------------


class Rounded(nn.Module):
    """A linear layer whose inputs and weights have gone through whole numbers and back.

    It gives what the engine's integer product gives, up to the last bits of fp32, in floating point: for
    questions of accuracy, on any machine, with any number of levels.

    Args:
        weight: (out, in), already rounded.
        bias: added at the end.
        turn: a Hadamard matrix for pieces of the input, whose weight was turned likewise.
        by_token: a scale for each token of the input, or one for all.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, turn: Tensor | None, by_token: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.turn, self.by_token = weight, bias, turn, by_token

    def forward(self, x: Tensor) -> Tensor:
        if self.turn is not None:
            x = (x.reshape(-1, len(self.turn)) @ self.turn).view(x.shape)
        largest = x.abs().amax(-1, keepdim=True) if self.by_token else x.abs().max()
        scale = (largest / 127).clamp(min=_TINY)
        return F.linear(torch.round(x / scale) * scale, self.weight, self.bias)


def plain_model(name: str = "smollm2-135m") -> LoadedModel:
    """A model in fp32 with plain weights on the CPU, to be quantised; `int8.rotate` may change it."""
    loaded = _tiny() if name == TINY else notebook.default_model()
    tensors = tiny_random()[1].items() if name == TINY else read_tensors(find(name, say=None))
    module = build(loaded.config, tensors, dtype=torch.float32, device=torch.device("cpu"))
    return LoadedModel(name, module, loaded.tokenizer, loaded.config, loaded.eos_token_ids)


@torch.no_grad()
def rounded(
    plain: LoadedModel, rows: Rows, levels: int = 127, *, rotated: bool = False, by_token: bool = True
) -> LoadedModel:
    """A model with all its matrices and the inputs of its products rounded; the given one is left as it is.

    Args:
        plain: from `plain_model`.
        rows: gives whole numbers and scales of a weight, as `quantize_rows` does.
        levels: handed to `rows`; inputs always have 127.
        rotated: whether `int8.rotate` went over the model; the input of `down_proj` is then turned too.
        by_token: see `Rounded`.
    """
    # All weights are shared, for those that stay; the others are replaced one by one.
    shared = {id(parameter): parameter for parameter in plain.module.parameters()}
    module = copy.deepcopy(plain.module, shared)
    for name, part in plain.module.named_modules():
        if not isinstance(part, nn.Linear | nn.Embedding):
            continue
        weight, turn = part.weight, None
        if rotated and name.endswith("down_proj"):
            size = weight.shape[1]
            turn = int8.hadamard(min(size & -size, 64)).to(weight.device)
            weight = (weight.reshape(-1, len(turn)) @ turn).view(weight.shape)
        numbers, scales = rows(weight, levels)
        weight = numbers * scales
        new: nn.Module
        if isinstance(part, nn.Embedding):
            new = nn.Embedding.from_pretrained(weight)
        else:
            new = Rounded(weight, part.bias, turn, by_token)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, new)
    return LoadedModel(plain.name, module, plain.tokenizer, plain.config, plain.eos_token_ids, "int8")


@functools.cache
def _tiny() -> LoadedModel:
    return load_model(TINY, device="cpu", say=None)


_TEXT = [(7 * i + i * i) % 900 + 300 for i in range(192)]  # token ids that tiny-random reads
_PROMPTS = ("the sea is", "a prime number is one that", "once upon a time there was a very old house by the")


def _serve(model: LoadedModel, prompts: tuple[str, ...] = _PROMPTS) -> list[list[int]]:
    """Greedy answers of the real engine to some prompts, computed together."""
    from labkit.engine import Engine
    from labkit.sampling_params import SamplingParams

    engine = Engine(EngineConfig(model=model, num_blocks=64, block_size=8))
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    while engine.has_unfinished:
        engine.step()
    return [engine.outputs[i].token_ids for i in ids]


# -- 09.1 ------------------------------------------------------------------------------------------

_WEIGHTS: tuple[tuple[list[list[float]], int, str], ...] = (
    ([[1.0, -0.5, 0.25]], 127, ""),
    ([[0.25, 0.5, -1.0]], 127, ""),
    ([[-1.0, -0.2, -0.3]], 127, ""),
    ([[0.03, -0.07, 0.2]], 127, ""),
    ([[1.0, 0.5], [100.0, -30.0]], 127, "each row needs a scale of its own"),
    ([[0.0, 0.0], [1.0, 0.7]], 127, "a row of zeros is zeros, with a scale that is finite and above 0"),
    ([[0.9, -0.34, 0.08, -0.9]], 7, "with `levels` = 7 the numbers go from -7 to 7"),
)


def _examine_rows(function: Callable[..., Any]) -> None:
    for rows, levels, rule in _WEIGHTS:
        _rounded_rows(function, torch.tensor(rows), levels, rule)
    columns = torch.arange(24.0)
    wide = torch.stack([((columns * (5 + row) % 17) - 8) * 0.37 * 4.0**row for row in range(6)])
    for levels in (127, 7):
        _rounded_rows(function, wide, levels, "")


def _rounded_rows(function: Callable[..., Any], weight: Tensor, levels: int, rule: str) -> None:
    given = weight.clone()
    numbers, scales = _pair(function(given, levels) if levels != 127 else function(given), weight)
    told = f"weight {_shown(weight)}, levels {levels}:\nnumbers {_shown(numbers)}, scales {_shown(scales)}"
    expect(torch.equal(given, weight), "the weight belongs to the model: do not change it in place", told)
    expect(bool(scales.isfinite().all()), rule or "every scale must be finite", told)
    expect(bool((scales > 0).all()), rule or "a scale is the width of a step: above 0", told)
    largest = numbers.int().abs().amax(1)
    over = f"numbers go from -{levels} to {levels}, and no further: an int8 that overflows changes its sign"
    expect(bool((largest <= levels).all()), rule or over, told)
    zero = weight.abs().amax(1) == 0
    expect(not numbers[zero].any(), rule or "a row of zeros is zeros", told)
    exact = weight.double().abs().amax(1, keepdim=True) / levels  # the step of each row
    back = numbers.double() * scales.double()
    wrapped = (back * weight.double() < 0) & (weight.double().abs() > exact)
    expect(not wrapped.any(), over, told)
    full = f"the largest weight of each row, whatever its sign, becomes {levels} or -{levels}"
    full += ": a wider step wastes some of the numbers"
    expect(bool((largest[~zero] == levels).all()), f"{rule}; {full}" if rule else full, told)
    off = ((back - weight.double()).abs() / exact.clamp(min=_TINY)).amax()
    near = "numbers times scales must be within half a step of the weight: round to the nearest number"
    expect(float(off) <= 0.5001, near, f"{told}\nit is off by {float(off):.2f} steps")


def _pair(got: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = tuple(weight.shape)
    rule = "it returns two tensors: int8 numbers (out, in), and float32 scales (out, 1)"
    if not isinstance(got, tuple | list) or len(got) != 2 or not all(isinstance(x, Tensor) for x in got):
        raise Wrong(rule, f"it returned {got!r}")
    for what, own, dtype, want in (
        ("numbers", got[0], torch.int8, shape),
        ("scales", got[1], torch.float32, (shape[0], 1)),
    ):
        told = f"for a weight of shape {shape}, {what} are {own.dtype} of shape {tuple(own.shape)}"
        expect(own.dtype == dtype and tuple(own.shape) == want, rule, told)
    return got[0], got[1]


def _shown(tensor: Tensor) -> str:
    if tensor.numel() > 8:
        return f"of shape {tuple(tensor.shape)}"
    rows = [", ".join(f"{number:.4g}" for number in row) for row in tensor.tolist()]
    return "[" + ", ".join(f"[{row}]" for row in rows) + "]"


def _run_rows(function: Callable[..., Any]) -> Run:
    plain = plain_model(TINY)
    true = teacher_forced(plain.module, _TEXT)
    errors, same = {}, {}
    ways: tuple[tuple[str, Rows, int], ...] = (
        ("yours", function, 127),
        ("reference", quantize_rows, 127),
        ("reference, 4 bits", quantize_rows, 7),
    )
    for name, rows, levels in ways:
        logits = teacher_forced(rounded(plain, rows, levels).module, _TEXT)
        errors[name] = round(100 * float((logits - true).abs().mean() / true.std()), 2)
        same[name] = float((logits.argmax(-1) == true.argmax(-1)).double().mean())
    written = sum(map(len, _serve(rounded(plain, function))))
    picture = notebook.bars(
        errors, "Mean error of a logit of tiny-random", unit="% of their spread", digits=2
    )
    sentence = (
        f"tiny-random, rebuilt with your numbers, wrote {written} tokens in the engine. On a given text its "
        f"likeliest token is that of fp32 at {same['yours']:.0%} of the places, the reference's at "
        f"{same['reference']:.0%}, with 4 bits at {same['reference, 4 bits']:.0%}."
    )
    return Run(sentence, [("What rounding does to it:", picture)])


# -- 09.2 ------------------------------------------------------------------------------------------


def _inputs(tokens: int, columns: int) -> Tensor:
    """Inputs whose numbers, once scaled, are never close to half way between two whole ones."""
    at = torch.arange(tokens * columns, dtype=torch.float64).view(tokens, columns)
    whole = at * 29 % 251 - 125
    whole[:, 0] = 127  # the largest of each token
    between = (at * 13 % 7 - 3) / 10  # at most 0.3 from a whole number
    between[:, 0] = 0
    sizes = torch.tensor([0.01 * 3.0**i for i in range(tokens)], dtype=torch.float64)
    return ((whole + between) / 127 * sizes[:, None]).float()


def _numbers(out: int, columns: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(out * columns).view(out, columns)
    return (at * 31 % 255 - 127).to(torch.int8), torch.tensor([[0.001 * (i + 1)] for i in range(out)])


def _examine_product(function: Callable[..., Any]) -> None:
    # Whole numbers after scaling, so that each case shows one thing alone.
    plain, ones = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8), torch.ones(2, 1)
    _multiplied(function, torch.tensor([[127.0, 63.0]]), plain, ones, "")
    axes = "each output is multiplied by the scale of its own row of the weight"
    for x in ([[127.0, 64.0]], [[127.0, 64.0], [127.0, 1.0]]):
        _multiplied(function, torch.tensor(x), plain, torch.tensor([[1.0], [10.0]]), axes)
    wrap = "sums need 32 bits: int8 times int8 stays int8 and wraps around"
    numbers = torch.full((1, 6), 127, dtype=torch.int8)
    _multiplied(function, torch.full((1, 6), 127.0), numbers, torch.ones(1, 1), wrap)
    own = "each token needs a scale of its own: a large one must not make the others coarse"
    _multiplied(function, torch.tensor([[127 / 128, 0.5], [1016.0, 8.0]]), plain, ones, own)
    zero = "a token of zeros gives zeros"
    _multiplied(function, torch.tensor([[0.0, 0.0], [127.0, 64.0]]), plain, ones, zero)
    x, (numbers, scales) = _inputs(9, 96), _numbers(40, 96)
    _multiplied(function, x, numbers, scales, "")
    together = function(x.clone(), numbers.clone(), scales.clone())
    for i in range(len(x)):
        alone = function(x[i : i + 1].clone(), numbers.clone(), scales.clone())
        same = torch.equal(alone[0], together[i])
        rule = "sums of whole numbers are exact: a token must give the same bits alone and beside others"
        expect(same, rule, f"token {i} of {len(x)}: off by {float((alone[0] - together[i]).abs().max()):.2g}")


def _multiplied(function: Callable[..., Any], x: Tensor, numbers: Tensor, scales: Tensor, rule: str) -> None:
    """Compare a product with that of the same whole numbers in fp64."""
    given = x.clone(), numbers.clone(), scales.clone()
    got = function(*given)
    shape = (len(x), len(numbers))
    told = f"x {_shown(x)}, numbers {_shown(numbers)}, scales {_shown(scales)}:\n"
    if not isinstance(got, Tensor) or tuple(got.shape) != shape or got.dtype != torch.float32:
        what = f"{got.dtype} of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise Wrong("it returns float32 (tokens, out)", f"{told}it returned {what}, not {shape}")
    same = all(map(torch.equal, given, (x, numbers, scales)))
    expect(same, "what it is given belongs to others: change nothing in place", told.rstrip(" \n:"))
    own = (x.abs().amax(1, keepdim=True).double() / 127).clamp(min=_TINY)
    exact = (torch.round(x.double() / own) @ numbers.double().T) * own * scales.double().T
    off = (got.double() - exact).abs()
    size = exact.abs().amax().clamp(min=_TINY)
    if (
        bool(got.isfinite().all())
        and float(off.max() / size) < 1e-5
        and bool((off <= 1e-4 * exact.abs() + 1e-6 * size).all())
    ):
        return
    row, column = divmod(int(off.nan_to_num(torch.inf).argmax()), shape[1])
    own, true = float(got[row, column]), float(exact[row, column])
    told += f"token {row}, output {column} is {own:.6g}, should be {true:.6g}"
    if not rule:
        plain = (x.double() @ numbers.double().T) * scales.double().T
        if float((got.double() - plain).abs().max() / size) < 1e-5:
            rule = "the activations must become whole numbers too: this is the product without rounding them"
        else:
            rule = "it is round(x / own scale) @ numbers.T, times both scales; round to the nearest number"
    raise Wrong(rule, told)


class _Learners(nn.Module):
    """A linear layer that is a learner's product."""

    def __init__(self, function: Product, weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.numbers, self.scales = quantize_rows(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.numbers, self.scales)


def _with_product(function: Product) -> LoadedModel:
    plain = plain_model(TINY)
    module = plain.module
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, _Learners(function, part.weight))
    return plain


def _run_product(function: Callable[..., Any]) -> Run:
    mine = _with_product(function)
    answers = _serve(mine)
    alone = [_serve(mine, (prompt,))[0] for prompt in _PROMPTS]
    expected = _serve(_with_product(int8_product))
    total = sum(map(len, answers))
    same = sum(a == b for x, y in zip(answers, expected, strict=True) for a, b in zip(x, y, strict=True))
    true = teacher_forced(plain_model(TINY).module, _TEXT)
    errors = {}
    for name, model in (("yours", mine), ("reference", _with_product(int8_product))):
        logits = teacher_forced(model.module, _TEXT)
        errors[name] = round(100 * float((logits - true).abs().mean() / true.std()), 2)
    picture = notebook.bars(
        errors, "Mean error of a logit of tiny-random", unit="% of their spread", digits=2
    )
    lonely = "the same" if alone == answers else "NOT the same"
    sentence = (
        f"All products of tiny-random ran through it in the engine: {same} of {total} tokens are the "
        f"reference's. Each request alone writes {lonely} tokens as in company."
    )
    return Run(sentence, [("How far it is from fp32:", picture)])


EXERCISES: tuple[Exercise, ...] = (
    Exercise("09.1", "round weights, row by row", quantize_rows, _examine_rows, _run_rows),
    Exercise("09.2", "multiply whole numbers", int8_product, _examine_product, _run_product),
)
