"""The sampler: it turns logits into tokens, as each request asks, independent of the batch.

Sampling adds Gumbel noise to the logits and takes the largest: that draws from their softmax (Gumbel 1954;
Maddison et al. 2014). The noise comes from no generator: it is a hash of (seed, position, token id). So a
request draws the same tokens alone, in any batch, in any chunking and after any preemption, and filters that
drop tokens never shift the noise of those that stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.core.request import Request
from labkit.outputs import TokenLogprobs

_CANDIDATES = 1024  # the likeliest tokens, which are looked at first when top-p or min-p filter alone
_MASK64 = 2**64 - 1


def mix(seed: int, number: int) -> int:
    """Return a 64-bit hash of two integers (SplitMix64's finaliser; Steele et al. 2014)."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def gumbel_noise(keys: Sequence[int], token_ids: Tensor) -> Tensor:
    """Return Gumbel noise, fp32 (rows, n), from a key for each row and token ids, int64 (rows, n) or (n,)."""
    halves = torch.tensor([[key - 2**63] for key in keys], device=token_ids.device).view(torch.int32)
    h = _mix32((_mix32(token_ids.int()) ^ halves[:, :1]) * (halves[:, 1:] | 1))
    # Uniform in (0, 1), without its ends, and finest near 0: there the noise is largest, which decides.
    uniform = (h & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31 - 2.0**-55)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix32(h: Tensor) -> Tensor:
    """Apply MurmurHash3's 32-bit finaliser to int32 tensors, whose products wrap around, as it wants."""
    h = (h ^ (h >> 16 & 0xFFFF)).mul_(0x85EBCA6B - 2**32)  # `&`: PyTorch's shift repeats the sign
    h = (h ^ (h >> 13 & 0x7FFFF)).mul_(0xC2B2AE35 - 2**32)
    return h ^ (h >> 16 & 0xFFFF)


def sample(
    logits: Tensor, requests: Sequence[Request]
) -> tuple[list[int], list[TokenLogprobs | None], list[bool]]:
    """Pick the next token of each request from its row of logits (S, vocab_size).

    Returns token ids; log-probabilities for requests that ask for them; and whether each row is sound, which
    means that it holds no NaN and its largest value is finite.
    """
    raw = logits.float()
    logits = _adjust(raw, requests)
    best, tokens = logits.max(dim=-1)  # greedy, for all
    groups: dict[str, list[int]] = {}  # the rows that are drawn instead, by the work that their filters need
    for i, request in enumerate(requests):
        p = request.params
        if p.temperature > 0:
            kind = "top_k" if p.top_k else "nucleus" if p.top_p < 1 or p.min_p > 0 else "all"
            groups.setdefault(kind, []).append(i)
    for kind, rows in groups.items():
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], [requests[i] for i in rows], kind)
    chosen, sound = torch.stack((tokens, best.isfinite())).tolist()  # here a greedy step waits for a GPU
    logprobs: list[TokenLogprobs | None] = [None] * len(requests)
    for i, request in enumerate(requests):
        if request.params.logprobs is not None and sound[i]:
            (logprobs[i],) = logprobs_of(raw[i : i + 1], chosen[i : i + 1], request.params.logprobs)
    return chosen, logprobs, [bool(fine) for fine in sound]


def _draw(logits: Tensor, requests: Sequence[Request], kind: str) -> Tensor:
    """Draw from rows (S, vocab_size) with temperature > 0, after their filters; return token ids (S,)."""
    vocab, params = logits.shape[-1], [request.params for request in requests]
    keys = [mix(request.seed, len(request.token_ids)) for request in requests]
    logits = logits / _column([p.temperature for p in params], logits)
    if kind == "all":
        return (logits + gumbel_noise(keys, torch.arange(vocab, device=logits.device))).argmax(dim=-1)
    top_k = [min(p.top_k, vocab) if p.top_k else vocab for p in params]
    top_p = _column([p.top_p for p in params], logits)
    min_p = _column([p.min_p for p in params], logits)
    count = max(top_k) if kind == "top_k" else min(_CANDIDATES, vocab)
    while True:
        values, token_ids = logits.topk(count, dim=-1)  # (S, count), likeliest first
        kept = torch.arange(count, device=logits.device) < _column(top_k, logits)
        over = logits if kind == "nucleus" else values.masked_fill(~kept, -torch.inf)
        probs = (values - over.logsumexp(dim=-1, keepdim=True)).exp()
        before = probs.cumsum(dim=-1) - probs  # the mass of all likelier tokens
        ratio = (values - values[:, :1]).exp()  # to the likeliest
        kept &= (before < top_p) & (ratio >= min_p)
        if kind == "top_k" or count == vocab or not kept[:, -1].any():
            break
        count = vocab  # the filter reaches past the candidates: look at all
    noisy = values + gumbel_noise(keys, token_ids)  # (S, count)
    choice = noisy.masked_fill(~kept, -torch.inf).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, choice)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Add biases, penalties (Keskar et al. 2019 for repetition) and masks, where a request has any."""
    adjusted = logits
    for i, request in enumerate(requests):
        p = request.params
        plain = p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0
        early = request.stop_ids if len(request.token_ids) - request.num_prompt_tokens < p.min_tokens else ()
        if plain and not p.logit_bias and not early and not request.form:
            continue
        adjusted = logits.clone() if adjusted is logits else adjusted
        row = adjusted[i]  # a view: changing it changes `adjusted`
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=row.device)
            row[ids] += _column(list(p.logit_bias.values()), row)[:, 0]
        if p.repetition_penalty != 1:
            ids = torch.tensor(sorted(set(request.token_ids)), device=row.device)
            seen = row[ids]
            row[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and (counts := Counter(request.output_token_ids)):
            ids = torch.tensor(list(counts), device=row.device)
            times = _column(list(counts.values()), row)[:, 0]
            row[ids] -= p.presence_penalty + p.frequency_penalty * times
        if early:  # nothing ends the answer before `min_tokens`
            row[list(early)] = -torch.inf
        if request.form:
            row.masked_fill_(~request.form.allowed_next(request).to(row.device), -torch.inf)
    return adjusted


def logprobs_of(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of a token for each row (S, vocab_size), and of the `count` likeliest."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs[range(len(tokens)), tokens].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))  # (S, count)
    tops = [tuple(zip(*top, strict=True)) for top in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(*entry) for entry in zip(tokens, own, tops, strict=True)]
