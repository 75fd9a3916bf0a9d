"""The options that programs share, and the settings that they stand for."""

from __future__ import annotations

from dataclasses import fields

import pytest

from labkit.config import EngineConfig
from labkit.serving import cli


def options(*given: str):
    parser = cli.Parser()
    cli.add_engine(parser, num_blocks=None)
    return parser.parse_args(given)


def test_every_option_reaches_the_settings() -> None:
    given = {
        "model": "tiny-random",
        "device": "cpu",
        "dtype": "float32",
        "quantization": "int8",
        "num_blocks": 50,
        "kv_cache_dtype": "int8",
        "block_size": 8,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 70,
        "tensor_parallel_size": 2,
        "max_step_seconds": 0.5,
        "speculative": "ngram",
        "num_speculative_tokens": 4,
        "generation_config": "labkit",
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    config = cli.engine_config(options(*words))
    assert {name: getattr(config, name) for name in given} == given
    known = {entry.name for entry in fields(EngineConfig)}
    untold = vars(options()).keys() & known - given.keys()
    others = {"scheduler", "draft_model", "kv_offloading_size", "kv_offloading_dir"}
    assert untold == others  # which go with other settings
    kept = cli.engine_config(options("--kv-offloading-size", "1.5", "--kv-offloading-dir", "folder"))
    assert (kept.kv_offloading_size, kept.kv_offloading_dir) == (1.5, "folder")
    assert cli.engine_config(options("--scheduler", "naive")).scheduler == "naive"
    assert cli.engine_config(options(), draft_model="small", speculative="draft").draft_model == "small"


def test_a_started_engine_has_the_settings_of_its_options() -> None:
    asked = options("--model", "tiny-random", "--max-step-seconds", "0.5", "--num-blocks", "20")
    with cli.load(asked, trace_steps=7) as live:
        config = live.engine.config
        assert (config.max_step_seconds, config.num_blocks, config.max_trace_steps) == (0.5, 20, 7)


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "2 GB", ""])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--kv-offloading-size", size)
    assert "--kv-offloading-size: must be a number of GiB, more than 0, not" in capsys.readouterr().err


def test_settings_that_cannot_work_together_are_refused() -> None:
    with pytest.raises(ValueError, match="max_step_seconds needs scheduler"):
        cli.engine_config(options("--max-step-seconds", "1", "--scheduler", "naive"))
