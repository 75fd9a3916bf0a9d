"""Pages go from one engine to another, and change nothing but the time that it takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import LLM, Engine, SamplingParams
from labkit.models.load import load_model
from labkit.transfer import KVPages, TransferError, export_kv, import_kv, load_session, save_session
from tests.conftest import greedy
from tests.engines import drain, engine_of, random_prompt


def answer(engine: Engine, prompt: list[int], max_tokens: int = 8):
    name = engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
    drain(engine)
    return engine.outputs[name]


def pages_of(prompt: list[int], family: str = "llama", **config: object) -> KVPages:
    engine = engine_of(family, **config)
    output = answer(engine, prompt)
    return export_kv(engine, output.prompt_token_ids + output.token_ids)


def test_an_engine_goes_on_where_another_stopped(family: str) -> None:
    prompt = random_prompt(random.Random(1), 21)
    first = engine_of(family)
    output = answer(first, prompt)
    known = prompt + output.token_ids
    pages = KVPages.from_bytes(export_kv(first, known).to_bytes())
    assert pages.token_ids == known[:28]  # of 29, the last is not computed, and pages have 4 tokens
    second = engine_of(family)
    answer(second, random_prompt(random.Random(2), 9))  # it has pages of its own
    assert import_kv(second, pages) == 28
    turn = known + random_prompt(random.Random(3), 5)
    later = answer(second, turn)
    assert later.metrics.num_cached_tokens == 28
    assert later.token_ids == greedy(family, turn, 8)


@settings(max_examples=25)
@given(data=st.data())
def test_tokens_stay_the_same_whatever_is_in_either_pool(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    texts = [random_prompt(rng, 12)]
    texts += [texts[0][: rng.randrange(13)] + random_prompt(rng, rng.randrange(1, 30)) for _ in range(3)]
    sender, receiver = (engine_of(num_blocks=data.draw(st.integers(14, 40))) for _ in range(2))
    for engine in (sender, receiver):
        for text in data.draw(st.lists(st.sampled_from(texts), max_size=3)):
            answer(engine, text, 3)
    for text in data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=4)):
        try:
            pages = export_kv(sender, text)
        except TransferError:
            answer(sender, text, 3)
            continue
        tokens = import_kv(receiver, pages)
        assert tokens % 4 == 0
        output = answer(receiver, text)
        assert output.token_ids == greedy("llama", text, 8)
        assert output.metrics.num_cached_tokens >= min(tokens, (len(text) - 1) // 4 * 4)


def test_a_small_pool_takes_what_it_has_room_for() -> None:
    prompt = random_prompt(random.Random(4), 60)
    pages = pages_of(prompt)
    small = engine_of(num_blocks=8)
    assert import_kv(small, pages) == 32
    name = small.add_request(random_prompt(random.Random(5), 6), SamplingParams(max_tokens=4))
    drain(small)
    assert small.outputs[name].token_ids == greedy("llama", small.outputs[name].prompt_token_ids, 4)


def test_it_arrives_beside_requests_that_run() -> None:
    pages = pages_of(random_prompt(random.Random(6), 20))
    engine = engine_of()
    prompts = [random_prompt(random.Random(n), 10) for n in range(4)]
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=10)) for prompt in prompts]
    engine.step()
    assert import_kv(engine, pages) == 24
    drain(engine)
    for name, prompt in zip(ids, prompts, strict=True):
        assert engine.outputs[name].token_ids == greedy("llama", prompt, 10)


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("llama", {"block_size": 8}, "block_size must be 8, as in this engine, not 4"),
        ("qwen2", {}, "model: these pages are of llama, and not of this qwen2"),
        ("llama", {"enable_prefix_caching": False}, "enable_prefix_caching must be on"),
        ("llama", {"scheduler": "static"}, "the scheduler one that uses it"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(family: str, config: dict, why: str) -> None:
    pages = pages_of(random_prompt(random.Random(7), 20))
    engine = engine_of(family, **config)
    with pytest.raises(TransferError, match=why):
        import_kv(engine, pages)
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.pool.tables


def test_another_dtype_is_refused() -> None:
    pages = pages_of(random_prompt(random.Random(7), 20))
    halves = KVPages(pages.token_ids, pages.blocks.bfloat16(), pages.model)
    with pytest.raises(TransferError, match=r"dtype must be torch.float32, as in this engine, not torch.bf"):
        import_kv(engine_of(), halves)
    strange = KVPages([999] * len(pages.token_ids), pages.blocks, pages.model)
    with pytest.raises(TransferError, match="token_ids must be below 211"):
        import_kv(engine_of(), strange)


def test_pages_in_8_bits_take_their_scales_along(family: str, tmp_path: Path) -> None:
    prompt = random_prompt(random.Random(1), 21)
    first, second, third = (engine_of(family, kv_cache_dtype="int8") for _ in range(3))
    output = answer(first, prompt)
    known = prompt + output.token_ids
    save_session(first, known, tmp_path / "talk.kv")
    assert load_session(second, tmp_path / "talk.kv") == known[:28]
    turn = known + random_prompt(random.Random(3), 5)
    later = answer(second, turn)
    assert later.metrics.num_cached_tokens == 28
    assert later.token_ids == answer(third, turn).token_ids
    other = "llama" if family == "qwen2" else "qwen2"
    with pytest.raises(TransferError, match=f"model: these pages are of {family}, and not of this {other}"):
        load_session(engine_of(other, kv_cache_dtype="int8"), tmp_path / "talk.kv")
    with pytest.raises(TransferError, match="kv_heads must be 2, as in this engine, not 1"):
        narrow = KVPages(known[:28], export_kv(first, known).blocks[:, :, :, :1], family)
        import_kv(second, narrow)


@pytest.mark.parametrize(("ours", "theirs"), [(None, "int8"), ("int8", None), ("int8", "auto")])
def test_a_session_with_another_kv_cache_dtype_is_refused_by_name(
    ours: str | None, theirs: str | None, tmp_path: Path
) -> None:
    prompt, other = random_prompt(random.Random(7), 20), engine_of(kv_cache_dtype=theirs)
    answer(other, prompt)
    save_session(other, prompt, tmp_path / "talk.kv")
    engine = engine_of(kv_cache_dtype=ours)
    has, is_of = ("int8" if dtype == "int8" else "float32" for dtype in (ours, theirs))
    why = f"kv_cache_dtype must be torch.{has}, as in this engine, not torch.{is_of}"
    with pytest.raises(TransferError, match=why):
        load_session(engine, tmp_path / "talk.kv")
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_fewer_bits_travel_too(dtype: str, quantization: str | None) -> None:
    model = load_model("tiny-random", dtype=dtype, quantization=quantization, say=None)
    first, second = (engine_of(model=model) for _ in range(2))
    output = answer(first, [5, 6, 7] * 8)
    known = output.prompt_token_ids + output.token_ids
    assert import_kv(second, export_kv(first, known)) > 24
    plain = answer(engine_of(model=model), known)
    assert answer(second, known).token_ids[0] == plain.token_ids[0]


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_damage_is_found_wherever_it_is(place: int, bit: int) -> None:
    data = bytearray(BUFFER)
    data[place % len(data)] ^= 1 << bit
    try:
        pages = KVPages.from_bytes(bytes(data))
    except TransferError:
        return
    whole = KVPages.from_bytes(BUFFER)  # a bit of the header's padding counts for nothing
    assert pages.token_ids == whole.token_ids
    assert pages.model == whole.model
    assert torch.equal(pages.blocks, whole.blocks)


BUFFER = KVPages([1, 2, 3, 4], torch.arange(64.0).view(2, 1, 2, 2, 4, 2), "a model").to_bytes()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff" * 40, BUFFER[:-1], BUFFER[:30], BUFFER + b"0"], ids=range(6)
)
def test_what_is_no_buffer_of_pages_is_named(data: bytes) -> None:
    with pytest.raises(TransferError, match="these"):
        KVPages.from_bytes(data)


def test_a_conversation_goes_on_tomorrow(tmp_path: Path) -> None:
    today, tomorrow = LLM("tiny-random", audit=True), LLM("tiny-random", audit=True)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (output,) = today.generate("The rabbit took a watch out of its pocket", params, progress=False)
    kept = today.save_session(output, tmp_path / "talk.kv")
    assert kept % 16 == 0 < kept
    assert [file.name for file in tmp_path.iterdir()] == ["talk.kv"]
    assert tomorrow.load_session(tmp_path / "talk.kv") == (output.prompt_token_ids + output.token_ids)[:kept]
    turn = output.prompt_token_ids + output.token_ids + [9, 8, 7]
    (later,) = tomorrow.generate(turn, params, progress=False)
    assert later.metrics.num_cached_tokens == kept
    (plain,) = LLM("tiny-random").generate(turn, params, progress=False)
    assert later.token_ids == plain.token_ids
    with pytest.raises(TransferError, match="no whole page of these 2 tokens"):
        today.save_session(
            today.generate("a", SamplingParams(max_tokens=1), progress=False)[0], tmp_path / "x"
        )
