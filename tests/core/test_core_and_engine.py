"""The core and `labkit.Engine` are told the same, and take the same steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit import Engine, EngineConfig, SamplingParams
from labkit.core.request import Request
from labkit.schedulers import scheduler_class
from labkit.speculative.ngram import NgramDrafter
from labkit.speculative.speculator import Speculator
from tests.conftest import VOCAB, loaded
from tests.core.cores import core_of, request_of

SAMPLING = [
    SamplingParams(max_tokens=9),
    SamplingParams(max_tokens=5, temperature=0.9, seed=3),
    SamplingParams(max_tokens=7, temperature=1.2, top_k=5),
    SamplingParams(max_tokens=6, temperature=0.8, n=3),
    SamplingParams(max_tokens=8, temperature=0.7, top_p=0.9, repetition_penalty=1.2, n=2, seed=1),
    SamplingParams(max_tokens=14, temperature=1.0, logit_bias=dict.fromkeys(range(3), 30)),  # can be guessed
    SamplingParams(max_tokens=14, stop_token_ids=range(0, VOCAB, 9)),
    SamplingParams(max_tokens=14, stop=["a", "e", "ing"]),
    SamplingParams(max_tokens=14, temperature=1.0, stop=["s", "or"], stop_token_ids=[7, 8], n=2),
]
ADD = st.tuples(
    st.just("add"),
    st.lists(st.integers(0, 2), min_size=1, max_size=16),
    st.integers(0, len(SAMPLING) - 1),
    st.integers(-1, 1),
)
MOVES = st.one_of(
    ADD,
    ADD,
    st.tuples(st.just("step"), st.integers(1, 5)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("priority"), st.integers(0, 9), st.integers(-2, 2)),
)


class Both:
    """The core and the engine on the same weights, which are told the same."""

    def __init__(self, kind: str, chunked: bool, drafts: int, family: str, **sizes: Any) -> None:
        self.core = core_of(family, scheduler_class(kind, enable_chunked_prefill=chunked), **sizes)
        self.engine = Engine(
            EngineConfig(
                model=loaded(family),
                scheduler=kind,
                enable_chunked_prefill=chunked,
                block_size=sizes["size"],
                num_blocks=sizes["blocks"],
                max_num_seqs=sizes["seats"],
                max_num_batched_tokens=sizes["budget"],
                kv_policy=sizes["kv_policy"],
                enable_prefix_caching=sizes["caching"],
                speculative="ngram" if drafts else None,
                num_speculative_tokens=drafts or 1,
                speculative_gate=False,
                audit=True,
            )
        )
        if drafts:
            self.core.speculator = Speculator(NgramDrafter(longest=3, shortest=1), drafts)
            self.engine.speculator = Speculator(NgramDrafter(longest=3, shortest=1), drafts)
        self.requests: list[Request] = []
        self.answers: list[Request] = []

    def add(self, prompt: list[int], params: SamplingParams, priority: int) -> None:
        number, most = len(self.requests), self.engine.max_model_len
        prompt = prompt[: most - 1]  # a longer one is for the engine to refuse
        values = dict(number=number, priority=priority, max_model_len=most)
        request = request_of(str(number), prompt, params, **values)
        family = [request, *request.children]
        try:
            self.core.add(request)
        except ValueError as refused:  # by both, for the same reason
            with pytest.raises(ValueError) as other:
                self.engine.add_request(prompt, params, request_id=str(number), priority=priority)
            assert str(other.value) == str(refused)
            family = []
        else:
            self.engine.add_request(prompt, params, request_id=str(number), priority=priority)
        self.requests.append(request)
        self.answers += family

    def play(self, moves: Sequence[tuple]) -> None:
        for what, *how in moves:
            if what == "add":
                self.add(how[0], SAMPLING[how[1]], how[2])
            elif what == "step":
                for _ in range(how[0]):
                    assert self.core.step() == self.engine.step()
            elif what == "abort":
                assert self.core.abort(str(how[0])) == self.engine.abort(str(how[0]))
            else:
                found = self.engine.set_priority(str(how[0]), how[1])
                assert self.core.scheduler.set_priority(str(how[0]), how[1]) == found

    def compare(self) -> None:
        self.core.run()
        self.engine.run()
        assert self.core.pool.num_free == self.core.pool.num_blocks
        assert list(self.core.trace) == list(self.engine.trace)
        for answer in self.answers:
            output = self.engine.outputs[answer.request_id]
            assert answer.output_token_ids == output.token_ids
            assert output.finished
            if answer.reader:
                answer.reader.finish()
                assert answer.reader.text == output.text


@given(
    kind=st.sampled_from(["continuous", "continuous", "static", "naive", "uncached"]),
    chunked=st.booleans(),
    drafts=st.sampled_from([0, 0, 1, 5]),
    family=st.sampled_from(["llama", "mistral"]),
    sizes=st.fixed_dictionaries(
        dict(
            blocks=st.integers(8, 30),
            size=st.integers(1, 5),
            seats=st.integers(1, 5),
            budget=st.integers(5, 40),
            kv_policy=st.sampled_from(["paged", "paged", "reserved"]),
            caching=st.booleans(),
        )
    ),
    moves=st.lists(MOVES, min_size=1, max_size=14),
)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_core_and_the_engine_take_the_same_steps(kind, chunked, drafts, family, sizes, moves) -> None:
    """Where traces are equal every decision is: who ran, which blocks moved, what was sampled, who ended."""
    both = Both(kind, chunked, drafts if kind in ("continuous", "naive") else 0, family, **sizes)
    both.play(moves)
    both.compare()


def busy(rng: random.Random) -> list[tuple]:
    """Moves that keep an engine full: in a small pool, some requests are preempted."""
    moves: list[tuple] = []
    for _ in range(16):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 16))]
        moves.append(("add", prompt, rng.randrange(len(SAMPLING)), rng.randint(-1, 1)))
        moves.append(("step", rng.randint(1, 3)))
        name = rng.randrange(16)
        moves.append(rng.choice([("abort", name), ("priority", name, 1), ("step", 1)]))
    return moves


SEEN = ("admitted", "finished", "taken", "reprioritised", "preempted", "copied", "evicted")


@pytest.mark.parametrize(
    "kind, chunked, drafts, sizes",
    [
        ("continuous", True, 0, {}),
        ("continuous", True, 4, {}),
        ("continuous", True, 0, dict(caching=False, budget=6)),
        ("continuous", True, 4, dict(kv_policy="reserved", blocks=30)),
        ("continuous", False, 2, dict(budget=32)),
        ("static", True, 0, dict(blocks=30)),
        ("naive", True, 3, {}),
        ("uncached", False, 0, dict(budget=32)),
    ],
)
def test_a_busy_core_and_a_busy_engine_take_the_same_steps(
    kind: str, chunked: bool, drafts: int, sizes: dict
) -> None:
    usual = dict(blocks=14, size=3, seats=5, budget=16, kv_policy="paged", caching=True)
    both = Both(kind, chunked, drafts, "llama", **usual | sizes)
    both.play(busy(random.Random(7)))
    both.compare()
    seen = {name for record in both.core.trace for name in SEEN if getattr(record, name)}
    assert seen >= {"admitted", "finished", "taken", "reprioritised"}
    ends = {finish.reason for record in both.core.trace for finish in record.finished}
    assert ends == {"stop", "length", "abort"}
    if kind == "continuous":
        assert ("preempted" in seen) == ("copied" in seen) == ("kv_policy" not in sizes)
        assert ("evicted" in seen) == ("caching" not in sizes)
    assert (sum(record.total_accepted for record in both.core.trace) > 0) == (drafts > 0)
