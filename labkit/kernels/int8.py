"""Eight bits (W8A8): weights with a scale per output channel, activations with one per token.

A number x becomes the whole number `round(x / scale)`, from -127 to 127. The scales of weights are computed
once, those of activations at every step. The product of whole numbers is exact, so an answer does not depend
on the batch around it, and the two scales are multiplied back in afterwards:

    y = (q_x @ q_w.T) * scale_x * scale_w

Outliers cost accuracy: one large channel in a row makes the scale coarse for all others. A rotation R of the
space removes them, because it spreads a large channel over all. As (x R) (W R).T = x W.T, the model computes
what it did before. The stream between the layers is rotated inside the weights, once and for all
(Ashkboos et al. 2024, QuaRot). The norms allow this after their weights have moved into the next product,
because a rotation changes no length. Only the input of `down_proj`, which comes from a product of two
activations, is rotated while the model runs, by a small Hadamard matrix.

On a GPU it halves the memory of weights, and is likely to cost time in steps of few rows: round a product
are a dozen small kernels that find scales, round and scale back, 50 more in a layer than in half precision,
and in such a step a launch takes as long as the product.

x86 without VNNI adds products of 8 bits in pairs, in 16 bits, and cuts off what does not fit. So each scale
is chosen such that no pair of neighbouring weights can make that happen. This costs a fraction of a bit, and
makes the numbers the same on every machine.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.core.model import ModelShape, Transformer

_LEVELS = 127
_TINY = torch.finfo(torch.float32).tiny  # the scale of a row of zeros
_PAIR = 32767 // 255  # what two neighbours may add up to: 255 is the largest activation, unsigned
_MAX_HADAMARD = 64  # size of the rotation at run time
_MIN_ROWS_CUDA = 17  # cuBLASLt refuses fewer rows


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to whole numbers, with a scale for each row.

    Args:
        weight: a matrix (out, in) of any float dtype.

    Returns:
        Numbers (out, in) in int8 and scales (out, 1) in fp32, with `weight ~ numbers * scales`. No two
        neighbours in a row (0 and 1, 2 and 3, ...) of the same sign add up to more than 128.
    """
    weight = weight.float()
    pairs = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    together = pairs.sum(-1).abs().amax(1, keepdim=True)  # opposite signs cancel, and do no harm
    scales = torch.maximum(weight.abs().amax(1, keepdim=True) / _LEVELS, together / (_PAIR - 1))
    scales.clamp_(min=_TINY)
    return torch.round(weight / scales).to(torch.int8), scales


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix (Sylvester 1867) of a power of two, symmetric and scaled to be orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def rotation(size: int) -> Tensor:
    """Return a seeded orthogonal matrix (size, size) in fp32.

    It is made of random signs, a Hadamard matrix for the power of two in the size, and a random rotation for
    the odd factor that is left.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    power = size & -size  # the largest power of two that divides it
    odd = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
    rest = torch.linalg.qr(odd).Q.float().contiguous()
    return signs[:, None] * torch.kron(rest, hadamard(power))


@torch.no_grad()
def rotate(model: Transformer) -> None:
    """Rotate the space between the layers of a model, which computes the same as before, up to rounding.

    The weights of the norms move into the products that follow. Therefore the output layer and the embedding,
    if they were one table before, become two.
    """
    turn = rotation(model.shape.hidden_size).to(model.device, model.dtype)

    def reads(linear: nn.Linear, norm: nn.Module) -> None:
        linear.weight = nn.Parameter((linear.weight * norm.weight) @ turn, requires_grad=False)

    def writes(linear: nn.Linear) -> None:
        linear.weight = nn.Parameter(turn.t() @ linear.weight, requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias @ turn, requires_grad=False)

    reads(model.lm_head, model.norm)
    model.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight @ turn, requires_grad=False)
    for layer in model.layers:
        reads(layer.self_attn.qkv_proj, layer.input_layernorm)
        reads(layer.mlp.gate_up_proj, layer.post_attention_layernorm)
        writes(layer.self_attn.o_proj)
        writes(layer.mlp.down_proj)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1)
    model.norm.weight.fill_(1)


# -- products of whole numbers --------------------------------------------------------------------
#
# Each takes x (rows, in) with numbers from -1 to 1, rounds them to steps of 1/127, and returns
# scale_w * (x @ w.T).


class _IntMM:
    """`torch._int_mm`: VNNI on a CPU that has it, tensor cores on a GPU."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.weight, self.scales = weight.t(), scales.t() / _LEVELS
        self.min_rows = _MIN_ROWS_CUDA if weight.is_cuda else 1

    def __call__(self, x: Tensor) -> Tensor:
        x, rows = (x * _LEVELS).round().to(torch.int8), len(x)
        if rows < self.min_rows:
            x = F.pad(x, (0, 0, 0, self.min_rows - rows))
        return torch._int_mm(x, self.weight)[:rows] * self.scales


class _Fbgemm:
    """FBGEMM's kernel, which is also fast on x86 without VNNI."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # PyTorch warns that it will drop quantised tensors
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(
                weight.contiguous(), scales.flatten().double(), zeros, 0
            )
            torch.backends.quantized.engine = "fbgemm"
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, x: Tensor) -> Tensor:
        # Activations are unsigned there: 128 stands for zero. Rounding is done inside.
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, 1 / _LEVELS, 128, self.packed
        )


Kernel = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


def pick_kernel(device: torch.device) -> tuple[Kernel, str]:
    """Return the fastest kernel that this machine has, and the reason in words.

    On a CPU the kernels are timed on a product of 16 rows, which takes about a tenth of a second.
    """
    if device.type == "cuda":
        return _IntMM, "torch._int_mm (on a GPU for memory: in decode steps, 16 bits are likely to be faster)"
    if device.type != "cpu":
        return _IntMM, "torch._int_mm"
    kernels: dict[str, Kernel] = {"torch._int_mm": _IntMM}
    if "fbgemm" in torch.backends.quantized.supported_engines:
        kernels["FBGEMM"] = _Fbgemm
    weight = torch.randint(-60, 61, (768, 512), dtype=torch.int8)
    x, scales = torch.randn(16, 512), torch.ones(768, 1)
    seconds = {}
    for name, kernel in kernels.items():
        multiply = kernel(weight, scales)
        multiply(x)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            multiply(x)
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times)
    best = min(seconds, key=seconds.__getitem__)
    what = ", ".join(f"{name} {1e6 * took:.0f} us" for name, took in seconds.items())
    return kernels[best], f"{best} (16 rows by 512 x 768: {what})"


def scale_rows(x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Divide each row (rows, in) by the largest size of a number in it; return that (rows, 1), too."""
    # An infinite or NaN row stays one, because its largest number is.
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=least)
    return x / largest, largest


class Int8Linear(nn.Module):
    """A linear layer on whole numbers.

    Args:
        weight, scales: what `quantize_rows` returns.
        bias: the bias, which is added at the end.
        kernel: how to multiply, from `pick_kernel`.
        turn: a Hadamard matrix that rotates each piece of the input; the weight was rotated in the same way.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None, kernel: Kernel, turn: Tensor | None = None
    ) -> None:
        super().__init__()
        self.multiply = kernel(weight, scales)
        self.bias, self.turn = bias, turn
        self.scale_rows = scale_rows

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        if self.turn is not None:
            x = (x.reshape(-1, len(self.turn)) @ self.turn).view(x.shape)
        x, largest = self.scale_rows(x, _TINY)
        out = self.multiply(x).mul_(largest)
        return (out if self.bias is None else out.add_(self.bias)).to(dtype)


class Int8Embedding(nn.Module):
    """A table of whole numbers (vocab, hidden), with a scale for each row."""

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.scales, self.dtype = weight, scales, dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        return (self.weight[token_ids] * self.scales[token_ids]).to(self.dtype)


@torch.no_grad()
def quantize(model: Transformer) -> dict[str, Tensor]:
    """Rotate a model and quantise it; return all tensors that `from_quantized` needs.

    Args:
        model: a model in fp32 with plain linear layers. It is changed, and of no use afterwards.
    """
    rotate(model)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight
            if name.endswith("down_proj"):
                turn = _turn(weight.shape[1])
                weight = (weight.reshape(-1, len(turn)) @ turn).view(weight.shape)
            tensors[name + ".numbers"], tensors[name + ".scales"] = quantize_rows(weight)
            if getattr(module, "bias", None) is not None:
                tensors[name + ".bias"] = module.bias
        elif hasattr(module, "weight"):
            tensors[name + ".weight"] = module.weight
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def from_quantized(
    shape: ModelShape,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel,
) -> Transformer:
    """Build a model that computes with whole numbers.

    Args:
        shape: the sizes of the model.
        tensors: what `quantize` returned.
        dtype: the dtype of activations.
        device: where to build it.
        kernel: how to multiply, from `pick_kernel`.

    Raises:
        ValueError: if a tensor is missing or of the wrong shape.
    """
    model = Transformer(shape, dtype=dtype, device=device)
    try:
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear | nn.Embedding):
                if hasattr(module, "weight"):
                    module.weight.copy_(tensors[name + ".weight"])
                continue
            numbers, scales = (tensors[f"{name}.{part}"].to(device) for part in ("numbers", "scales"))
            if numbers.shape != module.weight.shape:
                have, want = tuple(numbers.shape), tuple(module.weight.shape)
                raise ValueError(f"{name} has shape {have}, not {want}")
            new: nn.Module
            if isinstance(module, nn.Embedding):
                new = Int8Embedding(numbers, scales, dtype)
            else:
                bias = None if module.bias is None else tensors[f"{name}.bias"].to(device)
                turn = _turn(numbers.shape[1]).to(device) if name.endswith("down_proj") else None
                new = Int8Linear(numbers, scales, bias, kernel, turn)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    except KeyError as error:
        raise ValueError(f"tensor {error} is missing") from error
    return model


def _turn(size: int) -> Tensor:
    """Return the rotation of `down_proj`'s input, a piece at a time: the largest that divides its size."""
    return hadamard(min(size & -size, _MAX_HADAMARD))
