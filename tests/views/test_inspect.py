"""One step, one page: owners, places, tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.views.inspect import _last_owner, page_facts, step_facts


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def live(model: LoadedModel) -> Iterator[AsyncEngine]:
    config = EngineConfig(model=model, num_blocks=32, block_size=4, max_num_seqs=1)
    with AsyncEngine(Engine(config)) as live:
        yield live


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
    facts = json.loads(json.dumps(step_facts(live, 1)))
    text = model.tokenizer.decode([live.output(first).token_ids[1]])
    assert [row[0] for row in facts["rows"]] == [first] and facts["rows"][0][3:] == ["d", 6, 1, text]
    assert facts["tables"] == [[first, 7, list(range(2))]]
    assert [entry[0] for entry in facts["queue"]] == [second]
    assert facts["blocked"] == [second, "the only seat is taken"] and facts["free"] == 30
    end = step_facts(live, 3)
    assert [(entry[0], entry[3]) for entry in end["ended"]] == [(first, "length")]
    assert end["tables"][0][0] == first, "who ends in a step holds pages while it runs"
    with pytest.raises(ValueError, match="step 99 is not in this trace"):
        step_facts(live, 99)


def test_a_page_and_its_tokens(live: AsyncEngine, model: LoadedModel) -> None:
    assert page_facts(live, 0)["owners"] == []
    request_id = finish(live, [21, 22, 23, 24, 25], max_tokens=6)
    tokens = [21, 22, 23, 24, 25, *live.output(request_id).token_ids]

    def decoded(part: list[int]) -> list[str]:
        return [model.tokenizer.decode([token]) for token in part]

    during = page_facts(live, 1, step=1)
    assert during["owners"] == [[request_id, 1, 2]] and during["tokens"] == decoded(tokens[4:6])
    cached = page_facts(live, 1)
    assert cached["owners"] == [] and cached["cached"] and cached["last"] == (request_id, 1)
    assert cached["tokens"] == decoded(tokens[4:8])
    free = page_facts(live, 2)
    assert not free["cached"] and free["last"] == (request_id, 2) and free["tokens"] is None
    assert page_facts(live, 31)["last"] is None
    live._answers.pop(request_id)
    assert page_facts(live, 1)["tokens"] is None, "an answer too old to be remembered"


def test_a_shared_page_has_several_owners(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=32, block_size=4))) as live:
        finish(live, [31] * 9)
        live.pause()
        both = [live.submit([31] * 9, SamplingParams(max_tokens=4)) for _ in range(2)]
        live.resume()
        for request_id in both:
            for _ in live.stream(request_id):
                pass
        facts = page_facts(live, 0, step=6)
        assert [owner[0] for owner in facts["owners"]] == both and len(facts["tokens"]) == 4


@pytest.mark.parametrize("block", [-1, 32, 1.5, "0", None, True])
def test_a_page_that_is_not_there(live: AsyncEngine, block: object) -> None:
    with pytest.raises(ValueError, match="block must be between 0 and 31"):
        page_facts(live, block)  # type: ignore[arg-type]


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
            facts = json.loads(json.dumps(step_facts(live, record.step)))
            (row,) = record.rows
            (found,) = facts["rows"]
            drafts = [decode([token]) for token in row.drafted]
            assert found[7:] == ([len(drafts), row.num_accepted, drafts] if drafts else [])
            assert facts.get("returned", []) == [[request_id, list(blocks)] for _, blocks in record.returned]
            known = [*ids[: row.start + 1], *row.drafted] if row.drafted else ids
            for number, block in enumerate(trace.state(record.step).tables[request_id]):
                during = page_facts(live, block, step=record.step)
                filled = during["owners"][0][2]
                wanted = known[2 * number : 2 * number + filled]
                assert during["tokens"] == [decode([token]) for token in wanted] and len(wanted) == filled
        assert any(0 < row.num_accepted < len(row.drafted) for record in trace for row in record.rows)
        left = next(record for record in trace if record.returned)
        ((_, blocks),) = left.returned
        place = trace.state(left.step).tables[request_id].index(blocks[0])
        assert _last_owner(trace, blocks[0], left.step) == (request_id, place)
