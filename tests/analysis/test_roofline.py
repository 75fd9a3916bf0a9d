"""What a step moves and computes, counted by hand, and what devices can do."""

from __future__ import annotations

import collections
import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from labkit.analysis.capacity import (
    GPUS,
    LINKS,
    MODELS,
    Gpu,
    Link,
    ModelSize,
    Roofline,
    StepWork,
    Traffic,
)
from labkit.analysis.device_probe import measure_ceiling
from labkit.analysis.devices import Ceiling
from labkit.analysis.roofline import Shape, Work, keys_read, pairs_seen
from labkit.kernels.int8_kv import kv_shape
from labkit.trace.records import StepRecord
from tests.conftest import loaded

SIZES = dict(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
)
# A decodes its fifth token, B computes the first four tokens of a longer prompt.
STEP = StepRecord(
    0, ("a", "b"), kinds="dc", starts=(3, 0), num_tokens=(1, 4), sampled=((7,), ()), free_blocks=5
)


# -- the work of a step ---------------------------------------------------------------------------


def test_the_work_of_a_step_by_hand() -> None:
    # A decodes at place 3, so it looks at 4 keys; B computes four tokens from the start: 1 + 2 + 3 + 4 pairs.
    step = StepRecord(0, ("a", "b"), "dc", starts=(3, 0), num_tokens=(1, 4), sampled=((7,), ()))
    assert StepWork.of(step) == StepWork(rows=2, tokens=5, sampled=1, keys=8, pairs=14)


def test_an_idle_seat_is_padding_and_reads_nothing() -> None:
    step = StepRecord(
        0, ("a", "b"), "di", starts=(3, 9), num_tokens=(1, 0), sampled=((7,), ()), padding=(0, 1)
    )
    assert StepWork.of(step) == StepWork(rows=1, tokens=2, sampled=1, keys=4, pairs=4)


def test_a_draft_is_a_place_that_samples() -> None:
    step = StepRecord(0, ("a",), "d", starts=(3,), num_tokens=(3,), sampled=((7, 8),), drafted=((7, 9),))
    assert StepWork.of(step) == StepWork(rows=1, tokens=3, sampled=3, keys=6, pairs=4 + 5 + 6)


# -- all sizes of a model -------------------------------------------------------------------------


def test_bytes_and_operations_of_a_step_counted_by_hand() -> None:
    shape = Shape.of_config(LlamaConfig(**SIZES), ((None, 2),), weight_bytes=4, value_bytes=4)
    weights = 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12  # qkv, o, gate and up, down
    assert shape.layer_parameters == weights == 480
    per_layer = 4 * (480 + 2 * 8)  # and two norms
    pages = 32 * (5 + 4 + 4)  # five tokens written; A reads four, B its own four; 2 * 2 heads * 2 * 4 bytes
    embeddings, norm, output = 5 * 8 * 4, 8 * 4, 10 * 8 * 4
    pairs = 4 + (1 + 2 + 3 + 4)  # of a query and a key
    assert shape.work(STEP) == Work(
        2 * (per_layer + pages) + embeddings + norm + output,
        2 * (2 * 480 * 5 + 4 * 4 * 2 * pairs) + 2 * 80,  # one row alone samples
    )
    assert shape.work(STEP) == Work(5312, 10656)


def test_a_step_of_int8_reads_a_byte_for_a_weight_and_a_scale_for_a_channel() -> None:
    shape = Shape.of_config(LlamaConfig(**SIZES), ((None, 2),), weight_bytes=1, value_bytes=4)
    per_layer = 480 + 4 * (16 + 8 + 24 + 8) + 4 * 2 * 8
    assert shape.work(STEP).bytes == 2 * (per_layer + 32 * 13) + 5 * (8 + 4) + 8 * 4 + (80 + 40)
    assert shape.work(STEP).operations == 10656


def test_keys_and_values_in_8_bits_are_a_byte_each_and_a_scale_for_a_head() -> None:
    model, plain = loaded("llama"), Shape.of(loaded("llama"))
    less = plain.work(STEP).bytes - Shape.of(model, "int8").work(STEP).bytes
    moved = StepWork.of(STEP).keys + sum(STEP.num_tokens)  # read and written
    exact, small = (kv_shape(model.module, dtype).bytes_per_token for dtype in (None, "int8"))
    assert less == moved * (exact - small)
    assert Shape.of(model, "auto") == plain


def test_padding_is_computed_and_an_idle_seat_goes_through_the_output_layer() -> None:
    shape = Shape.of_config(LlamaConfig(**SIZES), ((None, 2),), weight_bytes=4, value_bytes=4)
    one = StepRecord(0, ("a",), kinds="d", starts=(3,), num_tokens=(1,), sampled=((7,),))
    with_idle = StepRecord(
        0, ("a", "b"), kinds="di", starts=(3, 2), num_tokens=(1, 0), sampled=((7,), ()), padding=(0, 1)
    )
    more = shape.work(with_idle).operations - shape.work(one).operations
    assert more == 2 * 2 * 480 + 2 * 80
    assert shape.work(with_idle).bytes - shape.work(one).bytes == 8 * 4  # its embedding
    assert shape.work(StepRecord(0)) == Work()


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_windows_are_counted_as_one_by_one(window: int | None) -> None:
    for start in range(7):
        for queries in range(1, 7):
            seen = [
                {k for k in range(p + 1) if window is None or k > p - window}
                for p in range(start, start + queries)
            ]
            assert pairs_seen(start, queries, window) == sum(map(len, seen))
            assert keys_read(start, queries, window) == len(set().union(*seen))


def test_parameters_of_a_shape_are_those_of_the_model(family: str) -> None:
    model = loaded(family)
    shape = Shape.of(model)
    assert shape.layers == len(model.module.layers)
    counted = shape.layers * (shape.layer_parameters + shape.vectors) + shape.hidden
    counted += shape.vocab * shape.hidden * (1 if model.config.tie_word_embeddings else 2)
    assert counted == sum(parameter.numel() for parameter in model.module.parameters())


def test_the_least_time_is_the_slower_of_moving_and_computing_step_by_step() -> None:
    ceiling = Ceiling(100.0, {"float32": 1000.0})
    works = [Work(200, 500), Work(10, 4000)]
    assert ceiling.least_seconds(works, "float32") == 2.0 + 4.0
    best = ceiling.best(Ceiling(90.0, {"float32": 1500.0}))
    assert best == Ceiling(100.0, {"float32": 1500.0})


def test_a_ceiling_is_measured_in_the_dtypes_asked_for() -> None:
    sizes = dict(read_bytes=2**20, gemm_size=64, repeats=1)
    ceiling = measure_ceiling(torch.device("cpu"), torch.float32, int8=True, **sizes)
    assert ceiling.bandwidth > 0
    assert set(ceiling.peak) == {"float32", "int8"}
    assert min(ceiling.peak.values()) > 0


# -- from a data sheet ----------------------------------------------------------------------------


def test_the_roofline_by_hand() -> None:
    gpu = Gpu("mine", flops=1000, bandwidth=100, memory=10_000)
    model = ModelSize(parameters=50, layers=2, heads=4, kv_heads=1, head_dim=3, weight_bytes=2)
    clock = Roofline(gpu, model, overhead=0.25)
    assert model.kv_bytes_per_token == 2 * 2 * 1 * 3 * 2 == 24
    decode = StepWork(rows=1, tokens=1, sampled=1, keys=10, pairs=10)
    # 100 bytes of weights, and 24 for each of 10 tokens read and one written, at 100 bytes/s.
    assert clock(decode) == pytest.approx((100 + 24 * 11) / 100 + 0.25)
    assert clock.bound(decode) == "bandwidth"
    # 2 operations for each of 50 parameters and 400 tokens; 4 for each layer, head, number and pair.
    prompt = StepWork(rows=1, tokens=400, sampled=1, keys=400, pairs=80_200)
    assert clock(prompt) == pytest.approx((2 * 50 * 400 + 4 * 2 * 4 * 3 * 80_200) / 1000 + 0.25)
    assert clock.bound(prompt) == "compute"
    # 90% of 10,000 bytes, less 100 of weights, in pages of 8 tokens.
    assert clock.num_blocks(8) == (9000 - 100) // (8 * 24)


def test_a_llama_on_a_t4() -> None:
    llama = MODELS["llama-3.1-8b"]
    assert llama.kv_bytes_per_token == 131_072
    with pytest.raises(ValueError, match=r"the weights take 16\.1 GB, and 90% of a T4 is 14\.4 GB"):
        Roofline(GPUS["T4"], llama).num_blocks()
    half = Roofline(GPUS["T4"], dataclasses.replace(llama, weight_bytes=1))
    assert half.num_blocks() == int((14.4e9 - 8_030_261_248) // (16 * 131_072)) == 3037
    one = StepWork(1, 1, 1, 1, 1)
    assert half(one) == pytest.approx(8.03e9 / 300e9, rel=1e-3)


def test_gpus_are_in_the_order_of_what_they_do() -> None:
    works = [StepWork(8, 8, 8, 4000, 4000), StepWork(1, 2000, 1, 2000, 2_001_000)]
    for work in works:
        seconds = [
            Roofline(GPUS[name], MODELS["smollm2-135m"])(work) for name in ("T4", "L4", "A100", "H100")
        ]
        assert seconds == sorted(seconds, reverse=True)


def test_a_gpu_is_what_the_data_sheet_that_it_names_says() -> None:
    for gpu in GPUS.values():
        found = re.search(
            r"data sheet \d+: ([\d,]+) TFLOPS( with sparsity)?.*, ([\d,.]+) (GB|TB)/s$", gpu.source
        )
        assert found, gpu.source
        peak, sparse, speed, unit = found.groups()
        assert gpu.flops == float(peak.replace(",", "")) * 1e12 / (2 if sparse else 1)
        assert gpu.bandwidth == pytest.approx(float(speed.replace(",", "")) * {"GB": 1e9, "TB": 1e12}[unit])


# -- several GPUs ---------------------------------------------------------------------------------


def test_two_gpus_by_hand() -> None:
    gpu, link = Gpu("mine", flops=1000, bandwidth=100, memory=1000), Link("wire", bandwidth=10)
    model = ModelSize(50, layers=2, heads=4, kv_heads=1, head_dim=3, hidden=12, vocab=7)
    two = Roofline(gpu, model, 0.25, tensor_parallel_size=2, link=link, latency=0.5)
    step = StepWork(rows=1, tokens=3, sampled=1, keys=10, pairs=10)
    # 3 states of 24 bytes, of which a ring of two sends all: twice in each layer, and once for embeddings.
    # Then a state goes to the other one, which sends 4 of the 7 (and a zero) logits.
    sent = model.traffic(step, 2)
    assert sent == Traffic(in_layers=4 * 72, elsewhere=72 + 24 + 8, exchanges=7)
    assert two.sending(step) == pytest.approx((4 * 72 + 104) / 10 + 7 * 0.5)
    # Half of 100 bytes of weights; the only KV head is in both.
    assert two(step) == pytest.approx((50 + 24 * 13) / 100 + two.sending(step) + 0.25)
    assert two.bound(step) == "communication"
    assert two.num_blocks(8, share=1) == (1000 - 50) // (8 * 24)
    assert model.traffic(step, 1) == model.traffic(StepWork(0, 0, 0, 0, 0), 2) == Traffic()


def test_when_two_t4s_over_pcie_lose_to_one() -> None:
    """A small model loses in a prompt by its bytes alone, and at one seat by what an exchange takes."""
    prompt, seat = StepWork(1, 2000, 1, 2000, 2_001_000), StepWork(1, 1, 1, 500, 500)

    def pair(name: str, link: str = "PCIe 3.0 x16", latency: float = 0.0) -> Roofline:
        return Roofline(GPUS["T4"], MODELS[name], tensor_parallel_size=2, link=LINKS[link], latency=latency)

    small, large = pair("smollm2-135m"), pair("llama-3.1-8b")
    assert small.speedup(prompt) < 1 and small.break_even_latency(prompt) < 0
    assert small.speedup(seat) > 1 and 5e-6 < small.break_even_latency(seat) < 10e-6
    assert large.speedup(prompt) > 1.5 and large.speedup(seat) > 1.9
    assert large.break_even_latency(seat) > 300e-6
    assert pair("llama-3.1-8b", "10 GbE").speedup(prompt) < 1 < pair("llama-3.1-8b", "10 GbE").speedup(seat)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(LINKS)),
    st.sampled_from(sorted(MODELS)),
    st.integers(1, 4000),
    st.integers(1, 64),
    st.sampled_from([2, 3, 4]),
)
def test_at_the_latency_of_break_even_it_takes_as_long_as_one(
    link: str, model: str, tokens: int, sampled: int, size: int
) -> None:
    step = StepWork(sampled, tokens + sampled, sampled, 100 * sampled + tokens, 5000)
    many = Roofline(GPUS["L4"], MODELS[model], 0.001, size, LINKS[link])
    latency = many.break_even_latency(step)
    assert (latency > 0) == (many.speedup(step) > 1)
    if latency > 0:
        assert dataclasses.replace(many, latency=latency).speedup(step) == pytest.approx(1)


def test_two_t4s_have_room_for_what_one_has_not() -> None:
    llama = MODELS["llama-3.1-8b"]
    two = Roofline(GPUS["T4"], llama, tensor_parallel_size=2, link=LINKS["PCIe 3.0 x16"])
    assert two.num_blocks() == int((2 * 14.4e9 - 2 * 8_030_261_248) // (16 * 131_072))
    large = dataclasses.replace(llama, parameters=20_000_000_000)
    with pytest.raises(ValueError, match=r"the weights take 40\.0 GB, and 90% of 2 T4s is 28\.8 GB"):
        dataclasses.replace(two, model=large).num_blocks()


def test_a_link_is_what_its_source_says() -> None:
    for link in LINKS.values():
        if found := re.search(r"data sheet.*: (\d+) GB/s, both directions$", link.source):
            assert link.bandwidth == float(found[1]) * 1e9 / 2
        elif found := re.search(r": (\d+) Gb/s, each direction$", link.source):
            assert link.bandwidth == float(found[1]) * 1e9 / 8
        else:
            rate = re.search(r": (\d+) GT/s a lane, 128b/130b$", link.source)
            assert link.bandwidth == pytest.approx(16 * float(rate[1]) * 1e9 / 8 * 128 / 130)
    assert LINKS["PCIe 3.0 x16"].bandwidth == pytest.approx(15.75e9, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Gpu("x", 0, 1, 1), "flops must be at least 1"),
        (lambda: ModelSize(0, 1, 1, 1, 1), "parameters must be at least 1"),
        (lambda: ModelSize(1, 1, 1, 1, 1, weight_bytes=0), "weight_bytes must be between"),
        (lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"], overhead=-1), "overhead must be at least 0"),
        (lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"]).num_blocks(share=2), "share must be between"),
        (lambda: Link("x", 0), "bandwidth must be at least 1"),
        (lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"], tensor_parallel_size=2), "link must say"),
        (
            lambda: Roofline(
                GPUS["T4"], ModelSize(1, 1, 2, 1, 1), tensor_parallel_size=2, link=LINKS["10 GbE"]
            ),
            "model must have its hidden and vocab",
        ),
        (
            lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"], tensor_parallel_size=10),
            "tensor_parallel_size must be between 1 and 9",
        ),
        (
            lambda: Roofline(GPUS["T4"], MODELS["smollm2-135m"]).break_even_latency(StepWork(1, 1, 1, 1, 1)),
            "tensor_parallel_size must be at least 2",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: collections.abc.Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()
