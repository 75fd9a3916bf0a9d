"""One step, one block: owners, places, tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.views.inspect import Inspector, last_owner
from labkit.views.wire import Owner, Queued, RanRow, Table


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def live(model: LoadedModel) -> Iterator[AsyncEngine]:
    config = EngineConfig(model=model, num_blocks=32, block_size=4, max_num_seqs=1)
    with AsyncEngine(Engine(config)) as live:
        yield live


def inspector_of(live: AsyncEngine) -> Inspector:
    def token_ids(request_id: str) -> list[int]:
        output = live.output(request_id)
        return output.prompt_token_ids + output.token_ids

    return Inspector(live.engine.trace, live.engine.model.tokenizer.decode, token_ids)


def finish(live: AsyncEngine, prompt: str | list[int], max_tokens: int = 6) -> str:
    request_id = live.submit(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    for _ in live.stream(request_id):
        pass
    return request_id


def test_a_step_in_full(live: AsyncEngine, model: LoadedModel) -> None:
    live.pause()
    first, second = (
        live.submit([11 + i] * 6, SamplingParams(max_tokens=4, ignore_eos=True)) for i in range(2)
    )
    live.resume()
    for request_id in (first, second):
        for _ in live.stream(request_id):
            pass
    facts = json.loads(json.dumps(inspector_of(live).step(1)))
    text = model.tokenizer.decode([live.output(first).token_ids[1]])
    (row,) = (RanRow(*row) for row in facts["rows"])
    assert row.request == first and row[3:] == ("d", 6, 1, text, 0, 0, [])
    assert [Table(*table) for table in facts["tables"]] == [Table(first, 7, list(range(2)))]
    assert [Queued(*entry).request for entry in facts["queue"]] == [second]
    assert facts["blocked"] == [second, "the only seat is taken"] and facts["free"] == 30
    end = inspector_of(live).step(3)
    assert [(ended.request, ended.reason) for ended in end["ended"]] == [(first, "length")]
    assert end["tables"][0].request == first, "who ends in a step holds pages while it runs"
    with pytest.raises(ValueError, match="step 99 is not in this trace"):
        inspector_of(live).step(99)


def test_a_page_and_its_tokens(live: AsyncEngine, model: LoadedModel) -> None:
    assert inspector_of(live).block(0)["owners"] == []
    request_id = finish(live, [21, 22, 23, 24, 25], max_tokens=6)
    tokens = [21, 22, 23, 24, 25, *live.output(request_id).token_ids]

    def decoded(part: list[int]) -> list[str]:
        return [model.tokenizer.decode([token]) for token in part]

    during = inspector_of(live).block(1, step=1)
    assert during["owners"] == [Owner(request_id, 1, 2)] and during["tokens"] == decoded(tokens[4:6])
    cached = inspector_of(live).block(1)
    assert cached["owners"] == [] and cached["cached"] and cached["last"] == (request_id, 1)
    assert cached["tokens"] == decoded(tokens[4:8])
    free = inspector_of(live).block(2)
    assert not free["cached"] and free["last"] == (request_id, 2) and free["tokens"] is None
    assert inspector_of(live).block(31)["last"] is None
    live._answers.pop(request_id)
    assert inspector_of(live).block(1)["tokens"] is None, "an answer too old to be remembered"


def test_a_shared_page_has_several_owners(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=32, block_size=4))) as live:
        finish(live, [31] * 9)
        live.pause()
        both = [live.submit([31] * 9, SamplingParams(max_tokens=4)) for _ in range(2)]
        live.resume()
        for request_id in both:
            for _ in live.stream(request_id):
                pass
        facts = inspector_of(live).block(0, step=6)
        assert [owner.request for owner in facts["owners"]] == both and len(facts["tokens"]) == 4


@pytest.mark.parametrize("block", [-1, 32, 1.5, "0", None, True])
def test_a_page_that_is_not_there(live: AsyncEngine, block: object) -> None:
    with pytest.raises(ValueError, match="block must be between 0 and 31"):
        inspector_of(live).block(block)  # type: ignore[arg-type]


def test_drafts_of_a_step_and_what_they_left_in_pages(model: LoadedModel) -> None:
    draft = load_model("tiny-random", quantization="int8", say=None)
    common = {"num_blocks": 64, "block_size": 2, "speculative": "draft", "speculative_gate": False}
    decode = model.tokenizer.decode
    config = EngineConfig(model=model, draft_model=draft, num_speculative_tokens=5, **common)
    with AsyncEngine(Engine(config)) as live:
        request_id = finish(live, [21, 22, 23, 24, 25], max_tokens=60)
        ids = [21, 22, 23, 24, 25, *live.output(request_id).token_ids]
        trace = live.engine.trace
        for record in trace:
            facts = json.loads(json.dumps(inspector_of(live).step(record.step)))
            (row,) = record.rows
            (found,) = (RanRow(*found) for found in facts["rows"])
            drafts = [decode([token]) for token in row.drafted]
            assert (found.drafted, found.accepted, found.drafts) == (len(drafts), row.num_accepted, drafts)
            assert facts["returned"] == [[request_id, list(blocks)] for _, blocks in record.returned]
            known = [*ids[: row.start + 1], *row.drafted] if row.drafted else ids
            for number, block in enumerate(trace.state(record.step).tables[request_id]):
                during = inspector_of(live).block(block, step=record.step)
                filled = during["owners"][0].filled
                wanted = known[2 * number : 2 * number + filled]
                assert during["tokens"] == [decode([token]) for token in wanted] and len(wanted) == filled
        assert any(0 < row.num_accepted < len(row.drafted) for record in trace for row in record.rows)
        left = next(record for record in trace if record.returned)
        ((_, blocks),) = left.returned
        place = trace.state(left.step).tables[request_id].index(blocks[0])
        assert last_owner(trace, blocks[0], left.step) == (request_id, place)
