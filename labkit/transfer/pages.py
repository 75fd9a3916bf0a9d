"""What travels: the keys and values of a text's first tokens, in whole pages, with all that they depend on.

On the way they are one buffer of bytes in the format of safetensors, which a file, a pipe or a socket can
hold alike. Its header names the model, and a checksum covers every byte that counts.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_FORMAT = "labkit-kv-1"
_LENGTH = struct.Struct("<Q")  # safetensors begins with the length of its header


class TransferError(ValueError):
    """Pages are damaged, or do not fit into an engine. The message names what differs."""


@dataclass(frozen=True, eq=False)
class KVPages:
    """The first pages of a text.

    Attributes:
        token_ids: the tokens whose keys and values these are: as many as the pages hold.
        blocks: (layers, pages, 2, kv_heads, block_size, head_dim), keys and then values, on the CPU; or those
            of an `Int8KVCache`, with their scales.
        model: the name of the model, for messages.
    """

    token_ids: list[int]
    blocks: Tensor
    model: str

    def to_bytes(self) -> bytes:
        """Return all of it as one buffer."""
        tensors = {
            "blocks": self.blocks.contiguous(),
            "token_ids": torch.tensor(self.token_ids, dtype=torch.int64),
        }
        facts = {"format": _FORMAT, "model": self.model}
        return save(tensors, metadata={**facts, "sha256": _checksum(tensors, facts)})

    @classmethod
    def from_bytes(cls, data: bytes) -> KVPages:
        """Read what `to_bytes` made.

        Raises:
            TransferError: if it is damaged, or something else.
        """
        facts = _facts(data)
        if facts.get("format") != _FORMAT:
            raise TransferError(f"these are no pages of labkit: the format is {facts.get('format')!r}")
        try:
            tensors = load(data)
            same = facts.pop("sha256") == _checksum(tensors, facts)
            blocks, token_ids, model = tensors["blocks"], tensors["token_ids"], facts["model"]
        except (SafetensorError, KeyError) as error:
            raise TransferError(f"these pages are damaged: {error}") from None
        if not same:
            raise TransferError("these pages are damaged: their checksum is another")
        if blocks.ndim != 6 or not blocks.numel() or token_ids.dtype != torch.int64:
            raise TransferError("these pages are damaged: they hold no blocks, or no tokens")
        if token_ids.shape != (blocks.shape[1] * blocks.shape[4],):
            raise TransferError("these pages are damaged: token_ids are not as many as the blocks hold")
        return cls(token_ids.tolist(), blocks, model)


def _facts(data: bytes) -> dict[str, Any]:
    """Return the metadata of a buffer of safetensors, which its own reader leaves out."""
    try:
        (length,) = _LENGTH.unpack_from(data)
        return dict(json.loads(data[_LENGTH.size : _LENGTH.size + length])["__metadata__"])
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise TransferError("these are no pages of labkit") from None


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy())
    return whole.hexdigest()
