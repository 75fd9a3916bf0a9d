"""Exercises of notebook 09: round weights to eight bits, and multiply whole numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import notebook
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import PROMPTS, TEXT, answers, exactly, tiny_model
from labkit.kernels import int8
from labkit.models.architecture import build
from labkit.models.checkpoint import read_tensors
from labkit.models.hub import TINY, find
from labkit.models.load import LoadedModel
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
        levels: the number that the largest weight of each row becomes; 127 fills eight bits.

    Returns:
        int8 (out, in), and fp32 scales (out, 1) with `weight ~ numbers * scales`.
    """
    scales = (weight.abs().amax(1, keepdim=True) / levels).clamp(min=_TINY)
    return torch.round(weight / scales).to(torch.int8), scales


def int8_product(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x @ weight.T, computed in whole numbers.

    Args:
        x: (tokens, in), fp32; each token is quantised with a scale of its own.
        numbers, scales: the quantised weight, int8 (out, in) and fp32 (out, 1).

    Returns:
        (tokens, out), fp32.
    """
    own = (x.abs().amax(1, keepdim=True) / 127).clamp(min=_TINY)
    whole = torch.round(x / own).to(torch.int32)
    return (whole @ numbers.to(torch.int32).T).float() * own * scales.T


def one_scale(weight: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """The same as `quantize_rows`, but with a single scale for all rows: a bad idea."""
    scale = weight.abs().max() / levels
    return torch.round(weight / scale).to(torch.int8), scale.expand(len(weight), 1)


# -- a model on rounded numbers --------------------------------------------------------------------


class Rounded(nn.Module):
    """A linear layer whose weights and inputs were rounded to whole numbers and scaled back.

    It computes in floating point and gives what the engine's integer product gives, up to the last bits of
    fp32. It answers questions of accuracy on any machine, with any number of levels.

    Args:
        weight: (out, in), already rounded.
        bias: vector that is added at the end.
        turn: Hadamard matrix that turns pieces of the input; the weight was turned in the same way.
        by_token: whether each token of the input has a scale of its own; otherwise all share one.
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
    """A model in fp32 on the CPU, with plain weights to quantise; `int8.rotate` may change it."""
    loaded = tiny_model() if name == TINY else notebook.default_model()
    tensors = tiny_random()[1].items() if name == TINY else read_tensors(find(name, say=None))
    module = build(loaded.config, tensors, dtype=torch.float32, device=torch.device("cpu"))
    return LoadedModel(name, module, loaded.tokenizer, loaded.config, loaded.eos_token_ids)


@torch.no_grad()
def rounded(
    plain: LoadedModel, rows: Rows, levels: int = 127, *, rotated: bool = False, by_token: bool = True
) -> LoadedModel:
    """A copy of a model with rounded matrices and rounded inputs of its products.

    Args:
        plain: the model, from `plain_model`; it stays as it is.
        rows: function that quantises a weight, as `quantize_rows` does.
        levels: second argument of `rows`; inputs always have 127 levels.
        rotated: whether `int8.rotate` has turned the model; the input of `down_proj` is then turned as well.
        by_token: see `Rounded`.
    """
    # The copy shares all parameters with the model. The matrices are then replaced one by one.
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


def _serve(model: LoadedModel, prompts: tuple[str, ...] = PROMPTS) -> list[list[int]]:
    """The engine's greedy answers to some prompts that run together."""
    engine = Engine(EngineConfig(model=model, num_blocks=64, block_size=8))
    for prompt in prompts:
        engine.add_request(prompt, exactly(24))
    engine.run()
    return list(answers(engine).values())


def _error(logits: Tensor, true: Tensor) -> float:
    """The mean error of a logit, in percent of the spread of the true ones."""
    return round(100 * float((logits - true).abs().mean() / true.std()), 2)


def _error_bars(errors: dict[str, float]) -> notebook.Picture:
    return notebook.bars(errors, "Mean error of a logit of tiny-random", unit="% of their spread", digits=2)


# -- 09.1 ------------------------------------------------------------------------------------------

_WEIGHTS: tuple[tuple[list[list[float]], int, str], ...] = (
    ([[1.0, -0.5, 0.25]], 127, ""),
    ([[0.25, 0.5, -1.0]], 127, ""),
    ([[-1.0, -0.2, -0.3]], 127, ""),
    ([[0.03, -0.07, 0.2]], 127, ""),
    ([[1.0, 0.5], [100.0, -30.0]], 127, "each row needs a scale of its own"),
    ([[0.0, 0.0], [1.0, 0.7]], 127, "a row of zeros becomes zeros, with a scale that is finite and above 0"),
    ([[0.9, -0.34, 0.08, -0.9]], 7, "with `levels` = 7, the numbers go from -7 to 7"),
    ([[1e-4, -3e-5]], 127, ""),
    ([[2e-9, 7e-10], [3e-17, -8e-17]], 127, ""),
    ([[40_000.0, -7.0, 90_000.0]], 127, ""),
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
    expect(torch.equal(given, weight), "leave the weight as it is: it belongs to the model", told)
    expect(bool(scales.isfinite().all()), rule or "every scale must be finite", told)
    expect(bool((scales > 0).all()), rule or "every scale must be above 0: it is the width of a step", told)
    largest = numbers.int().abs().amax(1)
    over = (
        f"the numbers go from -{levels} to {levels}, and no further: an int8 that overflows changes its sign"
    )
    expect(bool((largest <= levels).all()), rule or over, told)
    zero = weight.abs().amax(1) == 0
    expect(not numbers[zero].any(), rule or "a row of zeros becomes zeros", told)
    exact = weight.double().abs().amax(1, keepdim=True) / levels  # the step of each row
    back = numbers.double() * scales.double()
    wrapped = (back * weight.double() < 0) & (weight.double().abs() > exact)
    expect(not wrapped.any(), over, told)
    full = f"the largest weight of each row, whatever its sign, becomes {levels} or -{levels}"
    full += ": a wider step leaves some of the numbers unused"
    expect(bool((largest[~zero] == levels).all()), f"{rule}; {full}" if rule else full, told)
    off = ((back - weight.double()).abs() / exact.clamp(min=_TINY)).amax()
    near = "numbers times scales must be within half a step of the weight: round to the nearest number"
    expect(float(off) <= 0.5001, near, f"{told}\nyours is off by {float(off):.2f} steps")


def _pair(got: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    shape = tuple(weight.shape)
    rule = "return two tensors: int8 numbers (out, in), and float32 scales (out, 1)"
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
    true = teacher_forced(plain.module, TEXT)
    errors, same = {}, {}
    ways: tuple[tuple[str, Rows, int], ...] = (
        ("yours", function, 127),
        ("reference", quantize_rows, 127),
        ("reference, 4 bits", quantize_rows, 7),
    )
    for name, rows, levels in ways:
        logits = teacher_forced(rounded(plain, rows, levels).module, TEXT)
        errors[name] = _error(logits, true)
        same[name] = float((logits.argmax(-1) == true.argmax(-1)).double().mean())
    written = sum(map(len, _serve(rounded(plain, function))))
    sentence = (
        f"tiny-random, rebuilt with your numbers, wrote {written} tokens in the engine. On a given text its "
        f"likeliest token is that of fp32 at {same['yours']:.0%} of the places, the reference's at "
        f"{same['reference']:.0%}, with 4 bits at {same['reference, 4 bits']:.0%}."
    )
    return Run(sentence, [("What rounding does to it:", _error_bars(errors))])


# -- 09.2 ------------------------------------------------------------------------------------------


def _inputs(tokens: int, columns: int) -> Tensor:
    """Inputs whose numbers, once scaled, are never close to the middle between two whole numbers."""
    at = torch.arange(tokens * columns, dtype=torch.float64).view(tokens, columns)
    whole = at * 29 % 251 - 125
    whole[:, 0] = 127  # the largest of each token
    between = (at * 13 % 7 - 3) / 10  # at most 0.3 away from a whole number
    between[:, 0] = 0
    sizes = torch.tensor([0.01 * 3.0**i for i in range(tokens)], dtype=torch.float64)
    return ((whole + between) / 127 * sizes[:, None]).float()


def _numbers(out: int, columns: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(out * columns).view(out, columns)
    return (at * 31 % 255 - 127).to(torch.int8), torch.tensor([[0.001 * (i + 1)] for i in range(out)])


_SUM = 1 << 17
# A large sum that is taken away again, and the little that is left of it.
_LONG_SUM = (
    torch.cat((torch.full((_SUM,), 127.0), torch.full((_SUM,), -127.0), torch.tensor([127.0]))).view(1, -1),
    torch.full((1, 2 * _SUM + 1), 127, dtype=torch.int8),
    torch.ones(1, 1),
)


def _examine_product(function: Callable[..., Any]) -> None:
    # These inputs are whole numbers after scaling, so that each case shows one mistake.
    plain, ones = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8), torch.ones(2, 1)
    _multiplied(function, torch.tensor([[127.0, 63.0]]), plain, ones, "")
    axes = "multiply each output by the scale of its own row of the weight"
    for x in ([[127.0, 64.0]], [[127.0, 64.0], [127.0, 1.0]]):
        _multiplied(function, torch.tensor(x), plain, torch.tensor([[1.0], [10.0]]), axes)
    wrap = "sums need 32 bits: int8 times int8 stays int8, and it overflows"
    numbers = torch.full((1, 6), 127, dtype=torch.int8)
    _multiplied(function, torch.full((1, 6), 127.0), numbers, torch.ones(1, 1), wrap)
    own = "each token needs a scale of its own: a large token must not make the others coarse"
    _multiplied(function, torch.tensor([[127 / 128, 0.5], [1016.0, 8.0]]), plain, ones, own)
    zero = "a token of zeros gives zeros"
    _multiplied(function, torch.tensor([[0.0, 0.0], [127.0, 64.0]]), plain, ones, zero)
    x, (numbers, scales) = _inputs(9, 96), _numbers(40, 96)
    _multiplied(function, x, numbers, scales, "")
    together = function(x.clone(), numbers.clone(), scales.clone())
    for i in range(len(x)):
        alone = function(x[i : i + 1].clone(), numbers.clone(), scales.clone())
        same = torch.equal(alone[0], together[i])
        rule = "a token must give the same bits alone and beside others: sums of whole numbers are exact"
        expect(same, rule, f"token {i} of {len(x)}: off by {float((alone[0] - together[i]).abs().max()):.2g}")
    sign = "the largest number of a token is the one farthest from 0, whatever its sign"
    _multiplied(function, torch.tensor([[-127.0, 63.0]]), plain, ones, sign)
    small = "a token of small numbers has a small scale, and keeps its numbers"
    _multiplied(function, torch.tensor([[1.27e-6, -5e-7], [6e-15, 2.54e-14]]), plain, ones, small)
    _multiplied(
        function, *_LONG_SUM, "sums need 32 bits: fp32 keeps 24 of them, and a long sum loses its last"
    )


def _multiplied(function: Callable[..., Any], x: Tensor, numbers: Tensor, scales: Tensor, rule: str) -> None:
    """Compare a product with the product of the same whole numbers in fp64."""
    given = x.clone(), numbers.clone(), scales.clone()
    got = function(*given)
    shape = (len(x), len(numbers))
    told = f"x {_shown(x)}, numbers {_shown(numbers)}, scales {_shown(scales)}:\n"
    if not isinstance(got, Tensor) or tuple(got.shape) != shape or got.dtype != torch.float32:
        what = f"{got.dtype} of shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise Wrong("return float32 (tokens, out)", f"{told}it returned {what}, not {shape}")
    same = all(map(torch.equal, given, (x, numbers, scales)))
    expect(same, "leave the arguments as they are: change nothing in place", told.rstrip(" \n:"))
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
    told += f"token {row}, output {column}\nyours: {own:.6g}\nright: {true:.6g}"
    if not rule:
        plain = (x.double() @ numbers.double().T) * scales.double().T
        if float((got.double() - plain).abs().max() / size) < 1e-5:
            rule = "the inputs must become whole numbers as well: this is the product without rounding them"
        else:
            rule = "compute round(x / own scale) @ numbers.T, times both scales; round to the nearest number"
    raise Wrong(rule, told)


class _Learners(nn.Module):
    """A linear layer that calls a learner's product."""

    def __init__(self, function: Product, weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.numbers, self.scales = quantize_rows(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.numbers, self.scales).contiguous()


def _with_product(function: Product) -> LoadedModel:
    plain = plain_model(TINY)
    module = plain.module
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, _Learners(function, part.weight))
    return plain


def _run_product(function: Callable[..., Any]) -> Run:
    models = {"yours": _with_product(function), "reference": _with_product(int8_product)}
    together, expected = (_serve(model) for model in models.values())
    alone = [_serve(models["yours"], (prompt,))[0] for prompt in PROMPTS]
    lonely = "the same" if alone == together else "NOT the same"
    total = sum(map(len, together))
    same = sum(a == b for x, y in zip(together, expected, strict=True) for a, b in zip(x, y, strict=True))
    true = teacher_forced(plain_model(TINY).module, TEXT)
    errors = {name: _error(teacher_forced(model.module, TEXT), true) for name, model in models.items()}
    sentence = (
        f"All products of tiny-random ran through it in the engine: {same} of {total} tokens are the "
        f"reference's. Each request alone writes {lonely} tokens as in company."
    )
    return Run(sentence, [("How far it is from fp32:", _error_bars(errors))])


EXERCISES: tuple[Exercise, ...] = (
    Exercise("09.1", "round weights, row by row", quantize_rows, _examine_rows, _run_rows),
    Exercise("09.2", "multiply whole numbers", int8_product, _examine_product, _run_product),
)
