"""Other ways to compute the product of a linear layer, put into a model in place of `nn.Linear`.

Each computes what the layer it replaces does. `PackedLinear` is faster on a CPU. `SplitLinear` is slower, and
shows what fusing projections gains. For products in 8 bits see `int8.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.core.model import Transformer

_PACKED_ROWS = 32  # a hint for the layout; the product may have any number of rows


class PackedLinear(nn.Module):
    """A linear layer on a CPU whose weight lies in the order in which oneDNN reads it.

    The plain layer rearranges its weight in every product, which for few rows takes longer than the product.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class SplitLinear(nn.Module):
    """Several products where one would do: what a model computes before its projections are fused."""

    def __init__(self, linear: nn.Linear, sizes: list[int]) -> None:
        super().__init__()
        self.weights = linear.weight.split(sizes)
        self.biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]
        return torch.cat(parts, dim=-1)


def split(model: Transformer) -> None:
    """Take the fused projections of a model apart, to see what fusing them gains."""
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        sizes = [n * attention.head_dim for n in (attention.heads, attention.kv_heads, attention.kv_heads)]
        attention.qkv_proj = SplitLinear(attention.qkv_proj, sizes)
        mlp.gate_up_proj = SplitLinear(mlp.gate_up_proj, [mlp.gate_up_proj.out_features // 2] * 2)


def can_pack(model: Transformer) -> bool:
    """Whether `pack` can be used: oneDNN computes in the model's dtype on this CPU."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return model.dtype == torch.float32 or (model.dtype == torch.bfloat16 and bf16_on_cpu())


def bf16_on_cpu() -> bool:
    """Whether oneDNN computes in bf16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: Transformer) -> None:
    """Rearrange the weights of all linear layers for this CPU. Only for a model that `can_pack` accepts."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
