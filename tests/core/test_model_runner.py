"""A plan to tensors to tokens: what is sampled, where, and which drafts are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from labkit.core.attention import PlainAttention
from labkit.core.block_pool import BlockPool
from labkit.core.model_runner import ModelRunner, accept
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.core.sampler import sample
from labkit.sampling_params import SamplingParams
from labkit.trace.records import Copy
from tests.conftest import greedy, loaded

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def runner() -> ModelRunner:
    model, pool = loaded("llama").module, BlockPool(20, 4)
    return ModelRunner(model, model.kv_shape.new_cache(20, 4), pool, backend=PlainAttention())


def seated(runner: ModelRunner, name: str, tokens: list[int], **values: Any) -> Request:
    """A request with blocks for a few tokens more than it has."""
    runner.pool.allocate(name, runner.pool.blocks_for(len(tokens) + 6))
    return Request(name, tokens, SamplingParams(max_tokens=20), **values)


def plan_of(*rows: tuple[Request, int]) -> StepPlan:
    plan = StepPlan()
    for request, num_tokens in rows:
        plan.add(request, num_tokens)
    return plan


def test_a_row_samples_once_it_has_computed_all_that_it_knows(runner: ModelRunner) -> None:
    request = seated(runner, "a", PROMPT)
    assert runner.run(plan_of((request, 3))).sampled == [()]
    request.num_computed_tokens = 3
    assert runner.run(plan_of((request, 2))).sampled == [tuple(greedy("llama", PROMPT, 1))]


def test_results_come_in_the_order_of_the_plan_whatever_the_order_of_the_batch(runner: ModelRunner) -> None:
    prompts = [PROMPT, [3], PROMPT[::-1] * 3, [1, 2]]  # neither sorted by queries nor by length
    plan = plan_of(*((seated(runner, str(i), p), len(p)) for i, p in enumerate(prompts)))
    assert runner.run(plan).sampled == [tuple(greedy("llama", p, 1)) for p in prompts]


def test_a_step_that_computes_nothing_does_not_run_the_model(runner: ModelRunner) -> None:
    runner.model = None
    assert runner.run(StepPlan()).sampled == []
    assert runner.run(plan_of((seated(runner, "a", PROMPT), 0))).sampled == [()]


def test_a_child_samples_where_its_parent_does_with_its_own_seed(runner: ModelRunner) -> None:
    parent, child = seated(runner, "a", PROMPT), Request("b", PROMPT, SamplingParams())
    hot = SamplingParams(temperature=2.0)
    parent.params = child.params = hot
    parent.seed, child.seed = 1, 2
    child.num_computed_tokens = len(PROMPT)
    runner.pool.fork("a", "b")
    plan = plan_of((parent, len(PROMPT)), (child, 0))
    plan.forks[1] = 0
    together = runner.run(plan).sampled
    alone = []
    for seed in (1, 2):
        request = seated(runner, f"alone {seed}", PROMPT, seed=seed)
        request.params = hot
        alone += runner.run(plan_of((request, len(PROMPT)))).sampled
    assert together == alone and together[0] != together[1]


@pytest.mark.parametrize("right", [0, 1, 3])
def test_the_drafts_that_were_right_are_kept_with_the_token_after_them(
    runner: ModelRunner, right: int
) -> None:
    answer = greedy("llama", PROMPT, 5)
    request = seated(runner, "a", PROMPT)
    runner.run(plan_of((request, len(PROMPT))))
    request.append(answer[0])
    request.num_computed_tokens = len(PROMPT)
    drafts = (*answer[1 : 1 + right], *[(token + 1) % 211 for token in answer[1 + right : 4]])
    plan = plan_of((request, 1))
    plan.draft(0, drafts)
    assert runner.run(plan).sampled == [tuple(answer[1 : 2 + right])]


def test_accept_counts_up_to_the_first_that_differs() -> None:
    assert accept((), ()) == 0
    assert accept((1, 2, 3), (1, 2, 3)) == 3
    assert accept((1, 2, 3), (1, 9, 3)) == 1
    assert accept((1, 2), (9, 2)) == 0


def test_blocks_are_copied_before_anybody_writes_to_them(runner: ModelRunner) -> None:
    request = seated(runner, "a", PROMPT)
    runner.run(plan_of((request, len(PROMPT))))
    old = runner.pool.tables["a"][1]
    new = runner.pool.allocate("other", 1)[0]
    runner.pool.tables["a"][1] = new
    request.append(greedy("llama", PROMPT, 1)[0])
    request.num_computed_tokens = len(PROMPT)
    plan = plan_of((request, 1))
    plan.copied.append(Copy("a", old, new))
    assert runner.run(plan).sampled == [tuple(greedy("llama", PROMPT, 2)[1:])]
    cache = runner.cache
    assert torch.equal(cache.k[:, new, 0], cache.k[:, old, 0])
    assert cache.k[:, new, 1].any() and not cache.k[:, old, 1].any()


def test_idle_seats_go_through_the_output_layer_and_are_not_sampled(runner: ModelRunner) -> None:
    seen: list[tuple[int, int]] = []
    logits, model = runner.model.logits, runner.model

    class Watched:
        def __call__(self, *args: Any) -> torch.Tensor:
            return model(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append((len(hidden), -1))
            return logits(hidden)

    def watched(found: torch.Tensor, requests: list[Request]) -> tuple:
        seen[-1] = (seen[-1][0], len(found))
        return sample(found, requests)

    runner.model, runner.sample = Watched(), watched
    plan = plan_of((seated(runner, "a", [4]), 1), (seated(runner, "b", [4]), 0))
    plan.padding, plan.num_idle = [0, 1], 1
    assert runner.run(plan).sampled == [tuple(greedy("llama", [4], 1)), ()]
    assert seen == [(2, 1)]


def test_a_row_whose_states_are_not_finite_fails_alone_with_the_rows_that_fork_from_it(
    runner: ModelRunner,
) -> None:
    first, second = seated(runner, "a", PROMPT), seated(runner, "b", PROMPT[::-1])
    child = Request("c", PROMPT, SamplingParams())
    child.num_computed_tokens = len(PROMPT)
    runner.pool.fork("a", "c")
    first.num_computed_tokens = 1  # of which nothing sound is in the cache
    runner.cache.v[0, runner.pool.tables["a"][0], 0] = torch.nan
    plan = plan_of((second, len(PROMPT)), (first, 4), (child, 0))
    plan.forks[2] = 1
    result = runner.run(plan)
    assert result.errors == dict.fromkeys((1, 2), "the model gave NaN or infinity for this request")
    assert result.sampled == [tuple(greedy("llama", PROMPT[::-1], 1)), (), ()]


def test_logprobs_come_for_those_that_asked(runner: ModelRunner) -> None:
    asks, silent = seated(runner, "a", PROMPT), seated(runner, "b", [3])
    assert runner.run(plan_of((silent, 1))).logprobs == []
    asks.params = SamplingParams(logprobs=2)
    result = runner.run(plan_of((silent, 1), (asks, len(PROMPT))))
    assert result.logprobs[0] == ()
    assert [entry.token for entry in result.logprobs[1]] == list(result.sampled[1])


def test_a_chunk_that_is_not_finite_fails_before_others_can_share_it(runner: ModelRunner) -> None:
    first, second = seated(runner, "a", PROMPT), seated(runner, "b", PROMPT[::-1])
    first.num_computed_tokens = 1
    runner.cache.v[0, runner.pool.tables["a"][0], 0] = torch.nan
    result = runner.run(plan_of((first, 2), (second, 2)))
    assert result.errors == {0: "the model gave NaN or infinity for this request"}


class Waits:
    """Counts how often Python reads a value of a tensor, for which it has to wait for a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(*args, **kwargs)

        return call


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_waits_for_the_device_once(
    runner: ModelRunner, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [seated(runner, str(i), PROMPT[i:]) for i in range(4)]
    for request in requests:
        request.params = SamplingParams(temperature=temperature)
    prompts, waits = plan_of(*((r, len(r.token_ids)) for r in requests)), Waits(monkeypatch)
    for request, tokens in zip(requests, runner.run(prompts).sampled, strict=True):
        request.num_computed_tokens = len(request.token_ids)
        request.token_ids += tokens
    assert waits.count == 1
    runner.run(plan_of(*((r, 1) for r in requests)))
    assert waits.count == 2
    drafts = plan_of(*((r, 1) for r in requests))
    drafts.draft(0, (4, 5))
    runner.run(drafts)
    assert waits.count == 3
