"""The compiler: used once, not needed, and never able to stop the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labkit import LLM, SamplingParams
from labkit.core.model import Transformer
from labkit.kernels.cpu import build
from labkit.kernels.cpu.layers import is_fused
from labkit.models.load import build_transformer, load_model
from labkit.models.progress import Say
from labkit.models.tiny import tiny_random
from tests.kernels.cpu.compiled import LACKING, needs_compiler


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that seems to have loaded nothing yet, with an empty cache."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "is_loaded", lambda: False)
    return tmp_path


def built(say: Say) -> Transformer:
    """The tiny model, by way of what all models go through."""
    config, tensors, _ = tiny_random()
    return build_transformer(
        config, tensors.items(), dtype=torch.float32, device=torch.device("cpu"), say=say
    )


def answer(**config: object) -> list[int]:
    llm = LLM(**{"model": "tiny-random", **config})
    return llm.generate("the engine", SamplingParams(max_tokens=12))[0].token_ids


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])  # none there, and one that fails
def test_without_a_compiler_all_runs_as_before_and_one_line_says_so(
    afresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    lines: list[str] = []
    assert not is_fused(built(lines.append))
    assert [line for line in lines if compiler in line and "slower" in line] == lines[-1:]
    assert answer() == answer(cpu_kernels=False)
    assert not list(afresh.rglob("*.so"))


def test_a_library_that_does_not_load_is_no_end_either(afresh: Path) -> None:
    library = build.library_path(afresh / "kernels")
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    lines: list[str] = []
    assert not is_fused(built(lines.append))
    assert "slower" in lines[-1]


@needs_compiler
def test_it_compiles_once_says_so_and_leaves_one_file(tmp_path: Path) -> None:
    script = f"""
import torch
from pathlib import Path
from labkit.kernels.cpu.build import why_not
print(why_not(Path({str(tmp_path)!r}), print), torch.ops.labkit_cpu.silu_mul(torch.zeros(1, 4)).tolist())
"""
    said = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in "12"]
    assert [each.stdout.splitlines()[-1] for each in said] == ["None [[0.0, 0.0]]"] * 2
    assert [each.stdout.count("Compiling") for each in said] == [1, 0]
    assert [file.suffix for file in tmp_path.iterdir()] == [".so"]


@needs_compiler
def test_the_switch_leaves_the_readable_layers() -> None:
    assert LACKING is None
    assert is_fused(load_model("tiny-random", say=None).module)
    assert not is_fused(load_model("tiny-random", cpu_kernels=False, say=None).module)
