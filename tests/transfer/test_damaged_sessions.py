"""A session's file that is damaged, or of another engine, is refused by name, and the engine goes on."""

from __future__ import annotations

import functools
import json
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from labkit import Engine, SamplingParams
from labkit.models.load import load_model
from labkit.transfer import KVPages, TransferError, load_session, save_session
from labkit.transfer.pages import _checksum
from tests.conftest import greedy
from tests.engines import drain, engine_of, random_prompt

PROMPT = random_prompt(random.Random(1), 22)


@functools.cache
def receiver() -> Engine:
    """One engine for all that is refused: if any of it left something behind, the next would see it."""
    return engine_of()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions") / "talk.kv"


def saved(engine: Engine, file: Path) -> bytes:
    name = engine.add_request(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))
    drain(engine)
    output = engine.outputs.pop(name)
    save_session(engine, output.prompt_token_ids + output.token_ids, file)
    return file.read_bytes()


@functools.cache
def whole(file: Path) -> bytes:
    return saved(engine_of(), file)


def refusal(file: Path, data: bytes) -> str:
    """Why a file with these bytes is refused, or "" if it is not. The engine is as it was, or works."""
    engine = receiver()
    engine.pool.forget(list(engine.pool.cached))
    file.write_bytes(data)
    try:
        tokens = load_session(engine, file)
    except TransferError as error:
        assert not engine.pool.cached and not engine.pool.tables
        return str(error)
    assert tokens == (PROMPT + greedy("llama", PROMPT, 4))[:24]
    name = engine.add_request(PROMPT, SamplingParams(max_tokens=4))
    drain(engine)
    assert engine.outputs.pop(name).token_ids == greedy("llama", PROMPT, 4)
    return ""


def test_a_whole_one_is_taken(file: Path) -> None:
    assert refusal(file, whole(file)) == ""


@settings(max_examples=60)
@given(data=st.data())
def test_it_may_be_cut_anywhere(file: Path, data: st.DataObject) -> None:
    """In the length of the header, in the header, and in each of the tensors."""
    bytes_ = whole(file)
    header = 8 + struct.unpack_from("<Q", bytes_)[0]
    sections = [0, 8, header, header + (len(bytes_) - header) // 2, len(bytes_)]
    section = data.draw(st.integers(0, 3))
    end = data.draw(st.integers(sections[section], sections[section + 1] - 1))
    assert refusal(file, bytes_[:end]).startswith("these ")
    longer = bytes_ + data.draw(st.binary(min_size=1, max_size=9))
    assert refusal(file, longer).startswith("these ")


@settings(max_examples=100)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_byte_may_be_another(file: Path, place: int, value: int) -> None:
    bytes_ = bytearray(whole(file))
    place %= len(bytes_)
    same = bytes_[place] == value
    bytes_[place] = value
    why = refusal(file, bytes(bytes_))
    assert why.startswith("these ") or same or whole(file)[place] == ord(" ")  # the padding of the header


@settings(max_examples=60)
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)))
def test_it_may_be_anything_else(file: Path, data: bytes) -> None:
    assert refusal(file, data).startswith("these are no pages of labkit")
    with_header = struct.pack("<Q", len(data)) + data
    assert refusal(file, with_header).startswith("these are no pages of labkit")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"family": "qwen3"}, "model: these pages are of qwen3, and not of this llama"),
        ({"family": "qwen2"}, "model: these pages are of qwen2, and not of this llama"),
        ({"block_size": 2}, "block_size must be 4, as in this engine, not 2"),
        (
            {"model": load_model("tiny-random", say=None)},
            "layers must be 2|kv_heads must be 2|head_dim must be 8",
        ),
    ],
)
def test_it_may_be_of_another_engine(file: Path, config: dict, why: str) -> None:

    data = saved(engine_of(**config), file)
    assert re.match(why, refusal(file, data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool])
def test_it_may_be_of_another_dtype(file: Path, dtype: torch.dtype) -> None:
    pages = KVPages.from_bytes(whole(file))
    other = KVPages(pages.token_ids, pages.blocks.to(dtype), pages.model)
    assert refusal(file, other.to_bytes()) == f"dtype must be torch.float32, as in this engine, not {dtype}"


def forged(file: Path, facts: dict[str, str], **tensors: torch.Tensor) -> bytes:
    """A file with other contents, whose checksum is right."""
    pages = KVPages.from_bytes(whole(file))
    parts = {"blocks": pages.blocks, "token_ids": torch.tensor(pages.token_ids), **tensors}
    parts = {name: tensor for name, tensor in parts.items() if tensor is not None}
    facts = {"format": "labkit-kv-1", "model": "llama"} | facts
    facts = {name: value for name, value in facts.items() if value is not None}
    return save(parts, metadata=facts | {"sha256": _checksum(parts, facts)})


def test_it_may_be_of_another_version(file: Path) -> None:
    assert refusal(file, forged(file, {})) == ""
    why = refusal(file, forged(file, {"format": "labkit-kv-2"}))
    assert why == "these are no pages of labkit: the format is 'labkit-kv-2'"
    assert refusal(file, forged(file, {"format": None})).endswith("the format is None")
    assert refusal(file, forged(file, {"model": None})) == "these pages are damaged: 'model'"
    assert refusal(file, forged(file, {}, blocks=None)) == "these pages are damaged: 'blocks'"
    assert refusal(file, forged(file, {}, token_ids=None)) == "these pages are damaged: 'token_ids'"


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8]


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 4), max_size=7),
    length=st.lists(st.integers(0, 30), max_size=3),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    fill=st.sampled_from([0, 1, -1, 210, 211]),
)
def test_its_tensors_may_have_any_shape_and_dtype(
    file: Path, sizes: list[int], length: list[int], dtypes: tuple, fill: int
) -> None:
    blocks = torch.zeros(sizes, dtype=dtypes[0])
    tokens = torch.zeros(length, dtype=torch.int64).fill_(fill).to(dtypes[1])
    assert refusal(file, forged(file, {}, blocks=blocks))
    assert refusal(file, forged(file, {}, token_ids=tokens))
    assert refusal(file, forged(file, {}, blocks=blocks, token_ids=tokens))


def test_its_numbers_may_be_wrong(file: Path) -> None:
    pages = KVPages.from_bytes(whole(file))
    for wrong in (float("nan"), float("inf"), 0.0):
        blocks = torch.full_like(pages.blocks, wrong)
        assert refusal(file, forged(file, {}, blocks=blocks)).startswith("model: these pages are of llama")
    tokens = torch.tensor(pages.token_ids)
    for wrong in (-1, 211, 2**62):
        why = refusal(file, forged(file, {}, token_ids=tokens.fill_(wrong)))
        assert why == "token_ids must be below 211, the size of this model's vocabulary"


def test_a_header_may_be_of_any_depth(file: Path) -> None:
    deep = ("[" * 100_000).encode()
    assert refusal(file, struct.pack("<Q", len(deep)) + deep) == "these are no pages of labkit"
    odd = json.dumps({"__metadata__": {"format": ["labkit-kv-1"]}}).encode()
    assert refusal(file, struct.pack("<Q", len(odd)) + odd).startswith("these are no pages of labkit")
