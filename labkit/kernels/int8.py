"""Eight bits: weights per output channel, activations per token, products of whole numbers.

A number x becomes `round(x / scale)`, from -127 to 127. Weights get one scale per output channel, once;
activations one per token, at every step. The product of the whole numbers is exact, so an answer does not
depend on the batch around it, and the two scales are multiplied back in afterwards:

    y = (q_x @ q_w.T) * scale_x * scale_w

What costs accuracy is outliers: one large channel in a row makes the scale coarse for all others. They are
taken out before, by turning the space they live in. A rotation R spreads a large channel over all, and
(x R) (W R).T = x W.T, so the model computes what it did before. The stream between the layers is turned once
and for all, inside the weights (Ashkboos et al. 2024, QuaRot; the norms allow it because a rotation leaves
lengths alone, once their weights have moved into the next product). Only the input of `down_proj`, behind
a product of two activations, is turned while the model runs, by a small Hadamard matrix.

x86 without VNNI adds products of 8 bits in pairs, in 16 bits, and cuts off what does not fit. So a scale is
chosen such that no pair of neighbouring weights can bring that about; it costs a fraction of a bit, and
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
from transformers import PreTrainedConfig

from labkit.core.model import Transformer

_LEVELS = 127
_TINY = torch.finfo(torch.float32).tiny  # the scale of a row of zeros
_PAIR = 32767 // 255  # what two neighbours may add up to: 255 is the largest activation, unsigned
_MAX_HADAMARD = 64  # of the rotation at run time
_MIN_ROWS_CUDA = 17  # fewer rows than that cuBLASLt refuses


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and a scale for each row.

    Args:
        weight: (out, in), any float dtype.

    Returns:
        int8 (out, in), and fp32 scales (out, 1) with `weight ~ numbers * scales`. No two neighbours in a row
        (0 and 1, 2 and 3, ...) of the same sign add up to more than 128.
    """
    weight = weight.float()
    pairs = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
    together = pairs.sum(-1).abs().amax(1, keepdim=True)  # of opposite signs they take each other down
    scales = torch.maximum(weight.abs().amax(1, keepdim=True) / _LEVELS, together / (_PAIR - 1))
    scales.clamp_(min=_TINY)
    return torch.round(weight / scales).to(torch.int8), scales


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix (Sylvester 1867) of a power of two, scaled to be orthogonal; it is symmetric."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def rotation(size: int) -> Tensor:
    """A seeded orthogonal matrix (size, size), fp32: random signs, a Hadamard matrix, and what is left."""
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    power = size & -size  # the largest power of two in it
    odd = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
    rest = torch.linalg.qr(odd).Q.float().contiguous()
    return signs[:, None] * torch.kron(rest, hadamard(power))


@torch.no_grad()
def rotate(model: Transformer) -> None:
    """Turn the space between the layers of a model; it computes the same as before, up to rounding.

    The weights of the norms move into the products that follow, which ties no output layer to an embedding.
    """
    turn = rotation(model.config.hidden_size).to(model.device, model.dtype)

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
# Each takes x (rows, in) with numbers from -1 to 1, in steps of 1/127, and gives scale_w * (x @ w.T).


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
    """FBGEMM's kernel, which is fast on x86 without VNNI as well."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # that quantised tensors are on their way out
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
    """The fastest kernel that this machine has, and the reason.

    On a CPU they are timed, for about a tenth of a second, on a product of 16 rows.
    """
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


class Int8Linear(nn.Module):
    """A linear layer on whole numbers.

    Args:
        weight, scales: from `quantize_rows`.
        bias: added at the end.
        turn: a Hadamard matrix for pieces of the input, whose weight was turned likewise.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None, kernel: Kernel, turn: Tensor | None = None
    ) -> None:
        super().__init__()
        self.multiply = kernel(weight, scales)
        self.bias, self.turn = bias, turn

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        if self.turn is not None:
            x = (x.reshape(-1, len(self.turn)) @ self.turn).view(x.shape)
        # An infinite or NaN row stays one: its largest number does.
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=_TINY)
        out = self.multiply(x / largest).mul_(largest)
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
    """Rotate a model and quantise it: all its tensors, for `from_quantized`.

    Args:
        model: in fp32, with plain linear layers; it is changed, and of no use afterwards.
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
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel,
) -> Transformer:
    """A model on whole numbers.

    Args:
        tensors: from `quantize`.
        dtype: of what lies between the products.
        kernel: from `pick_kernel`.

    Raises:
        ValueError: for a tensor that is missing or of the wrong shape.
    """
    model = Transformer.empty(config, dtype=dtype, device=device)
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
    return hadamard(min(size & -size, _MAX_HADAMARD))
