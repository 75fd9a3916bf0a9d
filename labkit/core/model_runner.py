"""The model runner: it turns a plan into tensors, runs the model on them, and samples tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from labkit.core.attention import AttentionBackend, AttentionMetadata, Span, build_metadata, row_order
from labkit.core.block_pool import BlockPool
from labkit.core.kv_cache import KVShape, PagedKVCache
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.core.sampler import logprobs_of, sample
from labkit.outputs import TokenLogprobs

_UNSOUND = "the model gave NaN or infinity for this request"
_FEW_LOGITS = 64  # positions of a prompt whose logits are in memory at once
Chosen = tuple[int, TokenLogprobs | None, bool]  # a token, its log-probabilities, and whether they are sound
Ends = dict[int, int]  # rows of a plan, each with the place of its last token in the flattened batch


class PagedModel(Protocol):
    """A decoder that keeps its keys and values in a paged cache (see `labkit.core.model.Transformer`)."""

    device: torch.device
    kv_shape: KVShape
    vocab_size: int
    max_model_len: int  # how many positions it was made for
    windows: Sequence[int | None]  # the sliding windows that occur in its layers

    def __call__(
        self, token_ids: Tensor, positions: Tensor, cache: PagedKVCache, metadata: AttentionMetadata
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class DecodeGraphs(Protocol):
    """Recorded steps in which every row computes one token; `run` gives None if none is large enough."""

    def run(self, token_ids: Sequence[int], rows: Sequence[Span]) -> Tensor | None: ...


class ModelRunner:
    """Runs plans on a model, over a paged cache.

    Args:
        model: the model, which many runners may share.
        cache: a cache of the model's shape, with a block for each of the pool's.
        pool: the pool whose block tables say where tokens lie.
        backend: the way to compute attention.
        graphs: recorded decode steps on the same cache; without them, every step runs eagerly.
    """

    def __init__(
        self,
        model: PagedModel,
        cache: PagedKVCache,
        pool: BlockPool,
        *,
        backend: AttentionBackend,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model, self.cache, self.pool = model, cache, pool
        self.backend, self.graphs = backend, graphs
        self.sample = sample  # these two can be replaced, to time them or to try another rule
        self.accept: Callable[[Sequence[int], Sequence[int]], int] = accept

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every row of a plan in one forward pass, and sample where a row reaches its end."""
        result = StepResult([()] * len(plan.requests))
        if plan.copied:  # before the step writes to the copies
            self.cache.copy_blocks([(copy.old, copy.new) for copy in plan.copied])
        rows = [row for row, num_tokens in enumerate(plan.num_tokens) if num_tokens]
        tables = [self.pool.tables[plan.requests[row].request_id] for row in rows]
        spans = [Span(plan.starts[row], plan.num_tokens[row], t) for row, t in zip(rows, tables, strict=True)]
        if rows:
            order = row_order(spans)
            rows, spans = [rows[i] for i in order], [spans[i] for i in order]
            hidden, ends = self._forward(plan, rows, spans)
            if picked := self._pick(plan, ends, hidden, result):
                self._sample(plan, picked, hidden, result)
            for row in [row for row in rows if plan.requests[row].params.prompt_logprobs is not None]:
                self._read_prompt(plan, row, hidden[ends[row] + 1 - plan.num_tokens[row] :], result)
        return result

    def _forward(self, plan: StepPlan, rows: list[int], spans: list[Span]) -> tuple[Tensor, Ends]:
        """Return hidden states (T, hidden_size) of the flattened batch, and where in it each row ends."""
        token_ids: list[int] = []
        positions: list[int] = []
        ends: Ends = {}
        for row, span in zip(rows, spans, strict=True):
            token_ids += plan.requests[row].token_ids[span.start : span.length]
            token_ids += plan.drafts.get(row, ())
            positions += range(span.start, span.length)
            ends[row] = len(token_ids) - 1
        padding = sum(plan.padding)
        if self.graphs and not padding and len(token_ids) == len(spans):  # one token for each row
            hidden = self.graphs.run(token_ids, spans)
            if hidden is not None:
                return hidden, ends
        windows, zeros = self.model.windows, [0] * padding
        metadata = build_metadata(spans, self.cache, self.backend, windows=windows, num_padding=padding)
        inputs = torch.tensor([token_ids + zeros, positions + zeros], device=self.cache.device)  # in one copy
        return self.model(inputs[0], inputs[1], self.cache, metadata), ends

    # Sampling has three stages: which rows, one call for all of them, and what is kept.
    def _pick(self, plan: StepPlan, ends: Ends, hidden: Tensor, result: StepResult) -> Ends:
        """Return the rows that sample."""
        picked, others = Ends(), Ends()
        for row in (*ends, *plan.forks):
            known = len(plan.requests[row].token_ids) + len(plan.drafts.get(row, ()))
            at_end = plan.starts[row] + plan.num_tokens[row] == known
            (picked if at_end else others)[row] = ends[plan.forks.get(row, row)]
        if others:  # no logits will tell whether these are sound, and to ask here is to wait for a GPU
            last = hidden[torch.tensor(list(others.values()), device=hidden.device)]  # (rows, hidden_size)
            # A NaN anywhere in a row reaches its last token: later tokens attend to all before them.
            sound = last.isfinite().all(dim=-1).tolist()
            result.errors |= {row: _UNSOUND for row, fine in zip(others, sound, strict=True) if not fine}
        return picked

    def _sample(self, plan: StepPlan, picked: Ends, hidden: Tensor, result: StepResult) -> None:
        """Sample all of these rows in one call: each after its last known token, and after each draft."""
        places: list[int] = []
        requests: list[Request] = []  # as they stand at each place
        for row, place in picked.items():
            request, drafts = plan.requests[row], plan.drafts.get(row, ())
            places += range(place - len(drafts), place + 1)
            requests.append(request)
            requests += [request.ahead(drafts[:n]) for n in range(1, len(drafts) + 1)]
        places += range(len(hidden) - plan.num_idle, len(hidden))  # idle seats of a static batch
        logits = self.model.logits(hidden[torch.tensor(places, device=hidden.device)])
        chosen = zip(*self.sample(logits[: len(requests)], requests), strict=True)
        for row in picked:
            self._keep(plan, row, chosen, result)

    def _keep(self, plan: StepPlan, row: int, chosen: Iterable[Chosen], result: StepResult) -> None:
        """Keep the accepted drafts, and the token that the model chose after them."""
        drafts = plan.drafts.get(row, ())
        tokens, logprobs, sound = zip(*itertools.islice(chosen, 1 + len(drafts)), strict=True)
        accepted = self.accept(drafts, tokens[:-1]) if drafts else 0
        if not all(sound[: accepted + 1]):
            result.errors[row] = getattr(plan.requests[row].form, "error", "") or _UNSOUND
            return
        result.sampled[row] = (*drafts[:accepted], tokens[accepted])
        if logprobs[0] is not None:
            result.logprobs = result.logprobs or [()] * len(plan.requests)
            result.logprobs[row] = logprobs[: accepted + 1]

    def _read_prompt(self, plan: StepPlan, row: int, hidden: Tensor, result: StepResult) -> None:
        """Compute log-probabilities of a prompt's tokens. `hidden` begins with the row's own states."""
        request, start = plan.requests[row], plan.starts[row] + 1
        end = min(start + plan.num_tokens[row], request.num_prompt_tokens)
        entries = result.prompt_logprobs[row] = []
        known = len(request.prompt_logprobs)  # more than `start` when it comes back after a preemption
        for first in range(max(known, start), end, _FEW_LOGITS):
            tokens = request.token_ids[first : min(first + _FEW_LOGITS, end)]
            logits = self.model.logits(hidden[first - start :][: len(tokens)])
            entries += logprobs_of(logits, tokens, request.params.prompt_logprobs)


def accept(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many drafts, from the first on, are what the model chose in their places."""
    pairs = zip(drafts, chosen, strict=True)
    return next((count for count, (draft, token) in enumerate(pairs) if draft != token), len(drafts))
