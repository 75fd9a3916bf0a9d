"""Logits to next tokens, for each request as it asked, whatever the batch.

Sampling adds Gumbel noise to the logits and takes the largest: that draws from their softmax (Gumbel 1954;
Maddison et al. 2014). The noise is no generator's: it is a hash of (seed, position, token id). So a request
draws the same tokens alone, in any batch, in any chunking and after any preemption, and filters that drop
tokens never shift the noise of those that stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.core.request import Request
from labkit.outputs import TokenLogprobs

_CANDIDATES = 1024  # likeliest tokens to look at first when top-p or min-p filter alone
_MASK64 = 2**64 - 1


def mix(seed: int, number: int) -> int:
    """A 64-bit hash of two integers (SplitMix64's finaliser; Steele et al. 2014)."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def gumbel_noise(keys: Sequence[int], token_ids: Tensor) -> Tensor:
    """Noise for each (key, token id), in fp32 and without state.

    Args:
        keys: one 64-bit integer per row.
        token_ids: int64, (rows, n) or (n,) for the same tokens in each row.

    Returns:
        (rows, n) standard Gumbel noise.
    """
    low = torch.tensor([key & 0xFFFFFFFF for key in keys], device=token_ids.device)[:, None]
    high = torch.tensor([key >> 32 for key in keys], device=token_ids.device)[:, None]
    h = _mix32(_mix32(token_ids ^ low) ^ high)
    uniform = (h.double() + 0.5) * 2.0**-32  # in (0, 1), ends excluded
    return -torch.log(-torch.log(uniform)).float()


def _mix32(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 tensors that hold 32-bit values."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def sample(
    logits: Tensor, requests: Sequence[Request]
) -> tuple[list[int], list[TokenLogprobs | None], list[bool]]:
    """Pick the next token of each request.

    Args:
        logits: (S, vocab_size), row i for `requests[i]`.
        requests: their `params`, `seed` and `token_ids` decide.

    Returns:
        Token ids; log-probabilities where asked for; and whether each row was sound (no NaN in it, and a
        largest value that is finite).
    """
    logits = logits.float()
    raw = logits
    logits = _adjust(logits, requests)
    best, greedy = logits.max(dim=-1)
    tokens = greedy.clone()
    rows = [i for i, request in enumerate(requests) if request.params.temperature > 0]
    for group, filtered in _groups(rows, requests):
        members = [requests[i] for i in group]
        index = torch.tensor(group, device=logits.device)
        tokens[index] = _draw(logits[index], members, filtered=filtered)
    sound = best.isfinite().tolist()
    chosen = tokens.tolist()
    logprobs = [
        _logprobs(raw[i], chosen[i], request.params.logprobs)
        if request.params.logprobs is not None and sound[i]
        else None
        for i, request in enumerate(requests)
    ]
    return chosen, logprobs, sound


def _groups(rows: list[int], requests: Sequence[Request]) -> list[tuple[list[int], str]]:
    """Rows by the work they need: the whole vocabulary, the k likeliest, or the likeliest up to some mass."""
    groups: dict[str, list[int]] = {}
    for i in rows:
        params = requests[i].params
        filtered = "top_k" if params.top_k else "mass" if params.top_p < 1 or params.min_p > 0 else "all"
        groups.setdefault(filtered, []).append(i)
    return [(group, filtered) for filtered, group in groups.items()]


def _draw(logits: Tensor, requests: Sequence[Request], *, filtered: str) -> Tensor:
    """Sample rows (S, vocab_size) with temperature > 0, after their filters; returns token ids (S,)."""
    vocab = logits.shape[-1]
    params = [request.params for request in requests]
    logits = logits / _column([p.temperature for p in params], logits)
    if filtered == "all":
        token_ids = torch.arange(vocab, device=logits.device)
        return (logits + gumbel_noise(_keys(requests), token_ids)).argmax(dim=-1)
    top_k = [min(p.top_k, vocab) if p.top_k else vocab for p in params]
    top_p = _column([p.top_p for p in params], logits)
    min_p = _column([p.min_p for p in params], logits)
    count = max(top_k) if filtered == "top_k" else min(_CANDIDATES, vocab)
    while True:
        values, token_ids = logits.topk(count, dim=-1)
        kept = torch.arange(count, device=logits.device) < _column(top_k, logits)
        mass = logits if filtered == "mass" else values.masked_fill(~kept, -torch.inf)
        probs = (values - mass.logsumexp(dim=-1, keepdim=True)).exp()
        before = probs.cumsum(dim=-1) - probs  # mass of the likelier ones
        ratio = (values - values[:, :1]).exp()  # to the likeliest
        kept &= (before < top_p) & (ratio >= min_p)
        if filtered == "top_k" or count == vocab or not kept[:, -1].any():
            break
        count = vocab  # the filter reaches past the candidates: look at all
    noisy = values + gumbel_noise(_keys(requests), token_ids)
    choice = noisy.masked_fill(~kept, -torch.inf).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, choice)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keys(requests: Sequence[Request]) -> list[int]:
    return [mix(request.seed, len(request.token_ids)) for request in requests]


def _adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Bias and penalties, for the rows that have any (Keskar et al. 2019 for the repetition penalty)."""
    rows: dict[int, Tensor] = {}
    for i, request in enumerate(requests):
        p = request.params
        plain = p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0
        if plain and not p.logit_bias:
            continue
        row = logits[i].clone()
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(p.logit_bias.values()), dtype=row.dtype, device=row.device)
        if p.repetition_penalty != 1:
            ids = torch.tensor(sorted(set(request.token_ids)), device=row.device)
            seen = row[ids]
            row[ids] = torch.where(seen > 0, seen / p.repetition_penalty, seen * p.repetition_penalty)
        if counts := Counter(request.output_token_ids):
            ids = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= p.presence_penalty + p.frequency_penalty * times
        rows[i] = row
    if rows:
        logits = logits.clone()
        for i, row in rows.items():
            logits[i] = row
    return logits


def _logprobs(row: Tensor, token: int, count: int) -> TokenLogprobs:
    logprobs = row.log_softmax(dim=-1)
    values, ids = logprobs.topk(count)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)
