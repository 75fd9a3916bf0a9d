"""The blocking front: prompts in, answers out, in order; an interrupt leaves it usable."""

from __future__ import annotations

import pytest

from labkit import LLM, SamplingParams
from labkit.trace.trace import Trace
from tests.conftest import greedy, loaded


def test_generate_takes_one_prompt_or_many(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    params = SamplingParams(max_tokens=5)
    assert [o.token_ids for o in llm.generate([3, 4], params)] == [greedy("llama", [3, 4], 5)]
    assert "tokens/s" in capsys.readouterr().err
    many = llm.generate([[3, 4], [5]], [params, SamplingParams(max_tokens=2)], progress=False)
    assert [o.token_ids for o in many] == [greedy("llama", [3, 4], 5), greedy("llama", [5], 2)]
    assert capsys.readouterr().err == ""
    assert len(llm.generate([3], SamplingParams(n=3, temperature=1.0), progress=False)) == 3
    assert llm.generate([], progress=False) == []
    assert not llm.engine.outputs
    metrics = many[0].metrics
    assert (
        metrics.arrival_time <= metrics.first_scheduled_time < metrics.token_times[0] <= metrics.finish_time
    )
    assert len(metrics.token_times) == 5


def test_generate_refuses_before_it_runs_anything() -> None:
    llm = LLM(loaded("llama"), num_blocks=60)
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([[1], []])
    with pytest.raises(ValueError, match="params must be one or one per prompt: 1 for 2 prompts"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match="blocksize is not a setting; known are "):
        LLM(loaded("llama"), blocksize=3)
    with pytest.raises(ValueError, match="prompts must be text, token ids, or a list of either, not None"):
        llm.generate(None)
    with pytest.raises(ValueError, match="params must be SamplingParams, not dict"):
        llm.generate([[1]], {})
    assert len(llm.engine.trace) == 0
    assert not llm.engine.outputs


def test_an_interrupt_leaves_the_engine_usable() -> None:
    llm = LLM(loaded("llama"), num_blocks=40, block_size=4, audit=True)
    forward = llm.engine.runner._forward

    def interrupted(*args):
        if len(llm.engine.trace) == 4:
            raise KeyboardInterrupt
        return forward(*args)

    llm.engine.runner._forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], progress=False)
    assert not llm.engine.outputs
    assert llm.engine.pool.num_free == 40
    llm.engine.runner._forward = forward
    (output,) = llm.generate([1, 2], SamplingParams(max_tokens=9), progress=False)
    assert output.token_ids == greedy("llama", [1, 2], 9)
    assert Trace.from_lines(llm.engine.trace.lines()) == llm.engine.trace
