"""The compiler: used once, not needed, and never able to stop the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit import LLM, SamplingParams
from labkit.kernels.cpu import build
from labkit.kernels.cpu.layers import is_fused
from labkit.models.load import load_model
from tests.kernels.cpu.compiled import LACKING, needs_compiler


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has loaded nothing yet, with an empty cache."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    build._load.cache_clear()
    yield tmp_path
    build._load.cache_clear()


def answer(**config: object) -> list[int]:
    llm = LLM("tiny-random", **config)
    return llm.generate("the engine", SamplingParams(max_tokens=12))[0].token_ids


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])  # none there, and one that fails
def test_without_a_compiler_all_runs_as_before_and_one_line_says_so(
    afresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    lines: list[str] = []
    model = load_model("tiny-random", say=lines.append)
    assert not is_fused(model.module)
    assert [line for line in lines if compiler in line and "slower" in line] == lines[-1:]
    tokens = answer(model=model)
    assert tokens == answer(cpu_kernels=False)
    assert not list(afresh.rglob("*.so"))


def test_a_library_that_does_not_load_is_no_end_either(afresh: Path) -> None:
    library = build.library_path(afresh / "kernels")
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    lines: list[str] = []
    assert not is_fused(load_model("tiny-random", say=lines.append).module)
    assert "slower" in lines[-1]


@needs_compiler
def test_it_compiles_once_and_keeps_nothing_else(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build._compile(build.library_path(afresh))
    assert [file.name for file in afresh.iterdir()] == [build.library_path(afresh).name]
    monkeypatch.setenv("CXX", "no-such-compiler")  # no longer needed
    assert build.library_path(afresh).is_file()


@needs_compiler
def test_the_switch_leaves_the_readable_layers(tmp_path: Path) -> None:
    assert LACKING is None
    assert is_fused(load_model("tiny-random", say=None).module)
    assert not is_fused(load_model("tiny-random", cpu_kernels=False, say=None).module)
