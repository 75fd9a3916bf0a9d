"""The engine: requests in, one step at a time, tokens out, and a record of every step.

`Engine` is the loop's body; whoever holds it decides when to step.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.model_runner import ModelRunner
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request, answer_ids
from labkit.core.sampler import mix
from labkit.core.scheduler import Scheduler
from labkit.kernels.warmup import activation_bytes, backend_for, warm_up
from labkit.models.detokenizer import IncrementalDetokenizer
from labkit.models.devices import resolve_device, resolve_dtype
from labkit.models.load import LoadedModel, load_model
from labkit.outputs import RequestMetrics, RequestOutput
from labkit.sampling_params import MAX_N, SamplingParams, check_number
from labkit.schedulers.audit import Auditor
from labkit.schedulers.static import SCHEDULERS
from labkit.speculative.draft_model import draft_model, make_speculator
from labkit.trace.records import StepRecord, TraceMeta
from labkit.trace.trace import Trace

Prompt = str | Sequence[int]

_CPU_POOL_BYTES = 384 * 2**20  # of the default pool; a laptop keeps the rest
_GPU_POOL_SHARE = 0.8  # of the memory that weights and a step leave free; graphs take of the rest
_MAX_ID = 128


class Engine:
    """Requests in, tokens out, one step at a time.

    Args:
        config: sizes and switches.
        scheduler: a `Scheduler` class of your own, called as those in `labkit.scheduler` are.
        pool: a `BlockPool` class of your own, called with `(num_blocks, block_size)`. Steps of either are
            audited: a broken rule raises `InvariantError` at the step that broke it.

    Attributes:
        trace: one record per step.
        outputs: what each request has produced so far, by id; entries are updated in place, and stay until
            you take them out.

    Raises:
        ValueError: for a model that cannot be found or run, or sizes that do not fit into memory.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        scheduler: Callable[..., Scheduler] | None = None,
        pool: Callable[..., BlockPool] | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.model = _model_of(config)
        module = self.model.module
        if config.max_model_len and config.max_model_len > module.max_model_len:
            raise ValueError(
                f"max_model_len must be at most {module.max_model_len}, the limit of {self.model.name}, "
                f"not {config.max_model_len}"
            )
        draft = draft_model(config, self.model)
        backend = backend_for(module, config)
        reserve = 0  # bytes, on a GPU, for what a step computes
        if module.device.type == "cuda":
            print(f"Attention on {module.device}: {backend.name} ({backend.reason}).")
            reserve = activation_bytes(module, backend, config)
        num_blocks = config.num_blocks or self._fitting_blocks(reserve, draft)
        cache, graphs = warm_up(module, backend, config, num_blocks, reserve=reserve)
        num_blocks = cache.num_blocks  # fewer, if memory did not suffice
        self.max_model_len = config.max_model_len or min(module.max_model_len, num_blocks * config.block_size)
        self.pool = (pool or BlockPool)(num_blocks, config.block_size)
        self.pool.enable_prefix_caching = config.enable_prefix_caching
        self.scheduler = (scheduler or SCHEDULERS[config.scheduler])(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_policy=config.kv_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        watched = scheduler or pool or config.audit
        self._auditor = Auditor(self.scheduler, self.pool) if watched else None
        self.runner = ModelRunner(module, cache, self.pool, backend=backend, graphs=graphs)
        self.speculator = make_speculator(config, self.model, self.runner, draft)
        self.trace = Trace(self._meta(), max_steps=config.max_trace_steps)
        self.outputs: dict[str, RequestOutput] = {}
        self._streams: dict[str, IncrementalDetokenizer] = {}
        self._step = 0
        self._numbers = itertools.count()
        self._began = time.perf_counter()

    def _fitting_blocks(self, reserve: int, draft: LoadedModel | None) -> int:
        """Pages for all seats at full length, or as many as a fair share of the free memory holds.

        On a GPU, `reserve` bytes are kept free.
        """
        config, module = self.config, self.model.module
        modules = [module, draft.module] if draft else [module]
        page = sum(each.kv_shape.bytes_per_token for each in modules) * config.block_size
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
            budget = _GPU_POOL_SHARE * (torch.cuda.mem_get_info(module.device)[0] - reserve)
        else:
            budget = min(_CPU_POOL_BYTES, psutil.virtual_memory().available / 2)
        longest = min(config.max_model_len or module.max_model_len, module.max_model_len)
        wanted = config.max_num_seqs * -(-longest // config.block_size)
        blocks = min(wanted, int(budget // page))
        if blocks < 1:
            raise ValueError(f"too little memory: one page of the KV cache takes {page / 2**20:.1f} MiB")
        return blocks

    def _meta(self) -> TraceMeta:
        config, model = self.config, self.model
        return TraceMeta(
            num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            scheduler=config.scheduler,
            kv_policy=config.kv_policy,
            model=model.name,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            started=time.time(),
        )

    # -- requests ---------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a prompt (text or token ids); returns the request's id. It can run from the next step on.

        With `params.n` > 1 the answers after the first are requests of their own: "7", "7.1", "7.2", ...

        Raises:
            ValueError: for a request that cannot be served; names the field and the limit.
        """
        return self.enqueue(self.make_request(prompt, params, request_id=request_id, priority=priority))

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Check and tokenise a prompt without queueing it. Safe to call from any thread; raises as above."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        check_number("priority", priority, -(2**31), 2**31, whole=True)
        token_ids = self._tokenise(prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids)
        self._check_tokens("logit_bias", list(params.logit_bias or ()))
        number = next(self._numbers)
        if request_id is None:
            while str(number) in self.outputs:
                number = next(self._numbers)
            request_id = str(number)
        elif not isinstance(request_id, str) or not 0 < len(request_id) <= _MAX_ID:
            raise ValueError(f"request_id must be a string of 1 to {_MAX_ID} characters")
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.model.eos_token_ids
        seed = mix(self.config.seed, number) if params.seed is None else params.seed
        names = answer_ids(request_id, params.n)
        for name in names:
            if name in self.outputs:
                raise ValueError(f"request_id {name!r} is already in use")
        first, *others = (
            Request(
                name,
                token_ids,
                params,
                priority=priority,
                seed=mix(seed, i),
                max_len=min(len(token_ids) + params.max_tokens, self.max_model_len),
                stop_ids=stop_ids,
            )
            for i, name in enumerate(names)
        )
        first.children = others
        self.scheduler.check(first)
        return first

    def _tokenise(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            try:
                token_ids = list(self.model.tokenizer.encode(prompt))
            except TypeError:
                raise ValueError("prompt is not text: it holds half a surrogate pair") from None
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
            token_ids = list(prompt)
            self._check_tokens("prompt", token_ids)
        else:
            raise ValueError(f"prompt must be text or a list of token ids, not {type(prompt).__name__}")
        if not token_ids:
            raise ValueError("prompt is empty: it must have at least one token")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens, but max_model_len is {self.max_model_len} and at least "
                "one token must be left for the answer"
            )
        return token_ids

    def _check_tokens(self, name: str, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            check_number(f"{name}: a token id", token, 0, self.model.config.vocab_size - 1, whole=True)

    def enqueue(self, request: Request) -> str:
        """Queue a request that `make_request` made."""
        family = [request, *request.children]
        for member in family:
            if member.request_id in self.outputs:
                raise ValueError(f"request_id {member.request_id!r} is already in use")
        self.scheduler.add(request)
        now = time.perf_counter()
        for index, member in enumerate(family):
            self.outputs[member.request_id] = RequestOutput(
                member.request_id,
                list(member.token_ids),
                [],
                "",
                None,
                RequestMetrics(now),
                logprobs=None if member.params.logprobs is None else [],
                index=index,
            )
            self._streams[member.request_id] = IncrementalDetokenizer(
                self.model.tokenizer, member.params.stop
            )
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request, with all its answers, at the next step. False if it is not there or is done."""
        names = answer_ids(request_id, MAX_N)
        outputs = [self.outputs.get(name) for name in names]
        own = [
            name for i, (name, out) in enumerate(zip(names, outputs, strict=True)) if out and out.index == i
        ]
        return any([self.scheduler.abort(name) for name in {request_id, *own}])

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change a request's priority (lower runs first). False if it is not there or is done."""
        check_number("priority", priority, -(2**31), 2**31, whole=True)
        return self.scheduler.set_priority(request_id, priority)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do: a request to run, or an abort to carry out and record."""
        return self.scheduler.has_unfinished

    # -- the step ---------------------------------------------------------------------------------

    def step(self) -> StepRecord:
        """Plan, run and record one step. A fault ends the requests it touched, and the others go on."""
        begin = time.perf_counter()
        plan = self.scheduler.schedule()
        if self._auditor:
            self._auditor.check_plan(
                plan, self.config.max_num_batched_tokens, self.config.max_num_seqs, self._streams.keys()
            )
        interrupt: BaseException | None = None
        try:
            result = self.runner.run(plan)
        except BaseException as error:
            result = _failed(plan, error)
            interrupt = None if isinstance(error, Exception) else error
        self._read(plan, result)
        self.scheduler.commit(plan, result)
        if self.speculator:
            self._draft(plan, result)
        end = time.perf_counter()
        record = self.scheduler.record(self._step, plan, result, time=end - self._began, seconds=end - begin)
        self._step += 1
        self.trace.append(record)
        self._deliver(plan, result, record, begin, end)
        if self._auditor:
            self._auditor.check_record(record)
        if interrupt is not None:
            raise interrupt
        return record

    def run(self) -> Trace:
        """Step until nothing is left to do; returns the trace."""
        while self.has_unfinished:
            self.step()
        return self.trace

    def _draft(self, plan: StepPlan, result: StepResult) -> None:
        """Drafts for the next step. Without, answers are the same: a fault here ends nobody."""
        for request_id, _ in plan.preempted:
            self.speculator.forget(request_id)
        self.speculator.learn(plan, result)
        try:
            self.scheduler.held_back = self.speculator.propose(self.scheduler.running)
        except Exception as error:
            self.scheduler.held_back = f"nobody drafts: {_short(error)}"

    def preview(self) -> StepRecord:
        """What the next step would do, as a record in which nothing has been sampled yet.

        Planned by the scheduler itself, on a copy of it and of the pool: nothing moves. Its `free_blocks`
        and `waiting` are as after the plan. Call it where `step` may be called; raises what planning raises.
        """
        shared = {id(request.params): request.params for request in self.scheduler.requests.values()}
        scheduler = copy.deepcopy(self.scheduler, shared)  # and its pool, to which it holds
        plan = scheduler.schedule()
        return scheduler.record(self._step, plan, StepResult([()] * len(plan.requests)))

    def _read(self, plan: StepPlan, result: StepResult) -> None:
        """New tokens to text; where a stop string is complete, what was sampled after it is dropped."""
        for row, tokens in enumerate(result.sampled):
            for i, token in enumerate(tokens):
                request_id = plan.requests[row].request_id
                if self._streams[request_id].push(token):
                    result.sampled[row] = tokens[: i + 1]
                    result.stopped.add(row)
                    break

    def _deliver(
        self, plan: StepPlan, result: StepResult, record: StepRecord, begin: float, end: float
    ) -> None:
        """Update the outputs. `finish_reason` comes last, so that other threads can trust it."""
        for admission in record.admitted:
            metrics = self._metrics(admission.request_id)
            if metrics and metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = begin
                metrics.num_cached_tokens = admission.num_cached_tokens
        for request_id, _ in record.preempted:
            if metrics := self._metrics(request_id):
                metrics.num_preemptions += 1
        for row, (request, tokens) in enumerate(zip(plan.requests, result.sampled, strict=True)):
            output = self.outputs.get(request.request_id)
            if output is None:  # taken out by its owner, who does not wait for the end
                continue
            output.error = request.error
            if tokens:
                output.token_ids.extend(tokens)
                output.metrics.token_times.extend([end] * len(tokens))
                if output.logprobs is not None:
                    output.logprobs.extend(result.logprobs[row][: len(tokens)])
                output.text = self._streams[request.request_id].text
        stopped = {plan.requests[row].request_id for row in result.stopped}
        for finish in record.finished:
            output, stream = self.outputs.get(finish.request_id), self._streams.pop(finish.request_id)
            if self.speculator:
                self.speculator.forget(finish.request_id)
            if output is not None:
                if finish.request_id not in stopped:
                    stream.finish()
                    output.text = stream.text
                output.error = plan.failed.get(finish.request_id, output.error)
                output.metrics.finish_time = end
                output.finish_reason = finish.reason
            if finish.reason == "error":
                self.runner.cache.clear_pages([b for b in finish.blocks if not self.pool.ref_counts[b]])

    def _metrics(self, request_id: str) -> RequestMetrics | None:
        output = self.outputs.get(request_id)
        return output.metrics if output else None


def _model_of(config: EngineConfig) -> LoadedModel:
    """The model that a configuration names, or the loaded one that it holds."""
    model = config.model
    if config.as_t4:
        device = model.device if isinstance(model, LoadedModel) else resolve_device(config.device)
        if device.type != "cuda":
            raise ValueError(f"as_t4 needs a CUDA GPU, and the device is {device}")
        if isinstance(model, LoadedModel) and model.dtype != torch.float16:
            raise ValueError(f"as_t4 computes in float16, and the loaded model is {model.dtype}")
    if not isinstance(model, LoadedModel):
        return load_model(
            model,
            dtype="float16" if config.as_t4 else config.dtype,
            device=config.device,
            quantization=config.quantization,
            fused_projections=config.fused_projections,
            packed_weights=config.packed_weights,
        )
    if config.quantization not in (None, model.quantization):
        raise ValueError(f"quantization must be None for a loaded model: it has {model.quantization}")
    for name in ("fused_projections", "packed_weights"):
        if not getattr(config, name):
            raise ValueError(f"{name} must be left alone for a loaded model: load_model takes it")
    if config.dtype != "auto" and resolve_dtype(config.dtype, model.device) != model.dtype:
        raise ValueError(f"dtype must be auto for a loaded model: it is {model.dtype}, not {config.dtype}")
    if config.device != "auto" and resolve_device(config.device).type != model.device.type:
        raise ValueError(
            f"device must be auto for a loaded model: it is on {model.device}, not {config.device}"
        )
    return model


def _short(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).split("\n")[0][:300]
    return f"{type(error).__name__}: {text}"


def _failed(plan: StepPlan, error: BaseException) -> StepResult:
    """The result of a step whose forward pass broke: every request in it ends, with the reason."""
    what = f"the step failed: {_short(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        what = "the step ran out of memory: lower max_num_batched_tokens or num_blocks"
    rows = range(len(plan.requests))
    return StepResult([()] * len(rows), errors=dict.fromkeys(rows, what))
