"""Eight bits: exact products, a rotation that changes nothing, and a copy that is kept and distrusted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import EngineConfig
from labkit.core.model import Transformer
from labkit.engine import Engine
from labkit.kernels import int8
from labkit.models.architecture import build, shape_of
from labkit.models.errors import ModelError
from labkit.models.load import LoadedModel, load_model
from labkit.models.teacher_forcing import teacher_forced
from labkit.models.tiny import tiny_tokenizer
from labkit.sampling_params import SamplingParams
from tests.conftest import loaded, reference

CPU = torch.device("cpu")
TOKENS = [(7 * i) % 200 for i in range(60)]
KERNELS = [int8._IntMM]
if "fbgemm" in torch.backends.quantized.supported_engines:
    KERNELS.append(int8._Fbgemm)


def plain(family: str) -> Transformer:
    model = reference(family)
    return build(model.config, model.state_dict().items(), dtype=torch.float32, device=CPU)


def in_int8(family: str, kernel: int8.Kernel = int8._IntMM) -> Transformer:
    tensors = int8.quantize(plain(family))
    return int8.from_quantized(
        shape_of(reference(family).config), tensors, dtype=torch.float32, device=CPU, kernel=kernel
    )


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1e-30, 1.0, 1e6]))
@settings(deadline=None, max_examples=60)
def test_rows_come_back_within_half_a_step_and_no_pair_is_too_large(seed, rows, columns, size) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    numbers, scales = int8.quantize_rows(weight)
    assert numbers.dtype == torch.int8
    assert ((numbers * scales - weight).abs() <= scales * 0.501).all()
    pairs = torch.nn.functional.pad(numbers.int(), (0, columns % 2)).unflatten(1, (-1, 2)).sum(-1)
    assert pairs.abs().max() <= 128


def test_a_row_of_zeros_is_zeros() -> None:
    numbers, scales = int8.quantize_rows(torch.zeros(2, 6))
    assert not numbers.any()
    assert scales.isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 9, 16, 48, 576])
def test_rotations_are_orthogonal_and_leave_no_axis_alone(size: int) -> None:
    turn = int8.rotation(size)
    torch.testing.assert_close(turn @ turn.t(), torch.eye(size), rtol=0, atol=1e-5)
    if size > 2:
        assert turn.abs().max() < 0.95
    assert torch.equal(turn, int8.rotation(size)), "another rotation in the next process"


def test_a_rotated_model_computes_the_same(family: str) -> None:
    model = plain(family)
    int8.rotate(model)
    want = teacher_forced(loaded(family).module, TOKENS)
    torch.testing.assert_close(teacher_forced(model, TOKENS), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_are_those_of_whole_numbers(kernel: int8.Kernel) -> None:
    """Also at the very edge, where x86 without VNNI would cut sums off."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    weight[0], weight[1] = 5, -5
    weight[2, ::2], weight[2, 1::2] = 5, -5
    numbers, scales = int8.quantize_rows(weight)
    x = torch.randint(-127, 128, (33, 512), generator=torch.Generator().manual_seed(2)).float()
    x[0], x[1] = 127, -127
    x[2, ::2], x[2, 1::2] = 127, -127
    exact = (x.double() @ numbers.double().t()) * scales.t().double()
    multiply = kernel(numbers, scales)
    for rows in (x, x[:1], x[5:12]):
        want = exact[:1] if len(rows) == 1 else exact[5:12] if len(rows) == 7 else exact
        torch.testing.assert_close(127 * multiply(rows / 127).double(), want, rtol=1e-6, atol=1e-3)


def test_a_layer_is_close_to_the_one_it_stands_for_and_keeps_its_bias() -> None:
    layer = torch.nn.Linear(96, 40)
    turn = int8._turn(96)
    assert len(turn) == 32
    weight = (layer.weight.detach().reshape(-1, 32) @ turn).view(40, 96)
    x = torch.randn(11, 96)
    for matrix, w in ((None, layer.weight.detach()), (turn, weight)):
        fast = int8.Int8Linear(*int8.quantize_rows(w), layer.bias.detach(), int8._IntMM, matrix)
        with torch.inference_mode():
            off = (fast(x) - layer(x)).std() / layer(x).std()
        assert 1e-4 < off < 0.03


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_went_wrong_stays_wrong_and_alone(bad: float) -> None:
    layer = int8.Int8Linear(*int8.quantize_rows(torch.randn(16, 32)), None, int8._IntMM)
    x = torch.randn(3, 32)
    good = layer(x)
    x[1, 4] = bad
    out = layer(x)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_whole_model_stays_close(family: str, kernel: int8.Kernel) -> None:
    want = teacher_forced(loaded(family).module, TOKENS)
    got = teacher_forced(in_int8(family, kernel), TOKENS)
    assert (got - want).abs().mean() / want.std() < 0.1  # their large weights make much of little
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.8


def test_tokens_do_not_depend_on_the_batch(family: str) -> None:
    """Sums of whole numbers are exact, so that company changes nothing."""
    model = LoadedModel(
        family, in_int8(family), tiny_tokenizer(), reference(family).config, frozenset(), "int8"
    )
    prompts = [TOKENS[i : i + 5 + 3 * i] for i in range(6)]
    together = answers(EngineConfig(model=model, max_num_batched_tokens=32), prompts)
    assert [answers(EngineConfig(model=model), [prompt])[0] for prompt in prompts] == together


def answers(config: EngineConfig, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(config)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in prompts]
    while engine.has_unfinished:
        engine.step()
    return [engine.outputs[i].token_ids for i in ids]


def test_the_tiny_model_runs_in_int8() -> None:
    engine = Engine(EngineConfig(model="tiny-random", quantization="int8"))
    engine.add_request("the sea", SamplingParams(max_tokens=5, ignore_eos=True), request_id="a")
    while engine.has_unfinished:
        engine.step()
    assert len(engine.outputs["a"].token_ids) == 5
    assert engine.model.quantization == "int8"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    reference("qwen2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_quantised_copy_is_kept_used_and_distrusted(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def logits() -> torch.Tensor:
        lines.clear()
        return teacher_forced(load_model(folder, quantization="int8", say=lines.append).module, TOKENS)

    first = logits()
    assert any("Quantised in" in line for line in lines)
    (copy,) = (tmp_path / "cache" / "int8").iterdir()
    assert torch.equal(logits(), first)
    assert not any("Quantised in" in line for line in lines)

    copy.write_bytes(copy.read_bytes()[:-100])  # damaged
    assert torch.equal(logits(), first)
    assert any("Quantised in" in line for line in lines)

    model = reference("qwen2")  # other weights in the same place
    model.config.save_pretrained(folder)
    tensors = {name: tensor * 1.01 for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=tensors)
    assert not torch.equal(logits(), first)
    assert any("Quantised in" in line for line in lines)


def test_a_disk_that_cannot_be_written_costs_the_copy_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    lines: list[str] = []
    load_model(folder, quantization="int8", say=lines.append)
    assert any("could not be kept" in line for line in lines)


def test_what_cannot_be_quantised_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantization must be None or 'int8'"):
        EngineConfig(quantization="int4")
    with pytest.raises(ModelError, match="quantization must be None or 'int8'"):
        load_model("tiny-random", quantization="fp8")
    with pytest.raises(ValueError, match="quantization must be None for a loaded model"):
        Engine(EngineConfig(model=loaded("llama"), quantization="int8"))
    with pytest.raises(ValueError, match="packed_weights must be left alone for a loaded model"):
        Engine(EngineConfig(model=loaded("llama"), packed_weights=False))


def test_the_kernel_is_chosen_by_measurement() -> None:
    kernel, why = int8.pick_kernel(CPU)
    assert kernel in KERNELS
    assert "us" in why
