"""A GGUF file, converted: what comes out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from labkit.models import gguf_convert
from tests.models.gguf_package import write_gguf

pytest_plugins = ["tests.models.fixtures"]


def test_the_copy_is_in_the_hubs_order_even_where_ropes_pairs_differ(
    miniature: tuple[bytes, dict], tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(miniature[0])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    stored = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).astype(np.float16))
    expected = miniature[1]["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(stored, expected)  # else the test above would not notice the permutation
    assert torch.equal(stored[0:16:2], expected[:8])
    assert torch.equal(stored[1:16:2], expected[8:16])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "llama-bpe"}, "llama/gpt2/llama-bpe"),
        (
            {"spoil": lambda t: t.update({"output_norm.weight": np.full(64, 1e5, np.float32)})},
            "more than fp16",
        ),
        (
            {"spoil": lambda t: t.update({"output_norm.weight": np.full(64, np.nan, np.float32)})},
            "more than fp16",
        ),
    ],
)
def test_what_cannot_be_converted(options: dict, message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        gguf_convert.convert(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "rope_freqs.weight", "blk", ""]
)
def test_unknown_tensor_names(name: str) -> None:
    with pytest.raises(ValueError, match="no tensor"):
        gguf_convert.hf_name(name)
