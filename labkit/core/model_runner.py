"""A plan to tensors, through the model, to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from labkit.core.attention import SDPA, Backend, PagedKVCache, Span, build_metadata, row_order
from labkit.core.block_pool import BlockPool
from labkit.core.model import Transformer
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.core.sampler import sample
from labkit.kernels.cuda_graphs import DecodeGraphs
from labkit.outputs import TokenLogprobs
from labkit.speculative.speculator import accept


class ModelRunner:
    """Runs plans on a model, over a paged cache.

    Args:
        model: may be shared by many runners.
        cache: of the model's shape, with a page for each of the pool's.
        pool: whose block tables say where tokens lie.
        backend: how attention is computed.
        graphs: of decode steps, on the same cache; None: every step runs eagerly.

    Attributes:
        accept: called with the drafts of a row and the tokens that the model chose in their places; says how
            many drafts, from the first on, become part of the answer.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedKVCache,
        pool: BlockPool,
        *,
        backend: Backend = SDPA,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.pool = pool
        self.backend = backend
        self.graphs = graphs
        self.accept: Callable[[Sequence[int], Sequence[int]], int] = accept
        self.sample = sample

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every row of a plan in one forward pass, and sample where a row reaches its end."""
        result = StepResult([()] * len(plan.requests))
        if plan.copied:
            self.cache.copy_pages([(copy.old, copy.new) for copy in plan.copied])
        rows = [i for i, num_tokens in enumerate(plan.num_tokens) if num_tokens]
        if not rows:
            return result
        spans = [
            Span(plan.starts[i], plan.num_tokens[i], self.pool.table(plan.requests[i].request_id))
            for i in rows
        ]
        order = row_order(spans)
        rows, spans = [rows[i] for i in order], [spans[i] for i in order]
        hidden, last = self._forward(plan, rows, spans)
        self._sample(plan, result, hidden, dict(zip(rows, last, strict=True)))
        return result

    def _forward(self, plan: StepPlan, rows: list[int], spans: list[Span]) -> tuple[Tensor, list[int]]:
        """Hidden states of the flattened batch, and where in it each row's last token is."""
        token_ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for i, span in zip(rows, spans, strict=True):
            token_ids += plan.requests[i].token_ids[span.start : span.length]
            token_ids += plan.drafts.get(i, ())
            positions += range(span.start, span.length)
            last.append(len(token_ids) - 1)
        padding = sum(plan.padding)
        if self.graphs and not padding and len(token_ids) == len(spans):  # a token for each row
            hidden = self.graphs.run(token_ids, spans)
            if hidden is not None:
                return hidden, last
        layout = build_metadata(
            spans, self.cache, num_padding=padding, windows=self.model.windows, backend=self.backend
        )
        device = self.model.device
        hidden = self.model(
            torch.tensor(token_ids + [0] * padding, device=device),
            torch.tensor(positions + [0] * padding, device=device),
            self.cache,
            layout,
        )
        return hidden, last

    def _sample(self, plan: StepPlan, result: StepResult, hidden: Tensor, last: dict[int, int]) -> None:
        """Sample the rows that have reached the end of what they know; find the rows that went wrong.

        A row with drafts is sampled after the last token that it knows and after each draft.
        """
        rows = list(last) + list(plan.forks)
        places = [last[plan.forks.get(i, i)] for i in rows]
        ends = hidden[torch.tensor(places, device=hidden.device)]
        # A NaN anywhere in a row reaches its last token: later tokens attend to all before them.
        sound = ends.isfinite().all(dim=-1).tolist()
        for i, fine in zip(rows, sound, strict=True):
            if not fine:
                result.errors[i] = "the model gave NaN or infinity for this request"
        picked: list[int] = []
        requests: list[Request] = []  # once for each token that is sampled
        after: list[int] = []
        for i, place, fine in zip(rows, places, sound, strict=True):
            request, drafts = plan.requests[i], plan.drafts.get(i, ())
            known = len(request.token_ids) + len(drafts)
            if not fine or plan.starts[i] + plan.num_tokens[i] != known:
                continue
            picked.append(i)
            after += range(place - len(drafts), place + 1)
            requests.append(request)
            requests += [request.ahead(drafts[:n]) for n in range(1, len(drafts) + 1)]
        if not picked:
            return
        wanted = hidden[torch.tensor(after, device=hidden.device)]
        # The idle seats of a static batch go through the output layer too: that is part of what it costs.
        idle = sum(p == 1 and not n for p, n in zip(plan.padding, plan.num_tokens, strict=False))
        if idle:
            wanted = torch.cat((wanted, hidden[-idle:]))
        logits = self.model.logits(wanted)[: len(requests)]
        chosen = zip(*self.sample(logits, requests), strict=True)
        reported: dict[int, tuple[TokenLogprobs, ...]] = {}
        for i in picked:
            drafts = plan.drafts.get(i, ())
            tokens, logprobs, good = zip(*itertools.islice(chosen, 1 + len(drafts)), strict=True)
            right = self.accept(drafts, tokens[:-1]) if drafts else 0
            if not all(good[: right + 1]):
                result.errors[i] = "the logits of this request are not finite"
                continue
            tokens, stops = (*drafts[:right], tokens[right]), plan.requests[i].stop_ids
            ends_at = next((n for n, token in enumerate(tokens, 1) if token in stops), len(tokens))
            result.sampled[i] = tokens[:ends_at]
            if logprobs[0] is not None:
                reported[i] = logprobs[:ends_at]
        if reported:
            result.logprobs = [reported.get(i, ()) for i in range(len(plan.requests))]
