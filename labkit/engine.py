"""`Engine`: the core with a model that it loads, the fastest kernels for the device, text, and times.

The loop itself is in `labkit.core.engine_core.EngineCore`. Here are the start, which builds all parts, and
both ends of each request: text to tokens, and tokens to text.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType

import psutil
import torch

from labkit.analysis.step_bound import StepBound
from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.engine_core import EngineCore
from labkit.core.plan import StepPlan, StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.core.sampler import mix
from labkit.core.scheduler import Scheduler
from labkit.kernels.int8_kv import kv_shape
from labkit.kernels.threads import ThreadBudget, usual_threads
from labkit.kernels.warmup import free_bytes, tried_backend, warm_up, warm_up_lock
from labkit.models.cache_dir import keep_compiled
from labkit.models.detokenizer import IncrementalDetokenizer
from labkit.models.generation_config import sampling_defaults
from labkit.models.load import LoadedModel
from labkit.models.no_tokenizer import NoTokenizer
from labkit.models.progress import Say
from labkit.models.prompts import Prompt, check_tokens, read_prompt
from labkit.offload import close_pool, make_pool, plain_parts
from labkit.outputs import RequestMetrics, RequestOutput
from labkit.parallel.group import ParallelError
from labkit.parallel.load import model_of
from labkit.parallel.model import ParallelRunner, ParallelTransformer
from labkit.sampling_params import SamplingParams, check_number
from labkit.schedulers import scheduler_class
from labkit.schedulers.audit import Auditor
from labkit.speculative.draft_model import draft_model, make_speculator
from labkit.structured.compiler import FormCompiler
from labkit.structured.form import AnswerForm
from labkit.trace.records import StepRecord, TraceMeta
from labkit.trace.trace import Trace

_CPU_POOL_BYTES = 384 * 2**20  # the most that the default pool takes on a CPU
_GPU_POOL_SHARE = 0.8  # of the memory that weights and a step leave free; graphs use the rest
_MAX_ID = 128  # characters


class Engine(EngineCore):
    """Requests in, text out, one step at a time.

    Args:
        config: the settings, or a model, named or loaded as in `EngineConfig`; None takes all defaults.
        scheduler: a `Scheduler` class of your own, with the same arguments.
        pool: a `BlockPool` class of your own, which is called with `(num_blocks, block_size)`. The steps of
            either are audited: a broken rule raises `InvariantError` at the step that broke it.
        say: a function that gets a line about each thing that takes time; None is silence.

    `config.num_threads` sets the threads of PyTorch for the whole process.

    Attributes:
        trace: the records of all steps.
        step_bound: what keeps steps within `max_step_seconds`; None without it.
        threads: what adapts the number of threads to what other processes leave; None where nothing does.
        outputs: the output of each request so far, by id. Outputs are updated in place, and stay until you
            take them out.
        sampling_defaults: fields of `SamplingParams` that hold for requests that do not say.

    Raises:
        ValueError: for a model that cannot be found or run, or sizes that do not fit into memory.
    """

    def __init__(
        self,
        config: EngineConfig | str | os.PathLike[str] | LoadedModel | None = None,
        scheduler: Callable[..., Scheduler] | None = None,
        pool: Callable[..., BlockPool] | None = None,
        *,
        say: Say | None = print,
    ) -> None:
        if isinstance(config, str | os.PathLike | LoadedModel):
            config = EngineConfig(model=config)
        elif not isinstance(config, EngineConfig | None):
            raise ValueError(f"config must be EngineConfig or a model, not {type(config).__name__}")
        self.config = config = config or EngineConfig()
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.model = model_of(config, say)
        module = self.model.module
        if config.max_model_len and config.max_model_len > module.max_model_len:
            raise ValueError(
                f"max_model_len must be at most {module.max_model_len}, the limit of {self.model.name}, "
                f"not {config.max_model_len}"
            )
        asked = config.generation_config == "auto"
        self.sampling_defaults = sampling_defaults(self.model.generation) if asked else {}
        draft = draft_model(config, self.model, say)
        with warm_up_lock:
            self._build(scheduler, pool, draft, say)
        if scheduler or pool or config.audit:
            self.auditor = Auditor(
                self.scheduler, self.pool, config.max_num_batched_tokens, config.max_num_seqs
            )
        self.forms = FormCompiler(self.model)
        self.outputs: dict[str, RequestOutput] = {}
        self._unfinished: dict[str, Request] = {}
        self._numbers = itertools.count()

    def _build(
        self,
        scheduler: Callable[..., Scheduler] | None,
        pool: Callable[..., BlockPool] | None,
        draft: LoadedModel | None,
        say: Say | None,
    ) -> None:
        """Choose kernels, size the pool, warm up, and put the parts together."""
        config, module = self.config, self.model.module
        if module.device.type == "cuda":
            keep_compiled()
        backend, reserve = tried_backend(module, config, say)
        num_blocks = config.num_blocks or self._fitting_blocks(reserve, draft)
        cache, graphs = warm_up(module, backend, config, num_blocks, reserve=reserve, say=say)
        blocks = make_pool(pool, config, cache, say)  # fewer than asked for, if memory did not suffice
        blocks.enable_prefix_caching = config.enable_prefix_caching
        make = scheduler_class(
            scheduler or config.scheduler, enable_chunked_prefill=config.enable_chunked_prefill
        )
        policy = make(
            blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_policy=config.kv_policy,
        )
        trace = Trace(self._meta(policy), max_steps=config.max_trace_steps)
        parallel = isinstance(module, ParallelTransformer)
        if parallel:
            self.make_runner = ParallelRunner
        super().__init__(module, policy, backend, cache=cache, graphs=graphs, trace=trace)
        most = cache.num_blocks * config.block_size
        self.max_model_len = config.max_model_len or min(module.max_model_len, most)
        self.speculator = make_speculator(config, self.model, self.runner, draft, say)
        bound = config.max_step_seconds
        self.step_bound = StepBound(policy, bound, config.block_size) if bound else None
        # The processes of a parallel model have shared the threads out when it was loaded.
        threads = torch.get_num_threads() if parallel else config.num_threads or usual_threads()
        adaptive = config.adaptive_threads and module.device.type == "cpu" and threads > 1 and not parallel
        self.threads = ThreadBudget(threads) if adaptive else None
        if torch.get_num_threads() != threads:  # another engine has left cores to other processes
            torch.set_num_threads(threads)

    def __repr__(self) -> str:
        model, scheduler, pool = self.model, self.scheduler, self.pool
        requests = f"{len(scheduler.running)} running, {scheduler.num_waiting} waiting"
        pages = f"{pool.num_free} of {pool.num_blocks} pages free"
        return f"Engine({model.name!r}, {model.dtype} on {model.device}, {requests}, {pages})"

    def _fitting_blocks(self, reserve: int, draft: LoadedModel | None) -> int:
        """Return how many blocks all seats need at full length, or fewer if memory is short.

        On a GPU, `reserve` bytes are kept free.
        """
        config, module, size = self.config, self.model.module, self.config.block_size
        modules = [module, draft.module] if draft else [module]
        block = size * sum(kv_shape(each, config.kv_cache_dtype).bytes_per_token for each in modules)
        if module.device.type == "cuda":
            budget = _GPU_POOL_SHARE * (free_bytes(module.device) - reserve)
        else:
            budget = min(_CPU_POOL_BYTES, psutil.virtual_memory().available / 2)
        longest = min(config.max_model_len or module.max_model_len, module.max_model_len)
        blocks = min(config.max_num_seqs * -(-longest // size), int(budget // block))
        if blocks < 1:
            raise ValueError(f"too little memory: one page of the KV cache takes {block / 2**20:.1f} MiB")
        return blocks

    def _meta(self, scheduler: Scheduler) -> TraceMeta:
        config, model = self.config, self.model
        return TraceMeta(
            num_blocks=scheduler.pool.num_blocks,
            block_size=scheduler.pool.block_size,
            max_num_seqs=scheduler.max_num_seqs,
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
        """Queue a prompt, and return the request's id. The next step can run it.

        A prompt is text, token ids, or a dictionary as vLLM takes it: {"prompt": text}, or
        {"prompt_token_ids": token ids}, to which "prompt" may give the text that they stand for.
        With `params.n` > 1 the answers after the first are requests of their own: "7", "7.1", "7.2", ...

        Raises:
            ValueError: for a request that cannot be served; the message names the field and the limit.
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
        """Check and tokenise a prompt without queueing it. Any thread may call it; raises as above."""
        params = SamplingParams(**self.sampling_defaults) if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        check_number("priority", priority, -(2**31), 2**31, whole=True)
        text, token_ids = read_prompt(prompt, self.model, self.max_model_len)
        if params.max_tokens is None:  # as far as the model and the pool go
            most = min(self.max_model_len, self.pool.num_blocks * self.pool.block_size)
            params = replace(params, max_tokens=max(1, most - len(token_ids)))
        check_tokens("stop_token_ids", params.stop_token_ids, self.model)
        check_tokens("logit_bias", list(params.logit_bias or ()), self.model)
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
        has_text = not isinstance(self.model.tokenizer, NoTokenizer)
        if params.stop and not has_text:
            raise ValueError("stop needs text, and the model has no tokenizer: use stop_token_ids")
        alike = replace(params, prompt_logprobs=None)  # one of n answers reads the prompt for all of them
        first, *others = (
            Request(
                name,
                token_ids,
                alike if i else params,
                priority=priority,
                seed=mix(seed, i),
                max_len=min(len(token_ids) + params.max_tokens, self.max_model_len),
                stop_ids=stop_ids,
                prompt=text,
                reader=self._reader(params, token_ids) if has_text else None,
                form=self._form(params, stop_ids),
                family=request_id,
            )
            for i, name in enumerate(answer_ids(request_id, params.n))
        )
        first.children = others
        self.check_unused(first)
        self.scheduler.check(first)
        return first

    def _reader(self, params: SamplingParams, prompt: Sequence[int]) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            self.model.tokenizer,
            params.stop,
            prompt,
            min_tokens=params.min_tokens,
            keep_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _form(self, params: SamplingParams, stop_ids: frozenset[int]) -> AnswerForm | None:
        if params.structured is None:
            return None
        return self.forms.start(params.structured, stop_ids, params.max_tokens)

    def check_unused(self, request: Request) -> None:
        """Raise `ValueError` if an output has the id of a request or one of its children."""
        for member in (request, *request.children):
            if member.request_id in self.outputs:
                raise ValueError(f"request_id {member.request_id!r} is already in use")

    def enqueue(self, request: Request) -> str:
        """Queue a request that `make_request` made; returns its id."""
        self.add(request)
        return request.request_id

    def add(self, request: Request) -> None:
        """Queue a request and its children, for the next step on. Raises as `add_request` does."""
        self.check_unused(request)
        family = [request, *request.children]  # the scheduler may take the children over at once
        super().add(request)
        self.open_outputs(family)

    def open_outputs(self, family: Sequence[Request]) -> None:
        """Open an output for a request and its children, whose ids nobody has."""
        request, now = family[0], time.perf_counter()
        for index, member in enumerate(family):
            self._unfinished[member.request_id] = member
            self.outputs[member.request_id] = RequestOutput(
                member.request_id,
                list(member.token_ids),
                [],
                "",
                None,
                RequestMetrics(now),
                logprobs=None if member.params.logprobs is None else [],
                index=index,
                prompt=member.prompt,
                prompt_logprobs=None if request.params.prompt_logprobs is None else request.prompt_logprobs,
            )

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change a request's priority (lower runs first). Returns False if it is unknown or finished."""
        check_number("priority", priority, -(2**31), 2**31, whole=True)
        return self.scheduler.set_priority(request_id, priority)

    # -- at the end of each step ------------------------------------------------------------------

    def step(self) -> StepRecord:
        """Run one step as `EngineCore.step` does. Ctrl-C, or a notebook's stop button, waits for its end.

        With a scheduler or a pool of your own it ends the step at once, because that may never be over.

        Raises:
            ParallelError: after a step in which one of the processes of a parallel model failed. All requests
                in it have ended, and no more can run.
        """
        with contextlib.nullcontext() if self.auditor else _interrupts_held():
            record = super().step()
        module = self.model.module
        if isinstance(module, ParallelTransformer) and module.workers.failure:
            raise ParallelError(module.workers.failure)
        return record

    def deliver(
        self, plan: StepPlan, result: StepResult, record: StepRecord, begin: float, end: float
    ) -> None:
        """Update the outputs: those that are still in `outputs`, because a caller may take one out early."""
        if self.step_bound:
            self.step_bound.after_step(record)
        if self.threads:
            before = self.threads.now
            self.threads.after_step(end) if self.has_unfinished else self.threads.rest()
            if self.threads.now != before:
                self.scheduler.changes.threads = self.threads.now  # the next record says so
        for admission in record.admitted:
            output = self.outputs.get(admission.request_id)
            if output and output.metrics.first_scheduled_time is None:
                output.metrics.first_scheduled_time = begin
                output.metrics.num_cached_tokens = admission.num_cached_tokens
        for request_id, _ in record.preempted:
            if output := self.outputs.get(request_id):
                output.metrics.num_preemptions += 1
        for row, tokens in enumerate(result.sampled):
            request = plan.requests[row]
            if tokens and (output := self.outputs.get(request.request_id)):
                output.token_ids.extend(tokens)
                output.metrics.token_times.extend([end] * len(tokens))
                if output.logprobs is not None:
                    output.logprobs.extend(result.logprobs[row][: len(tokens)])
                if request.reader:
                    output.text = request.reader.text
        for request in [request for request in self.scheduler.running if request.form]:
            known, drafts = len(request.token_ids), request.drafts if self.speculator else ()
            if self.config.jump_ahead and request.num_computed_tokens == known - 1:
                drafts = request.form.forced or drafts  # these are always accepted
            request.drafts = drafts[: request.max_len - known - 1]
            request.form.start(request.drafts)
        for request_id, reason, _ in record.finished:
            request = self._unfinished.pop(request_id)
            if output := self.outputs.get(request_id):
                if request.reader:
                    request.reader.finish()
                    output.text = request.reader.text
                output.error = request.error
                output.metrics.finish_time = end
                output.finish_reason = reason  # last, so that other threads can trust the rest
            request.reader = request.form = None  # a static batch keeps members that `preview` copies

    # -- the end ----------------------------------------------------------------------------------

    def release(self) -> None:
        """Give back the memory of the KV cache and the graphs. The engine can only be read from now on."""
        self.__dict__.pop("runner", None)  # it may be gone already
        close_pool(self.pool)
        self.speculator = None  # a model that drafts has a cache of its own

    # -- a look ahead -----------------------------------------------------------------------------

    def preview(self) -> StepRecord:
        """Return what the next step would do, as a record in which nothing has been sampled yet.

        A copy of the scheduler plans it, on a copy of the pool, so nothing changes. `free_blocks` and
        `waiting` are those after the plan. Call it where `step` may be called; it raises as planning does.
        """
        requests = self.scheduler.requests.values()
        kept = [part for r in requests for part in (r.params, r.reader, r.form, r.prompt_logprobs)]
        shared = {id(part): part for part in kept}
        # A large pool holds a hundred thousand numbers. They are copied at once where they are known to be
        # numbers, so not in a pool of your own.
        for flat in plain_parts(self.pool):
            shared[id(flat)] = copy.copy(flat)
        scheduler = copy.deepcopy(self.scheduler, shared)  # and the pool, which it holds
        plan = scheduler.schedule()
        return record_step(self._step, plan, StepResult([()] * len(plan.requests)), scheduler)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let a Ctrl-C wait: books that are left in the middle do not add up. A second one does not wait."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            usual(number, frame)
        held.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:
        usual(*held[0])


def answer_ids(request_id: str, n: int) -> list[str]:
    """Return the ids of the `n` answers to one request: "7", "7.1", "7.2"."""
    return [request_id, *(f"{request_id}.{index}" for index in range(1, n))]
