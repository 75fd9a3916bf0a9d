"""Exercises of notebook 09: what is refused and why, what is accepted, and what the engine does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from labkit.exercises import e09, judge
from labkit.exercises.common import tiny_model
from labkit.exercises.e09 import int8_product, one_scale, plain_model, quantize_rows, rounded
from labkit.kernels import int8
from labkit.models.teacher_forcing import teacher_forced
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

TEXT = [(7 * i) % 200 + 300 for i in range(60)]


def scales_of(weight: Tensor, levels: int) -> Tensor:
    return (weight.abs().amax(1, keepdim=True) / levels).clamp(min=1e-30)


# -- 09.1, wrong -----------------------------------------------------------------------------------


def cuts_off(weight: Tensor, levels: int = 127) -> Any:
    scales = scales_of(weight, levels)
    return (weight / scales).to(torch.int8), scales


def divides_by_zero(weight: Tensor, levels: int = 127) -> Any:
    scales = weight.abs().amax(1, keepdim=True) / levels
    return torch.nan_to_num(torch.round(weight / scales)).to(torch.int8), scales


def up_to_128(weight: Tensor, levels: int = 127) -> Any:
    scales = scales_of(weight, levels + 1)
    return torch.round(weight / scales).to(torch.int8), scales


def without_the_sign(weight: Tensor, levels: int = 127) -> Any:
    scales = (weight.amax(1, keepdim=True) / levels).abs().clamp(min=1e-30)
    return torch.round(weight / scales).to(torch.int8), scales


def by_column(weight: Tensor, levels: int = 127) -> Any:
    scales = weight.abs().amax(0, keepdim=True) / levels
    return torch.round(weight / scales).to(torch.int8), scales.T


def flat_scales(weight: Tensor, levels: int = 127) -> Any:
    numbers, scales = quantize_rows(weight, levels)
    return numbers, scales.flatten()


def no_levels(weight: Tensor, levels: int = 127) -> Any:
    return quantize_rows(weight, 127)


def in_floats(weight: Tensor, levels: int = 127) -> Any:
    scales = scales_of(weight, levels)
    return torch.round(weight / scales), scales


def wide_steps(weight: Tensor, levels: int = 127) -> Any:
    return quantize_rows(weight, levels // 2)


def in_place(weight: Tensor, levels: int = 127) -> Any:
    scales = scales_of(weight, levels)
    return weight.div_(scales).round().to(torch.int8), scales


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (one_scale, "each row needs a scale of its own"),
        (cuts_off, "round to the nearest number"),
        (divides_by_zero, "a row of zeros becomes zeros"),
        (up_to_128, "the numbers go from -127 to 127"),
        (without_the_sign, "an int8 that overflows changes its sign"),
        (by_column, "float32 scales (out, 1)"),
        (flat_scales, "float32 scales (out, 1)"),
        (no_levels, "the numbers go from -7 to 7"),
        (in_floats, "return two tensors: int8 numbers"),
        (wide_steps, "a wider step leaves some of the numbers unused"),
        (in_place, "leave the weight as it is"),
    ],
)
def test_wrong_ways_to_round_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("09.1", function, rule)


# -- 09.1, right -----------------------------------------------------------------------------------


def row_by_row(weight: Tensor, levels: int = 127) -> Any:
    numbers = torch.zeros(weight.shape, dtype=torch.int8)
    scales = torch.ones(len(weight), 1)
    for i, row in enumerate(weight):
        if row.any():
            scales[i] = row.abs().max() / levels
            numbers[i] = torch.floor(row / scales[i] + 0.5).to(torch.int8)
    return numbers, scales


def in_doubles(weight: Tensor, levels: int = 127) -> Any:
    largest = weight.double().abs().max(dim=1, keepdim=True).values
    largest[largest == 0] = 1
    return [(weight.double() * levels / largest).round().char(), (largest / levels).float()]


@pytest.mark.parametrize("function", [quantize_rows, row_by_row, in_doubles])
def test_right_ways_to_round_run_in_the_engine(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("09.1", function)
    assert "wrote 72 tokens in the engine" in verdict.text
    assert "reference, 4 bits" in repr(verdict.pictures[0][1])


# -- 09.2, wrong -----------------------------------------------------------------------------------


def of(x: Tensor) -> tuple[Tensor, Tensor]:
    own = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return torch.round(x / own), own


def wraps(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    whole, own = of(x)
    return (whole.to(torch.int8) @ numbers.T).float() * own * scales.T


def one_for_all_tokens(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    own = x.abs().max() / 127
    return (torch.round(x / own) @ numbers.float().T) * own * scales.T


def not_rounded(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return x @ (numbers * scales).T


def cut_off(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    own = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return ((x / own).to(torch.int8).int() @ numbers.int().T).float() * own * scales.T


def scales_not_turned(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    whole, own = of(x)
    return (whole @ numbers.float().T) * own * (scales if len(x) == len(scales) else scales.T)


def scale_of_the_token_forgotten(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return (of(x)[0] @ numbers.float().T) * scales.T


def zero_by_zero(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    own = x.abs().amax(1, keepdim=True) / 127
    return (torch.round(x / own) @ numbers.float().T) * own * scales.T


def in_double(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return int8_product(x, numbers, scales).double()


def changes_its_input(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    own = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (x.div_(own).round_() @ numbers.float().T) * own * scales.T


def knows_its_neighbours(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    return int8_product(x, numbers, scales) * (1 + 1e-6 * (len(x) > 5))


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (wraps, "sums need 32 bits"),
        (one_for_all_tokens, "each token needs a scale of its own"),
        (not_rounded, "the product without rounding them"),
        (cut_off, "round to the nearest number"),
        (scales_not_turned, "the scale of its own row of the weight"),
        (scale_of_the_token_forgotten, "each token needs a scale of its own"),
        (zero_by_zero, "a token of zeros gives zeros"),
        (in_double, "return float32"),
        (changes_its_input, "change nothing in place"),
        (knows_its_neighbours, "the same bits alone and beside others"),
    ],
)
def test_wrong_products_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("09.2", function, rule)


# -- 09.2, right -----------------------------------------------------------------------------------


def exact_in_doubles(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    whole, own = of(x)
    sums = whole.double() @ numbers.double().T  # of whole numbers, far below 2**53: exact
    return (sums * own * scales.T).float()


def one_token_at_a_time(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    out = torch.zeros(len(x), len(numbers))
    for i, token in enumerate(x):
        largest = token.abs().max()
        if largest > 0:
            whole = (token * 127 / largest).round().long()
            out[i] = (numbers.long() * whole).sum(1) * (scales[:, 0] * (largest / 127))
    return out


@pytest.mark.parametrize("function", [int8_product, exact_in_doubles, one_token_at_a_time])
def test_right_products_run_in_the_engine(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("09.2", function)
    assert "Each request alone writes the same tokens as in company" in verdict.text
    assert "yours" in repr(verdict.pictures[0][1])


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [("09.1", "quantize_rows"), ("09.2", "int8_product")])
def test_the_folded_solution_is_right(number: str, name: str) -> None:
    assert_accepted(number, function_from(solution("09", number), name))


def test_an_untouched_stub_is_open() -> None:
    def quantize_rows(weight: Any, levels: int = 127) -> Any:
        raise NotImplementedError

    def int8_product(x: Any, numbers: Any, scales: Any) -> Any:
        raise NotImplementedError

    assert_open("09.1", quantize_rows)
    assert_open("09.2", int8_product)


def test_what_a_message_shows_is_the_smallest_case() -> None:
    text = judge("09.1", one_scale).text
    assert "weight [[1, 0.5], [100, -30]]" in text


# -- what the notebook stands on -------------------------------------------------------------------


def test_a_rounded_model_leaves_the_plain_one_alone_and_is_close_to_it() -> None:
    plain = plain_model("tiny-random")
    true = teacher_forced(plain.module, TEXT)
    near = teacher_forced(rounded(plain, quantize_rows).module, TEXT)
    far = teacher_forced(rounded(plain, quantize_rows, 7).module, TEXT)
    shared = teacher_forced(rounded(plain, quantize_rows, by_token=False).module, TEXT)
    assert torch.equal(teacher_forced(plain.module, TEXT), true)
    errors = [float((logits - true).abs().mean() / true.std()) for logits in (near, shared, far)]
    assert 1e-4 < errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.05


def test_a_rounded_model_in_floats_is_the_engines_in_whole_numbers() -> None:
    """With the engine's own rows, what `Rounded` gives is what its integer products give."""
    engine = tiny_model("int8")
    plain = plain_model("tiny-random")
    int8.rotate(plain.module)
    mine = rounded(plain, lambda weight, levels: int8.quantize_rows(weight), rotated=True)
    want, got = teacher_forced(engine.module, TEXT), teacher_forced(mine.module, TEXT)
    # A number on the edge of two steps may fall either way, and what follows from it is rounded anew.
    assert float((got - want).abs().mean() / want.std()) < 0.03
    assert float((got.argmax(-1) == want.argmax(-1)).double().mean()) > 0.9


def test_a_rounded_layer_is_the_engines() -> None:
    numbers, scales = e09._numbers(40, 96)
    numbers = torch.clamp(numbers, -64, 64)  # which no kernel cuts off
    x, bias = e09._inputs(9, 96), torch.arange(40.0)
    want = int8.Int8Linear(numbers, scales, bias, int8._IntMM)(x)
    got = e09.Rounded(numbers * scales, bias, None, by_token=True)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_inputs_of_the_cases_are_never_close_to_half_way() -> None:
    """So that no right answer is refused because of how it divides."""
    x = e09._inputs(9, 96).double()
    steps = x / x.abs().amax(1, keepdim=True) * 127
    assert float((steps - steps.floor() - 0.5).abs().min()) > 0.1
