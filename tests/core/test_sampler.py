"""Sampling draws from the filtered softmax, and nothing else counts: not the batch, not the order."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.core.request import Request
from labkit.core.sampler import gumbel_noise, mix, sample
from labkit.sampling_params import SamplingParams

VOCAB = 50
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2


def request(seed: int = 0, tokens: list[int] | None = None, prompt: int = 1, **params) -> Request:
    made = Request("r", (tokens or [1])[:prompt], SamplingParams(**params), seed=seed)
    made.token_ids += (tokens or [1])[prompt:]
    return made


def filtered(logits: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """The distribution that is meant, said plainly: sort, cut, renormalise."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: top_k or len(order)]
    mass, total, cut = 0.0, float(probs[kept].sum()), []
    for token in kept.tolist():
        if mass / total >= top_p or probs[token] < min_p * probs[order[0]]:
            break
        cut.append(token)
        mass += float(probs[token])
    out = torch.zeros_like(probs)
    out[cut] = probs[cut]
    return out / out.sum()


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.7, top_k=7),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=1.0, min_p=0.05),
        dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
        dict(temperature=1.0, top_k=1),
    ],
)
def test_draws_follow_the_filtered_softmax(params: dict) -> None:
    draws, batch = 20_000, 2_000
    counts: Counter[int] = Counter()
    for start in range(0, draws, batch):
        requests = [request(seed, **params) for seed in range(start, start + batch)]
        counts.update(sample(LOGITS.expand(batch, -1), requests)[0])
    expected = filtered(LOGITS, **params) * draws
    assert all(expected[token] > 0 for token in counts), "a token that was filtered out was drawn"
    # Chi-square, with cells that expect fewer than 5 lumped together; 6 sigma above the mean is the limit.
    cells = [(counts[i], float(e)) for i, e in enumerate(expected) if e >= 5]
    rest = (sum(counts[i] for i, e in enumerate(expected) if e < 5), float(expected[expected < 5].sum()))
    cells += [rest] if rest[1] >= 5 else []
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = max(1, len(cells) - 1)
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def test_the_same_token_alone_and_in_any_batch() -> None:
    kinds = [
        dict(temperature=0.0),
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.2, top_p=0.9),
        dict(temperature=1.0, min_p=0.1),
        dict(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5),
    ]
    requests = [request(seed, [3, seed, 4], prompt=2, **kinds[seed % len(kinds)]) for seed in range(32)]
    logits = torch.randn(32, 3000, generator=torch.Generator().manual_seed(1)) * 3
    together = sample(logits, requests)[0]
    alone = [sample(logits[i : i + 1], requests[i : i + 1])[0][0] for i in range(32)]
    assert together == alone
    assert sample(logits.flip(0), requests[::-1])[0] == together[::-1]


def test_a_filter_does_not_shift_the_noise_of_what_it_keeps() -> None:
    logits = torch.randn(1, 4000, generator=torch.Generator().manual_seed(2))
    same = 0
    for seed in range(200):
        free = sample(logits, [request(seed, temperature=1.0)])[0][0]
        cut = sample(logits, [request(seed, temperature=1.0, top_k=2000)])[0][0]
        rank = int((logits[0] > logits[0, free]).sum())
        assert (cut == free) == (rank < 2000) or rank >= 2000
        same += cut == free
    assert same > 100


def test_top_p_that_reaches_past_the_first_candidates() -> None:
    logits = torch.zeros(1, 5000)  # flat: 90% of the mass is 4,500 tokens
    seen = {sample(logits, [request(seed, temperature=1.0, top_p=0.9)])[0][0] for seed in range(400)}
    assert len(seen) > 350


def test_noise_is_standard_gumbel_and_without_pattern() -> None:
    noise = gumbel_noise([mix(0, i) for i in range(200)], torch.arange(500)).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    for shifted in (noise[1:, :] * noise[:-1, :], noise[:, 1:] * noise[:, :-1]):
        assert abs(float(shifted.mean()) - 0.5772**2) < 0.03


def uniforms(keys: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """The numbers in (0, 1) that noise is made of."""
    return -torch.expm1(-torch.exp(-gumbel_noise(keys, tokens).double()))


# Keys as they come, which are hashes themselves (a seed at consecutive positions, consecutive seeds), and
# such as would give a weak hash away.
KEYS = {
    "positions": [mix(7, i) for i in range(64)],
    "seeds": [mix(i, 9) for i in range(64)],
    "low": list(range(64)),
    "high": [i << 33 for i in range(64)],
    "both": [i << 33 | i for i in range(64)],
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_noise_is_uniform_and_independent_over_keys_and_tokens(keys: list[int]) -> None:
    count = 4096
    u = uniforms(keys, torch.arange(count))
    assert float(u.min()) > 0 and float(u.max()) < 1
    for cells in (u, u[:, ::7], u.flip(1)[:, :512]):  # and for some of the tokens alone
        counts = (cells * 64).long().flatten().bincount(minlength=64)
        wanted = cells.numel() / 64
        assert float(((counts - wanted) ** 2).sum()) / wanted < 63 + 6 * math.sqrt(2 * 63)
    normal = (u - 0.5) * math.sqrt(12)
    limit = 6 / math.sqrt(count)  # six sigma
    rows = normal @ normal.T / count
    assert float((rows - rows.diag().diag()).abs().max()) < limit
    for lag in (1, 2, 16, 1024):  # tokens beside each other, and rows beside each other for them
        assert abs(float((normal[:, lag:] * normal[:, :-lag]).mean())) < limit
        assert abs(float((normal[1:, lag:] * normal[:-1, :-lag]).mean())) < limit
    signs = (u > 0.5).double() * 2 - 1
    assert float((signs @ signs.T / count).fill_diagonal_(0).abs().max()) < limit


def test_the_largest_noise_is_as_large_and_as_fine_as_it_should_be() -> None:
    """The upper tail decides, where 24 bits of a uniform number near 1 would be coarse."""
    most = gumbel_noise([mix(3, i) for i in range(256)], torch.arange(49152)).max(dim=1).values.double()
    # The maximum of n is Gumbel again, shifted by log(n).
    assert abs(float(most.mean()) - 0.5772 - math.log(49152)) < 0.4
    assert abs(float(most.var()) - math.pi**2 / 6) < 0.8
    assert len(set(most.tolist())) > 250
    assert float(most.max()) > 14


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_noise_depends_on_its_own_key_and_token_alone(keys: list[int], count: int, first: int) -> None:
    """To the last bit, wherever they lie in a tensor: a row alone, and the tokens that a filter leaves."""
    tokens = torch.arange(first, first + count)
    noise = gumbel_noise(keys, tokens)
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    some = torch.randperm(count)[: count // 2 + 1]
    for key, row in zip(keys, noise, strict=True):
        assert torch.equal(gumbel_noise([key], tokens)[0], row)
        assert torch.equal(gumbel_noise([key], tokens[some][None])[0], row[some])
        assert gumbel_noise([key], tokens[:1]).item() == pytest.approx(gumbel(key, first), rel=1e-5, abs=1e-5)


def gumbel(key: int, token: int) -> float:
    """The same noise in Python's numbers."""

    def mix32(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    key = (key - 2**63) % 2**64
    h = mix32(((mix32(token) ^ (key & 0xFFFFFFFF)) * (key >> 32 | 1)) & 0xFFFFFFFF) & 0x7FFFFFFF
    return -math.log(-math.log1p(-(h + 0.5) * (2.0**-31 - 2.0**-55)))


def test_seed_and_position_both_count() -> None:
    logits = torch.zeros(1, 1000)
    one = sample(logits, [request(1, temperature=1.0)])[0]
    assert one == sample(logits, [request(1, temperature=1.0)])[0]
    assert one != sample(logits, [request(2, temperature=1.0)])[0]
    assert one != sample(logits, [request(1, [1, 1], prompt=1, temperature=1.0)])[0]


def test_penalties_and_bias_move_the_logits_they_name() -> None:
    logits = torch.zeros(1, 6)
    logits[0] = torch.tensor([4.0, 3.9, 3.8, -1.0, 0.0, 0.0])

    def pick(tokens: list[int], prompt: int, **params) -> int:
        return sample(logits, [request(0, tokens, prompt=prompt, **params)])[0][0]

    assert pick([5], 1) == 0
    assert pick([0], 1, repetition_penalty=1.1) == 1  # the prompt counts
    assert pick([0], 1, presence_penalty=1.0) == 0  # here it does not
    assert pick([5, 0], 1, presence_penalty=0.05) == 0
    assert pick([5, 0], 1, presence_penalty=0.15) == 1
    assert pick([5, 0, 0], 1, frequency_penalty=0.06) == 1
    assert pick([5, 0], 1, frequency_penalty=0.06) == 0
    assert pick([5], 1, logit_bias={3: 10}) == 3
    assert pick([5], 1, logit_bias={0: -100}) == 1
    assert logits[0].tolist() == pytest.approx([4.0, 3.9, 3.8, -1.0, 0.0, 0.0])  # not changed in place


def test_logprobs_are_the_models_own() -> None:
    logits = LOGITS[None]
    asked = request(3, temperature=1.5, top_k=5, logprobs=3, repetition_penalty=2.0)
    (token,), (entry,), _ = sample(logits, [asked])
    true = LOGITS.log_softmax(-1)
    assert entry.token == token
    assert entry.logprob == pytest.approx(float(true[token]))
    values, ids = true.topk(3)
    assert [t for t, _ in entry.top] == ids.tolist()
    assert [p for _, p in entry.top] == pytest.approx(values.tolist())
    assert sample(logits, [request(logprobs=0)])[1][0].top == ()
    assert sample(logits, [request()])[1] == [None]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_reported_and_the_others_are_not_touched(
    bad: float, temperature: float
) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 7] = bad
    requests = [request(i, temperature=temperature) for i in range(3)]
    tokens, _, sound = sample(logits, requests)
    assert sound == [True, False, True]
    assert [tokens[0], tokens[2]] == sample(logits[[0, 2]], [requests[0], requests[2]])[0]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 100),
            "top_k": st.integers(0, 9) | st.just(10**30),
            "top_p": st.floats(1e-6, 1),
            "min_p": st.floats(0, 1),
            "repetition_penalty": st.floats(0.01, 100),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, 4), st.floats(-100, 100), max_size=5),
            "logprobs": st.integers(0, 20),
        },
    ),
    st.lists(st.sampled_from([0.0, -1.5, 3.0, -math.inf, 3e38]), min_size=5, max_size=5),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_parameters_break_the_step_for_others(params: dict, row: list[float]) -> None:
    """The vocabulary has five tokens: fewer than `top_k` and `logprobs` may ask for."""
    usual = [request(1, logprobs=2), request(2, temperature=1.0, top_k=2)]
    logits = torch.tensor([[0.1, 2.0, -1.0, 0.5, 1.9], row, [1.0, 1.1, 0.9, -3.0, 0.2]])
    tokens, logprobs, sound = sample(logits, [usual[0], request(2**64 - 1, [1, 2, 2], **params), usual[1]])
    assert [[part[0], part[2]] for part in (tokens, logprobs, sound)] == list(sample(logits[[0, 2]], usual))
    if sound[1] and "logprobs" in params:
        assert len(logprobs[1].top) == min(params["logprobs"], 5)
