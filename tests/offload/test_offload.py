"""Evicted blocks that are kept: the tokens stay the same, and less is computed."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.block_pool import BlockPool
from labkit.models.load import load_model
from labkit.offload.stores import FileStore, HostStore, Store
from labkit.trace.trace import Trace
from labkit.transfer import export_kv, import_kv
from labkit.views import perfetto
from labkit.views.replay_data import frames, lanes_of
from tests.conftest import greedy, loaded
from tests.engines import drain, engine_of, random_prompt

BLOCK = 2 * 2 * 2 * 4 * 8 * 4  # bytes: layers, keys and values, heads, tokens, head_dim, fp32
GIB = 2**30


def offloading(blocks: int = 100, **config: object) -> Engine:
    """An engine with a small pool and room for so many evicted blocks."""
    return engine_of(**{"num_blocks": 16, "kv_offloading_size": blocks * BLOCK / GIB, **config})


def answer(engine: Engine, prompt: list[int], max_tokens: int = 5):
    name = engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
    drain(engine)
    return engine.outputs.pop(name)


def restored(engine: Engine) -> int:
    return sum(len(record.restored) for record in engine.trace)


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    return {} if request.param == "memory" else {"kv_offloading_dir": tmp_path / "new" / "folder"}


def test_a_prompt_gets_its_evicted_pages_back(family: str, place: dict) -> None:
    engine = offloading(family=family, **place)
    prompts = [random_prompt(random.Random(n), 30) for n in range(5)]
    for prompt in prompts:  # together they need three times the pool
        answer(engine, prompt)
    for prompt in prompts:
        before = restored(engine)
        output = answer(engine, prompt)
        assert output.token_ids == greedy(family, prompt, 5)
        assert output.metrics.num_cached_tokens == 28
        assert restored(engine) == before + 7
        *_, last = (record for record in engine.trace if record.admitted)
        assert set(last.restored) <= set(last.admitted[0].shared) & set(last.published)


def test_without_it_nothing_is_kept() -> None:
    engine = engine_of(num_blocks=16)
    assert type(engine.pool) is BlockPool
    for n in (0, 1, 2, 0):
        output = answer(engine, random_prompt(random.Random(n), 40))
    assert output.metrics.num_cached_tokens == 0
    assert not restored(engine)


MODES = [
    {},
    {"scheduler": "naive"},
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
    {"kv_policy": "reserved"},
    {"max_num_batched_tokens": 7},
    {"speculative": "ngram", "speculative_gate": False},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_tokens_stay_the_same_whatever_comes_and_goes(mode: dict, data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    starts = [random_prompt(rng, 24) for _ in range(3)]
    jobs = []
    for start in data.draw(st.lists(st.sampled_from(starts), min_size=3, max_size=9)):
        prompt = start[: rng.randrange(25)] + random_prompt(rng, rng.randrange(1, 9))
        n, most = rng.choice([1, 1, 1, 3]), rng.randrange(1, 14)
        jobs.append((prompt, SamplingParams(max_tokens=most, n=n, temperature=float(n > 1), seed=5)))
    room = data.draw(st.sampled_from([1, 3, 10, 100]))
    engine = offloading(room, num_blocks=data.draw(st.integers(12, 24)), **mode)
    left = list(jobs)
    while left or engine.has_unfinished:
        while left and rng.random() < 0.4:
            engine.add_request(*left.pop(0))
        if rng.random() < 0.3 and engine.has_unfinished:
            engine.preview()
        engine.step()
        assert len(engine.pool.store) <= room
        state = engine.trace.state(engine.trace[-1].step, after=True) if len(engine.trace) else None
        assert state is None or state.cached == engine.pool.key_of.keys()
    plain = engine_of(num_blocks=200, enable_prefix_caching=False)
    for job in jobs:
        plain.add_request(*job)
    drain(plain)
    assert list(engine.outputs) == list(plain.outputs)
    for name, output in engine.outputs.items():
        assert output.token_ids == plain.outputs[name].token_ids
        if not output.index and f"{name}.1" not in plain.outputs:  # greedy, as it is alone
            assert output.token_ids == greedy("llama", output.prompt_token_ids, len(output.token_ids))


@settings(max_examples=25)
@given(data=st.data())
def test_one_after_the_other_no_prompt_finds_less(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    starts = [random_prompt(rng, 24) for _ in range(4)]
    num_blocks, room = data.draw(st.integers(9, 20)), data.draw(st.integers(1, 40))
    plain, kept = engine_of(num_blocks=num_blocks), offloading(room, num_blocks=num_blocks)
    everything = offloading(1000, num_blocks=num_blocks)
    seen: set[tuple[int, ...]] = set()
    for start in data.draw(st.lists(st.sampled_from(starts), min_size=2, max_size=12)):
        prompt = start[: rng.randrange(25)] + random_prompt(rng, rng.randrange(1, 7))
        outputs = [answer(engine, prompt, 3) for engine in (plain, kept, everything)]
        assert {tuple(output.token_ids) for output in outputs} == {tuple(greedy("llama", prompt, 3))}
        least, more, most = (output.metrics.num_cached_tokens for output in outputs)
        ends = [end for end in range(4, len(prompt), 4) if tuple(prompt[:end]) in seen]
        assert least <= more <= most == max(ends, default=0)  # with room enough, all that ever was computed
        known = prompt + outputs[0].token_ids
        seen |= {tuple(known[:end]) for end in range(4, len(known), 4)}


def test_random_samples_stay_the_same_too() -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=3, ignore_eos=True)
    prompts = [random_prompt(random.Random(n), 26) for n in (0, 1, 2, 0, 1)]
    texts = []
    for engine in (engine_of(num_blocks=60), offloading(num_blocks=24)):
        for prompt in prompts:
            engine.add_request(prompt, params)
        drain(engine)
        texts.append([output.token_ids for output in engine.outputs.values()])
    assert texts[0] == texts[1]


def test_the_trace_is_written_and_read_with_it(tmp_path: Path) -> None:
    engine = offloading()
    for n in (0, 1, 2, 0):
        answer(engine, random_prompt(random.Random(n), 40))
    engine.trace.save(tmp_path / "run.jsonl")
    again = Trace.load(tmp_path / "run.jsonl")
    assert [record.restored for record in again] == [record.restored for record in engine.trace]
    assert restored(engine) == 9
    told = [what for frame in frames(again, lanes_of(again), 0, len(again)) for _, what in frame["events"]]
    assert "9 evicted pages brought back, not computed" in told
    facts = [event["args"] for event in perfetto.events(again) if event["name"].startswith("step")]
    assert [fact.get("evicted pages brought back", 0) for fact in facts if "requests" in fact] == [
        len(record.restored) for record in again
    ]


def test_a_session_is_saved_with_what_was_evicted() -> None:
    engine = offloading()
    first = random_prompt(random.Random(1), 33)
    output = answer(engine, first)
    for n in (2, 3):
        answer(engine, random_prompt(random.Random(n), 50))
    known = first + output.token_ids
    pages = export_kv(engine, known)
    assert pages.token_ids == known[:36]
    assert import_kv(engine_of(), pages) == 36
    drain(engine)


def test_a_failed_request_leaves_nothing_behind() -> None:
    engine = offloading()
    prompt = random_prompt(random.Random(1), 40)
    answer(engine, prompt)
    answer(engine, random_prompt(random.Random(2), 60))
    assert len(engine.pool.store)
    name = engine.add_request(prompt, SamplingParams(max_tokens=5))
    usual, engine.runner.sample = engine.runner.sample, lambda *_: 1 / 0
    drain(engine)
    engine.runner.sample = usual
    assert engine.outputs[name].finish_reason == "error"
    assert answer(engine, prompt).token_ids == greedy("llama", prompt, 5)


def test_a_released_engine_keeps_no_memory(place: dict) -> None:
    engine = offloading(**place)
    for n in range(3):
        answer(engine, random_prompt(random.Random(n), 40))
    store = engine.pool.store
    engine.release()
    assert len(store) == 0
    assert store.cache is None


def test_pages_in_8_bits_come_back_with_their_scales(family: str, place: dict) -> None:
    prompts = [random_prompt(random.Random(n), 40) for n in range(4)]
    plain = engine_of(family, kv_cache_dtype="int8", enable_prefix_caching=False)
    engine = offloading(model=loaded(family), kv_cache_dtype="int8", **place)
    for prompt in prompts * 2:
        assert answer(engine, prompt).token_ids == answer(plain, prompt).token_ids
    assert restored(engine) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fewer_bits_go_and_come_as_they_are(dtype: str, tmp_path: Path) -> None:
    cache = load_model("tiny-random", dtype=dtype, say=None).module.kv_shape.new_cache(4, 4)
    cache.blocks.copy_(torch.randn(cache.blocks.shape))
    before = cache.blocks.clone()
    for store in (HostStore(cache, 4), FileStore(cache, 4, tmp_path)):
        for block in range(4):
            store.keep(bytes([block]), block)
        for block in range(4):
            store.fill(3 - block, store.take(bytes([block])))
        assert torch.equal(cache.blocks[:, :4], before[:, :4].flip(1))
        cache.blocks.copy_(before)


# -- stores ----------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
@settings(max_examples=60)
def test_the_least_recently_used_block_makes_room(capacity: int, moves: list[tuple[bool, int]]) -> None:
    cache = loaded("llama").module.kv_shape.new_cache(8, 4)
    cache.blocks[:] = torch.arange(9.0)[None, :, None, None, None, None]
    stores = [Store(capacity), HostStore(cache, capacity), FileStore(cache, capacity, tempfile.gettempdir())]
    model: list[int] = []
    for comes, block in moves:
        if comes:
            model = [*(b for b in model if b != block), block]
            model = model[max(0, len(model) - capacity) :]
        for store in stores:
            name = bytes([block])
            if comes:
                store.keep(name, block)
            elif block in model:
                content = store.take(name)
                if isinstance(store, HostStore):
                    assert (content == block).all()
        if not comes and block in model:
            model.remove(block)
        for store in stores:
            assert [name[0] for name in store._kept] == model
    file = stores[2]._file
    assert os.fstat(file.fileno()).st_size <= capacity * BLOCK


def told_engine(tmp_path: Path, blocks: int = 100) -> tuple[Engine, list[str]]:
    said: list[str] = []
    sizes = dict(block_size=4, num_blocks=16, max_num_seqs=6, max_num_batched_tokens=64, audit=True)
    config = EngineConfig(
        loaded("llama"), kv_offloading_size=blocks * BLOCK / GIB, kv_offloading_dir=tmp_path, **sizes
    )
    return Engine(config, say=said.append), said


def all_right(engine: Engine) -> int:
    """Answer prompts for which the pool has no room together, twice; return how many pages came back."""
    for n in (0, 1, 2, 3, 0, 1, 2, 3):
        prompt = random_prompt(random.Random(n), 40)
        assert answer(engine, prompt).token_ids == greedy("llama", prompt, 5)
    return restored(engine)


class FullDisk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room, self.at = file, room, 0

    def seek(self, place: int) -> None:
        self.at = place
        self.file.seek(place)

    def write(self, data) -> int:
        fits = max(0, min(len(data), self.room - self.at))
        if not fits:
            raise OSError(28, "No space left on device")
        self.at += fits
        return self.file.write(data[:fits])

    def readinto(self, data) -> int:
        return self.file.readinto(data)

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, BLOCK // 2, 7 * BLOCK + 100])
def test_a_full_disk_costs_nobody_an_answer(tmp_path: Path, room: int) -> None:
    engine, said = told_engine(tmp_path)
    engine.pool.store._file = FullDisk(engine.pool.store._file, room)
    all_right(engine)
    assert [line for line in said if "No space left" in line] == said[-1:]
    assert engine.pool.store.capacity == room // BLOCK  # it goes on with the room that there is
    assert len(engine.pool.store) <= room // BLOCK


def test_a_folder_that_cannot_be_written_to_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    engine, said = told_engine(tmp_path / "file")
    assert all_right(engine) == 0
    assert len([line for line in said if str(tmp_path / "file") in line]) == 1


def test_a_damaged_page_is_computed_again(tmp_path: Path) -> None:
    engine, said = told_engine(tmp_path)
    for n in range(4):
        answer(engine, random_prompt(random.Random(n), 40))
    store = engine.pool.store
    store._file.seek(0)
    for _ in range(len(store)):  # a byte of every page
        store._file.write(b"x")
        store._file.seek(BLOCK - 1, os.SEEK_CUR)
    all_right(engine)
    assert len([line for line in said if "damaged" in line]) == 1


def test_the_file_is_seen_by_nobody_and_goes_with_the_engine(tmp_path: Path) -> None:
    engine, _ = told_engine(tmp_path)
    all_right(engine)
    file = engine.pool.store._file
    assert list(tmp_path.iterdir()) == []
    assert len(engine.pool.store)
    del engine
    gc.collect()
    assert file.closed


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"kv_offloading_size": 1e-9}, "kv_offloading_size must be at least 9.5e-07 .GiB."),
        ({"kv_offloading_size": -1}, "kv_offloading_size must be between 0"),
        ({"kv_offloading_size": "1 GB"}, "kv_offloading_size must be a number"),
        ({"kv_offloading_dir": "x"}, "kv_offloading_dir needs kv_offloading_size"),
        ({"kv_offloading_size": 1, "scheduler": "static"}, "scheduler continuous or naive, not 'static'"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "needs enable_prefix_caching"),
        ({"kv_offloading_size": 1, "tensor_parallel_size": 2}, "tensor_parallel_size 1"),
    ],
)
def test_settings_that_cannot_work_are_named(config: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        engine_of(**config)


def test_a_pool_of_your_own_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="needs labkit's own pool"):
        Engine(EngineConfig(loaded("llama"), kv_offloading_size=1), pool=BlockPool)
