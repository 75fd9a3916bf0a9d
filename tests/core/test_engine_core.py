"""The core runs by itself: the tokens of `transformers`, ends where they belong, faults that stay there."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from labkit import SamplingParams
from labkit.core.attention import PlainAttention
from labkit.core.block_pool import BlockPool
from labkit.core.engine_core import EngineCore
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.speculative.ngram import NgramDrafter
from labkit.speculative.speculator import Speculator
from labkit.trace.records import TraceMeta
from labkit.trace.trace import Trace
from tests.conftest import VOCAB, greedy, loaded
from tests.core.cores import core_of, request_of
from tests.engines import random_prompt

ROOT = Path(__file__).parents[2]


def finish(core: EngineCore) -> None:
    core.run()
    assert core.pool.num_free == core.pool.num_blocks
    assert not core.scheduler.requests


# -- tokens ---------------------------------------------------------------------------------------


def test_the_example_of_the_module_runs() -> None:
    engine = EngineCore(
        loaded("llama").module, Scheduler(BlockPool(num_blocks=64, block_size=16)), PlainAttention()
    )
    request = Request("mine", [1, 2, 3], SamplingParams(max_tokens=8))
    engine.add(request)
    assert engine.run() is engine.trace
    assert request.output_token_ids == greedy("llama", [1, 2, 3], 8)
    assert engine.trace.meta == TraceMeta(64, 16, 32, 512)
    assert not engine.has_unfinished


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "labkit/core/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(code, {})
    assert len(ast.literal_eval(capsys.readouterr().out)) == 8


@pytest.mark.parametrize("caching", [True, False])
def test_greedy_tokens_equal_transformers(family: str, caching: bool) -> None:
    """Chunks, block boundaries, shared prefixes, and a pool in which some are preempted."""
    rng = random.Random(0)
    common = random_prompt(rng, 20)
    jobs = [(random_prompt(rng, length), rng.randint(1, 24)) for length in (1, 15, 16, 17, 33)]
    jobs += [(common + random_prompt(rng, length), 24) for length in (1, 4)]
    core = core_of(family, blocks=24, budget=7, caching=caching)
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=most)) for i, (prompt, most) in enumerate(jobs)
    ]
    for request in requests:
        core.add(request)
    finish(core)
    for request, job in zip(requests, jobs, strict=True):
        assert request.output_token_ids == greedy(family, *job), request.request_id
    assert any(record.preempted for record in core.trace)
    assert any(admission.shared for record in core.trace for admission in record.admitted) == caching


def test_drafts_are_checked_and_change_nothing_but_the_number_of_steps() -> None:
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    runs = []
    for drafts in (0, 4):
        core = core_of(blocks=100)
        core.speculator = Speculator(NgramDrafter(longest=2, shortest=1), drafts) if drafts else None
        requests = [
            request_of(str(i), [*prompt, i], SamplingParams(max_tokens=40, temperature=0.4 * i), number=i)
            for i in range(3)
        ]
        for request in requests:
            core.add(request)
        finish(core)
        runs.append([request.output_token_ids for request in requests])
    assert runs[0] == runs[1]
    assert runs[0][0] == greedy("llama", [*prompt, 0], 40)
    assert sum(record.total_accepted for record in core.trace) > 0
    assert sum(record.total_drafted for record in core.trace) > 0


def test_it_takes_a_cache_and_a_trace_that_are_there_already() -> None:
    pool = BlockPool(9, 4)
    cache = loaded("llama").module.kv_shape.new_cache(9, 4)
    trace = Trace(TraceMeta(9, 4, 2, 8, model="by hand"))
    core = EngineCore(
        loaded("llama").module,
        Scheduler(pool, max_num_seqs=2, max_num_batched_tokens=8),
        PlainAttention(),
        cache=cache,
        trace=trace,
    )
    request = Request("a", [5, 6], SamplingParams(max_tokens=4))
    core.add(request)
    assert core.run() is trace
    assert core.runner.cache is cache and cache.k[:, 0].any()
    assert [record.step for record in trace] == [0, 1, 2, 3]
    assert request.output_token_ids == greedy("llama", [5, 6], 4)


# -- ends -----------------------------------------------------------------------------------------


class StopsAt:
    """A reader whose text ends with a certain token; that is all the core knows of text."""

    def __init__(self, token: int) -> None:
        self.token, self.text, self.seen = token, "", []

    def push(self, token: int) -> bool:
        self.seen.append(token)
        return token == self.token

    def finish(self) -> bool:
        return False


@pytest.mark.parametrize("drafts", [0, 5])
def test_a_stop_token_a_stop_string_and_the_length_end_a_request_where_they_should(drafts: int) -> None:
    prompt = [5, 6, 7]
    free = greedy("llama", prompt, 30)
    at = next(i for i in range(4, 30) if free[i] not in free[:i])
    core = core_of(blocks=100)
    if drafts:
        core.speculator = Speculator(Knows(free, len(prompt)), drafts)
    most, reader = SamplingParams(max_tokens=30), StopsAt(free[at])
    by_token = Request("token", prompt, most, stop_ids=frozenset([free[at], VOCAB]))
    by_string = Request("string", prompt, most, reader=reader)
    by_length = Request("length", prompt, most, max_len=len(prompt) + at + 1)
    alone = Request("all", prompt, most)
    requests = {r.request_id: r for r in (by_token, by_string, by_length, alone)}
    for request in requests.values():
        core.add(request)
    finish(core)
    ends = {finish.request_id: finish.reason for record in core.trace for finish in record.finished}
    assert ends == {"token": "stop", "string": "stop", "length": "length", "all": "length"}
    for request in (by_token, by_string, by_length):
        assert request.output_token_ids == free[: at + 1]
    assert reader.seen == free[: at + 1]
    assert alone.output_token_ids == free
    # What was sampled past an end is in no record.
    sampled: dict[str, list[int]] = {name: [] for name in requests}
    for record in core.trace:
        for name, tokens in zip(record.requests, record.sampled, strict=True):
            sampled[name] += tokens
    assert sampled == {name: request.output_token_ids for name, request in requests.items()}


class Knows:
    """Drafts what will come."""

    def __init__(self, answer: list[int], start: int) -> None:
        self.answer, self.start = answer, start

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[tuple[int, ...]]:
        done = [len(request.token_ids) - self.start for request, _ in wanted]
        return [tuple(self.answer[at : at + count]) for at, (_, count) in zip(done, wanted, strict=True)]

    def forget(self, request_id: str) -> None:
        return None


# -- aborts and faults ----------------------------------------------------------------------------


def test_an_abort_ends_all_answers_of_a_request_and_no_other() -> None:
    core = core_of(blocks=100)
    hot = SamplingParams(max_tokens=9, temperature=1.0, n=3)
    first, other = request_of("7", [1, 2, 3], hot), request_of("8", [1, 2, 3], hot, number=8)
    namesake = request_of("7.5", [1], SamplingParams(max_tokens=2))  # its id alone looks like a child's
    for request in (first, other, namesake):
        core.add(request)
    family = [other, *other.children]
    core.step()
    assert core.abort("7")
    assert core.abort("8.1")  # one answer alone
    assert not core.abort("nobody")
    finish(core)
    ends = {finish.request_id: finish.reason for record in core.trace for finish in record.finished}
    assert {name for name, reason in ends.items() if reason == "abort"} == {"7", "7.1", "7.2", "8.1"}
    assert [len(request.output_token_ids) for request in family] == [9, 1, 9]
    assert not core.abort("7")
    assert not core.scheduler.set_priority("7", 1)


class Breaks:
    """A model whose nth forward pass fails when it has written all its keys and values."""

    def __init__(self, model: Any, nth: int, error: BaseException) -> None:
        self.model, self.calls, self.nth, self.error = model, 0, nth, error

    def __call__(self, *args: Any) -> torch.Tensor:
        hidden = self.model(*args)
        self.calls += 1
        if self.calls == self.nth:
            raise self.error
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.mark.parametrize("error", [RuntimeError("boom\nmore"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_a_fault_in_the_model_ends_the_requests_in_the_step_and_zeroes_their_blocks(
    error: BaseException,
) -> None:
    core = core_of(seats=2)
    core.runner.model = Breaks(core.runner.model, 3, error)
    jobs = [([i + 1] * 7, 12) for i in range(4)]
    requests = [Request(str(i), prompt, SamplingParams(max_tokens=m)) for i, (prompt, m) in enumerate(jobs)]
    for request in requests:
        core.add(request)
    core.step()
    core.step()
    held = [block for name in ("0", "1") for block in core.pool.tables[name]]
    assert core.runner.cache.k[:, held].any(dim=-1).any(dim=-1).any(dim=-1).all()
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):  # when the step is over
            core.step()
    else:
        core.step()
    assert [(f.request_id, f.reason) for f in core.trace[-1].finished] == [("0", "error"), ("1", "error")]
    assert not core.runner.cache.blocks[:, held].any()
    assert core.pool.num_free == 60 and not core.pool.key_of, "nor are they known to the prefix cache"
    message = {
        RuntimeError: "the step failed: RuntimeError: boom",
        KeyboardInterrupt: "the step failed: KeyboardInterrupt: ",
        torch.OutOfMemoryError: "the step ran out of memory: lower max_num_batched_tokens or num_blocks",
    }[type(error)]
    assert [request.error for request in requests] == [message, message, None, None]
    finish(core)
    for request, job in zip(requests[2:], jobs[2:], strict=True):
        assert request.output_token_ids == greedy("llama", *job)


def test_a_fault_of_one_row_leaves_the_blocks_that_it_shares_to_the_others() -> None:
    core = core_of()
    prompt, most = list(range(9)), SamplingParams(max_tokens=9)
    first, second = Request("a", prompt, most), Request("b", prompt, most)
    core.add(first)
    core.step()
    core.add(second)
    core.step()
    shared = core.pool.tables["b"][:2]
    own = core.pool.tables["b"][2:]
    assert core.pool.tables["a"][:2] == shared
    sample = core.runner.sample

    def unsound(logits: torch.Tensor, requests: Sequence[Request]) -> tuple:
        tokens, logprobs, _ = sample(logits, requests)
        return tokens, logprobs, [request is not second for request in requests]

    core.runner.sample = unsound
    core.step()
    core.runner.sample = sample
    assert second.error == "the model gave NaN or infinity for this request"
    assert second.status == "finished"
    assert not core.runner.cache.blocks[:, own].any()
    assert core.runner.cache.blocks[:, shared].any()
    finish(core)
    assert first.output_token_ids == greedy("llama", prompt, 9)


# -- by itself ------------------------------------------------------------------------------------

BLOCKED = ("transformers", "labkit.models", "labkit.kernels", "labkit.engine", "labkit.schedulers")
BLOCK = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in BLOCKED)
# As long as the transformer's own file reads configurations of `transformers`, imports alone are checked.
OF_TRANSFORMERS = "from transformers" in (ROOT / "labkit/core/model.py").read_text(encoding="utf-8")
ALONE = """
import torch
from labkit.core.attention import PlainAttention
from labkit.core.block_pool import BlockPool
from labkit.core.engine_core import EngineCore
from labkit.core.model import ModelShape, Transformer
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler
from labkit.sampling_params import SamplingParams

shape = ModelShape(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rms_norm_eps=1e-5, qkv_bias=True,
    o_bias=False, mlp_bias=False, qk_norm=True, windows=(None, 5), inv_freq=torch.tensor([1.0, 0.1]),
    rope_scaling=1.0, tie_word_embeddings=False,
)
model = Transformer(shape, dtype=torch.float32, device=torch.device("cpu"))
torch.manual_seed(0)
for weight in model.parameters():
    weight.normal_()


def run(pool, **limits):
    engine = EngineCore(model, Scheduler(pool, **limits), PlainAttention())
    requests = [Request(str(i), range(i + 3), SamplingParams(max_tokens=12)) for i in range(4)]
    for request in requests:
        engine.add(request)
    engine.run()
    assert pool.num_free == pool.num_blocks
    return [request.output_token_ids for request in requests]


alone = run(BlockPool(64, 16), max_num_seqs=1)
assert [len(tokens) for tokens in alone] == [12] * 4 and len({*map(tuple, alone)}) == 4, alone
assert run(BlockPool(9, 3), max_num_seqs=4, max_num_batched_tokens=5) == alone
"""


def test_it_runs_without_transformers_models_kernels_and_engine() -> None:
    code = BLOCK + ("import labkit.core.engine_core" if OF_TRANSFORMERS else ALONE)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
