"""Configurations: read without `transformers` where they say everything, and to the same effect."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from labkit.models.architecture import shape_of, supports
from labkit.models.checkpoint import EXPLICIT, read_config
from labkit.models.errors import ModelError
from tests.models.saved_models import edit_json

pytest_plugins = ["tests.models.fixtures"]


def assert_same_shape(ours: object, theirs: PreTrainedConfig) -> None:
    assert supports(ours)
    mine, wanted = shape_of(ours), shape_of(theirs)
    for field in fields(mine):
        one, other = getattr(mine, field.name), getattr(wanted, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_every_family_has_the_shape_that_transformers_reads(
    family: str, saved: Callable[[str], Path]
) -> None:
    config = read_config(saved(family))
    assert isinstance(config, SimpleNamespace) == (family == "llama")
    assert_same_shape(config, AutoConfig.from_pretrained(saved(family)))


# Without one of the two, the others make no sense, and transformers says so.
@pytest.mark.parametrize("name", sorted(EXPLICIT.keys() - {"hidden_size", "num_attention_heads"}))
def test_what_a_configuration_leaves_out_is_left_to_transformers(name: str, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop(name))
    config = read_config(folder)
    assert isinstance(config, PreTrainedConfig)
    assert_same_shape(config, AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=2.0, rope_theta=1e4),
        dict(rope_type="default"),
        dict(rope_theta=5e5),
    ],
)
def test_other_rotary_positions_are_left_to_transformers(rope: dict, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(rope_parameters=rope))
    config = read_config(folder)
    assert isinstance(config, PreTrainedConfig)
    assert_same_shape(config, AutoConfig.from_pretrained(folder))


def test_a_value_of_the_wrong_type_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(hidden_size="many"))
    with pytest.raises(ModelError, match=r"config.json in .* cannot be used"):
        read_config(folder)


def test_such_a_model_loads_without_the_configurations_of_transformers(folder: Path) -> None:
    """Which take a second to import."""
    code = (
        "import sys; from labkit.models.load import load_model; load_model(sys.argv[1], say=None); "
        "sys.exit('transformers.configuration_utils' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0
