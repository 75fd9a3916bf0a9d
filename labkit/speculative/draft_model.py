"""A second, smaller model that drafts, and a measurement of what steps cost: speculation with tensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.model_runner import ModelRunner
from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.kernels.warmup import backend_for, warm_up
from labkit.models.load import LoadedModel, load_model
from labkit.models.progress import Say
from labkit.sampling_params import SamplingParams
from labkit.speculative.drafter import Drafter
from labkit.speculative.ngram import NgramDrafter
from labkit.speculative.speculator import Speculator, StepCosts

_PROBED = 16  # tokens of the longest step that is timed
_TIMES = 3  # timed steps of each length; the fastest counts


class ModelDrafter:
    """Drafts with a model that has the same vocabulary and a KV cache of its own.

    It samples with the noise of the request, so a draft is rejected only where the two models differ. It
    computes a request's tokens when it first drafts for it, and later only those that have come since.

    Args:
        runner: a model runner of the drafting model, with a pool of its own.
        vocab_size: the vocabulary size of the model that checks.
        budget: the number of tokens that a step may compute.
    """

    def __init__(self, runner: ModelRunner, *, vocab_size: int, budget: int) -> None:
        self.runner = runner
        self.pool = runner.pool
        self._vocab_size = vocab_size
        self._budget = budget
        self._twins: dict[str, Request] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        twins = {request.request_id: (self._twin(request), count) for request, count in wanted}
        lengths = {name: len(twin.token_ids) for name, (twin, _) in twins.items()}
        going = {name: twin for name, (twin, count) in twins.items() if self._seat(twin, count)}
        while going:
            plan, budget = StepPlan(), self._budget
            for twin in going.values():
                count = min(len(twin.token_ids) - twin.num_computed_tokens, budget)
                if count:
                    plan.add(twin, count)
                    budget -= count
            result = self.runner.run(plan)
            going = {}
            for row, (twin, tokens) in enumerate(zip(plan.requests, result.sampled, strict=True)):
                twin.num_computed_tokens += plan.num_tokens[row]
                if not tokens or tokens[0] >= self._vocab_size:
                    continue
                twin.token_ids.append(tokens[0])
                name = twin.request_id
                if len(twin.token_ids) < lengths[name] + twins[name][1]:
                    going[name] = twin
        return [tuple(twin.token_ids[lengths[name] :]) for name, (twin, _) in twins.items()]

    def _twin(self, request: Request) -> Request:
        """Return the drafting model's copy of a request, without what it computed of rejected drafts."""
        twin = self._twins.get(request.request_id)
        if twin is None:
            prompt = request.token_ids[: request.num_prompt_tokens]
            params = dataclasses.replace(request.params, logprobs=None)
            twin = self._twins[request.request_id] = Request(
                request.request_id, prompt, params, seed=request.seed, form=request.form
            )
        agree = min(twin.num_computed_tokens, len(request.token_ids) - 1)  # one is left to sample from
        while twin.token_ids[:agree] != request.token_ids[:agree]:
            agree -= 1
        twin.num_computed_tokens = agree
        twin.token_ids = list(request.token_ids)
        return twin

    def _seat(self, twin: Request, count: int) -> bool:
        """Take blocks for the known tokens and all drafts but the last; return False if there are too few."""
        held = len(self.pool.tables.get(twin.request_id, ()))
        need = self.pool.blocks_for(len(twin.token_ids) + count - 1) - held
        if need > self.pool.num_free:
            return False
        if need > 0:
            self.pool.allocate(twin.request_id, need)
        return True

    def forget(self, request_id: str) -> None:
        self._twins.pop(request_id, None)
        if request_id in self.pool.tables:
            self.pool.release(request_id)


def make_speculator(
    config: EngineConfig, model: LoadedModel, runner: ModelRunner, draft: LoadedModel | None, say: Say | None
) -> Speculator | None:
    """Make the speculator that the configuration asks for, or None. `draft` comes from `draft_model`."""
    if config.speculative is None:
        return None
    drafter: Drafter = NgramDrafter()
    costs = [step_times(runner, config.max_num_batched_tokens)] if config.speculative_gate else []
    if draft is not None:
        backend = backend_for(draft.module, config)
        cache, graphs = warm_up(draft.module, backend, config, runner.pool.num_blocks, say=say)
        pool = BlockPool(cache.num_blocks, config.block_size, enable_prefix_caching=False)
        drafting = ModelRunner(draft.module, cache, pool, backend=backend, graphs=graphs)
        drafter = ModelDrafter(
            drafting, vocab_size=model.config.vocab_size, budget=config.max_num_batched_tokens
        )
        if costs:
            costs.append(step_times(drafting, config.max_num_batched_tokens))
    return Speculator(drafter, config.num_speculative_tokens, _together(*costs) if costs else None)


def _together(steps: StepCosts, drafting: StepCosts | None = None) -> StepCosts:
    if drafting is None:
        return steps
    return dataclasses.replace(steps, draft_base=drafting.plain_base, draft_token=drafting.token)


def draft_model(config: EngineConfig, model: LoadedModel, say: Say | None) -> LoadedModel | None:
    """Load the model that drafts; None if the configuration asks for none.

    Raises:
        ValueError: if it cannot be found or run, or has another vocabulary.
    """
    if config.speculative != "draft":
        return None
    draft = config.draft_model
    if draft is None:
        if isinstance(config.model, LoadedModel) or config.quantization:
            raise ValueError("draft_model must be named: the model is loaded already, or in int8 itself")
        draft = load_model(config.model, device=config.device, quantization="int8", say=say)
    elif not isinstance(draft, LoadedModel):
        draft = load_model(draft, dtype=config.dtype, device=config.device, say=say)
    if draft.device.type != model.device.type:
        raise ValueError(f"draft_model is on {draft.device}, and the model is on {model.device}")
    if draft.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ValueError(f"draft_model {draft.name} has another vocabulary than {model.name}")
    return draft


def step_times(runner: ModelRunner, budget: int) -> StepCosts:
    """Measure the cost of steps on this machine, in seconds, with a request that is gone afterwards."""
    pool = runner.pool
    most = min(_PROBED, budget, pool.num_blocks * pool.block_size)
    if most < 3:
        return StepCosts(1.0, 1.0, 1.0)  # no room for drafts
    few = 2 if runner.graphs else 1  # a step of one token may be a graph; one with drafts never is
    name = "warm-up"
    pool.allocate(name, pool.blocks_for(most))
    try:
        many, some = _seconds(runner, name, most), _seconds(runner, name, few)
        one = _seconds(runner, name, 1) if runner.graphs else some
    finally:
        pool.release(name)
    token = max(0.0, (many - some) / (most - few))
    return StepCosts(max(some - few * token, 0.0), token, max(one - token, 0.0))


def _seconds(runner: ModelRunner, name: str, count: int) -> float:
    """Return the fastest of a few steps that compute `count` tokens of a request; all but one are drafts."""
    taken = []
    for _ in range(1 + _TIMES):
        plan = StepPlan()
        plan.add(Request(name, [0], SamplingParams()), 1)
        if count > 1:
            plan.draft(0, (0,) * (count - 1))
        begin = time.perf_counter()
        runner.run(plan)
        if runner.model.device.type == "cuda":
            torch.cuda.synchronize(runner.model.device)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])  # without the first, which warms up
