"""The command lines of other engines: every setting lands or is named, and a shell reads what was meant."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from labkit.config import EngineConfig
from labkit.serving import export
from labkit.trace.trace import Trace
from labkit.views.run_page import page
from tests.conftest import loaded
from tests.views.stories import busy, trace_of

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DRAFT = {"speculative": "draft", "draft_model": "owner/small"}
# For each setting, values other than the default and what they need beside them.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "model": [{"model": "Qwen/Qwen2.5-0.5B-Instruct"}],
    "dtype": [{"dtype": "float32"}, {"dtype": "half"}],
    "device": [{"device": "cpu"}, {"device": "cuda:1"}],
    "block_size": [{"block_size": 4}, {"block_size": 32}],
    "num_blocks": [{"num_blocks": 100}],
    "kv_cache_dtype": [{"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "int8", "device": "cpu"}],
    "max_model_len": [{"max_model_len": 300}],
    "max_num_seqs": [{"max_num_seqs": 3}],
    "max_num_batched_tokens": [{"max_num_batched_tokens": 700}],
    "scheduler": [{"scheduler": name} for name in ("static", "uncached")],
    "kv_policy": [{"kv_policy": "reserved"}],
    "enable_prefix_caching": [{"enable_prefix_caching": False}],
    "kv_offloading_size": [{"kv_offloading_size": 0.5}],
    "kv_offloading_dir": [{"kv_offloading_size": 4, "kv_offloading_dir": "folder"}],
    "enable_chunked_prefill": [{"enable_chunked_prefill": False}],
    "quantization": [{"quantization": "int8"}],
    "speculative": [{"speculative": "ngram"}, {"speculative": "draft"}, DRAFT],
    "draft_model": [DRAFT],
    "num_speculative_tokens": [{"speculative": "ngram", "num_speculative_tokens": 3}],
    "speculative_gate": [],  # for the default is what has no twin
    "jump_ahead": [],  # likewise
    "fused_projections": [{"fused_projections": False}],
    "packed_weights": [{"packed_weights": False}],
    "num_threads": [{"num_threads": 2}],
    "attention_backend": [{"attention_backend": "triton"}, {"attention_backend": "sdpa"}],
    "cuda_graphs": [{"cuda_graphs": False}],
    "as_t4": [{"as_t4": True}],
    "tensor_parallel_size": [{"tensor_parallel_size": 2}],
    "max_trace_steps": [{"max_trace_steps": 5}],
    "audit": [{"audit": True}],
    "seed": [{"seed": 7}],
    "generation_config": [{"generation_config": "labkit"}],
}
ALL = [(name, values) for name, cases in OTHERS.items() for values in cases]


def pairs(argv: list[str]) -> dict[str, str | None]:
    """Flags and their values."""
    return {
        word: None if index + 1 == len(argv) or argv[index + 1].startswith("--") else argv[index + 1]
        for index, word in enumerate(argv)
        if word.startswith("--")
    }


@pytest.mark.parametrize("values", [{}, *(values for _, values in ALL)], ids=str)
def test_every_setting_lands_once_or_is_named(values: dict[str, Any]) -> None:
    config = EngineConfig(**values)
    for command in export.commands(config).values():
        assert command.settings == {entry.name for entry in fields(config)}
        assert not command.same.keys() & command.without_twin.keys()
        text = str(command)
        assert all(name in text and why in text for name, why in command.without_twin.items())
        assert all(why in text for _, _, why in command.flags)


@pytest.mark.parametrize(("name", "values"), ALL, ids=str)
def test_a_setting_that_was_changed_is_never_said_to_be_the_same(name: str, values: dict[str, Any]) -> None:
    plain, changed = export.commands(EngineConfig()), export.commands(EngineConfig(**values))
    for engine, command in changed.items():
        assert name not in command.same
        assert name in command.without_twin or command.argv != plain[engine].argv


def test_the_flags_of_a_plain_engine() -> None:
    found = export.commands(EngineConfig())
    assert found["vllm"].argv[:3] == ["vllm", "serve", SMOL]
    assert pairs(found["vllm"].argv) == {
        "--served-model-name": "smollm2-135m",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--dtype": "auto",
        "--block-size": "16",
        "--max-num-seqs": "32",
        "--max-num-batched-tokens": "512",
        "--enable-chunked-prefill": None,
        "--enable-prefix-caching": None,
        "--scheduling-policy": "priority",
        "--tensor-parallel-size": "1",
        "--seed": "0",
    }
    assert found["sglang"].argv[:3] == ["python", "-m", "sglang.launch_server"]
    assert pairs(found["sglang"].argv) == {
        "--model-path": SMOL,
        "--served-model-name": "smollm2-135m",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--dtype": "auto",
        "--page-size": "16",
        "--max-running-requests": "32",
        "--chunked-prefill-size": "512",
        "--enable-mixed-chunk": None,
        "--enable-priority-scheduling": None,
        "--schedule-low-priority-values-first": None,
        "--default-priority-value": "0",
        "--tp-size": "1",
        "--random-seed": "0",
    }


@pytest.mark.parametrize(
    ("values", "vllm", "sglang"),
    [
        ({"dtype": "bf16"}, {"--dtype": "bfloat16"}, {"--dtype": "bfloat16"}),
        ({"as_t4": True}, {"--dtype": "float16"}, {"--dtype": "float16"}),
        ({"device": "cuda:1"}, {}, {"--device": "cuda", "--base-gpu-id": "1"}),
        (
            {"num_blocks": 100, "block_size": 32},
            {"--num-gpu-blocks-override": "100", "--block-size": "32", "--max-model-len": "auto"},
            {"--max-total-tokens": "3200", "--page-size": "32"},
        ),
        (
            {"kv_offloading_size": 2.5},
            {"--kv-offloading-size": "2.5"},
            {"--enable-hierarchical-cache": None, "--hicache-size": "3"},
        ),
        ({"kv_cache_dtype": "int8"}, {"--kv-cache-dtype": "int8_per_token_head"}, {}),
        ({"max_model_len": 300}, {"--max-model-len": "300"}, {"--context-length": "300"}),
        ({"scheduler": "naive"}, {"--max-num-seqs": "1"}, {"--max-running-requests": "1"}),
        (
            {"enable_prefix_caching": False},
            {"--no-enable-prefix-caching": None},
            {"--disable-radix-cache": None},
        ),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
            {"--no-enable-chunked-prefill": None, "--max-num-batched-tokens": "4096"},
            {"--chunked-prefill-size": "-1", "--max-prefill-tokens": "4096"},
        ),
        (
            {"attention_backend": "triton"},
            {"--attention-backend": "TRITON_ATTN"},
            {"--attention-backend": "triton"},
        ),
        (
            {"cuda_graphs": False},
            {"--enforce-eager": None},
            {"--disable-decode-cuda-graph": None, "--disable-prefill-cuda-graph": None},
        ),
        ({"seed": 7}, {"--seed": "7"}, {"--random-seed": "7"}),
        (
            {"speculative": "ngram", "num_speculative_tokens": 5},
            {},
            {"--speculative-algorithm": "NGRAM", "--speculative-num-draft-tokens": "6"},
        ),
        (
            DRAFT | {"num_speculative_tokens": 5},
            {},
            {
                "--speculative-algorithm": "STANDALONE",
                "--speculative-draft-model-path": "owner/small",
                "--speculative-num-steps": "5",
                "--speculative-eagle-topk": "1",
                "--speculative-num-draft-tokens": "6",
            },
        ),
    ],
    ids=lambda values: str(values)[:40],
)
def test_what_a_setting_becomes(
    values: dict[str, Any], vllm: dict[str, str | None], sglang: dict[str, str | None]
) -> None:
    found = export.commands(EngineConfig(**values))
    assert pairs(found["vllm"].argv).items() >= vllm.items()
    assert pairs(found["sglang"].argv).items() >= sglang.items()


def test_speculation_is_json_for_vllm() -> None:
    def config(**values: Any) -> Any:
        argv = export.commands(EngineConfig(**values))["vllm"].argv
        return json.loads(argv[argv.index("--speculative-config") + 1])

    ngram = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2, "num_speculative_tokens": 8}
    assert config(speculative="ngram") == ngram
    assert config(**DRAFT) == {
        "method": "draft_model", "model": "owner/small", "num_speculative_tokens": 8
    }  # fmt: skip


def test_a_setting_that_came_later_is_named() -> None:
    @dataclass(frozen=True)
    class Later(EngineConfig):
        warp: int = 1

    for command in export.commands(Later(warp=9)).values():
        assert "warp" in command.without_twin and "warp" in str(command)
    assert all("warp" in command.same for command in export.commands(Later()).values())


def test_a_folder_keeps_its_name_and_a_shell_reads_it_whole(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s $HOME & a "model"; # 1'
    folder.mkdir()
    (tmp_path / "bin").mkdir()
    for program in ("vllm", "python"):
        stub = tmp_path / "bin" / program
        stub.write_text(f"#!/bin/sh\nprintf '%s\\0' {program} \"$@\"\n")
        stub.chmod(0o755)
    config = EngineConfig(model=folder, speculative="ngram")
    for command in export.commands(config).values():
        assert command.argv[command.argv.index("--served-model-name") + 1] == folder.name
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        shell = subprocess.run(
            ["/bin/sh", "-c", str(command)], env={"PATH": path}, capture_output=True, text=True, check=True
        )
        assert shell.stdout.split("\0")[:-1] == command.argv
        assert str(folder) in command.argv
        assert shlex.split(str(command).replace(" \\\n", " "), comments=True) == command.argv


def test_models_without_files_are_refused() -> None:
    for values, words in (
        ({"model": "tiny-random"}, "model: 'tiny-random' is made in memory"),
        ({"model": loaded("llama")}, "model: 'llama' is loaded already"),
        (DRAFT | {"draft_model": "tiny-random"}, "draft_model: 'tiny-random' is made in memory"),
    ):
        with pytest.raises(ValueError, match=words):
            export.commands(EngineConfig(**values))


def test_the_program_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--max-num-seqs", "3", "--num-blocks", "50"]) == 0
    vllm, sglang = capsys.readouterr().out.strip().split("\n\n")
    config = EngineConfig(max_num_seqs=3, num_blocks=50)
    assert [vllm, sglang] == [str(command) for command in export.commands(config).values()]


def test_the_program_says_in_a_line_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--model", "tiny-random"]) == 2
    assert export.main(["--max-num-seqs", "600"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "tiny-random" in first and "max_num_batched_tokens" in second
    with pytest.raises(SystemExit):
        export.main(["--block-size", "0"])


# -- a run as a page ------------------------------------------------------------------------------


def test_a_trace_becomes_a_page_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    busy().save(tmp_path / "run.jsonl")
    assert export.main(["--html", str(tmp_path / "run.jsonl")]) == 0
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert text == page(Trace.load(tmp_path / "run.jsonl"))
    said, blamed = capsys.readouterr()
    assert said == f"{tmp_path / 'run.html'}: 26 steps, {len(text.encode()) / 1000:.0f} KB.\n" and not blamed
    whole = (tmp_path / "run.jsonl").read_text()
    (tmp_path / "torn.jsonl").write_text(whole[:-9])
    assert export.main(["--html", str(tmp_path / "torn.jsonl")]) == 0
    assert "25 steps" in (said := capsys.readouterr().out) and "torn off" in said


def test_what_is_no_trace_or_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "perfetto.json": ('{"traceEvents": []}', "a trace in Perfetto's format"),
        "page.jsonl": ("<html></html>", "a web page"),
        "empty.jsonl": ("\n".join(trace_of().lines()), "trace holds no steps"),
        "bent.jsonl": ("\n".join(busy().lines()).replace('"step":3', '"step":"3"'), "line 5"),
        "run.html": ("\n".join(busy().lines()), "would be overwritten"),
        "folder.jsonl": ("\n".join(busy().lines()), "path: cannot be written"),
    }
    (tmp_path / "folder.html").mkdir()
    for name, (text, reason) in files.items():
        (tmp_path / name).write_text(text)
        assert export.main(["--html", str(tmp_path / name)]) == 2
        said, blamed = capsys.readouterr()
        assert not said and blamed.startswith("labkit.export: --html: ") and reason in blamed
        assert blamed.count("\n") == 1
    for missing in (tmp_path / "no.jsonl", ""):
        assert export.main(["--html", str(missing)]) == 2
        assert capsys.readouterr().err.startswith("labkit.export: --html: ")
    assert {path.name for path in tmp_path.iterdir()} == {*files, "folder.html"}
