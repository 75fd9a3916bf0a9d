"""The engine in which answers grow, with another process that computes prompts for it."""

from __future__ import annotations

import contextlib
import functools
import pickle
import queue
import threading
import weakref
from dataclasses import fields, replace
from typing import IO, Any

import torch

from labkit.config import EngineConfig
from labkit.core.engine_core import EngineCore
from labkit.core.model_runner import ModelRunner
from labkit.core.plan import StepPlan, StepResult
from labkit.core.request import Request
from labkit.disaggregated.messages import Computed, Forget, Leaving, Load, Progress, Prompt
from labkit.engine import Engine
from labkit.models.devices import resolve_device
from labkit.models.load import LoadedModel
from labkit.models.progress import Say, tell
from labkit.parallel import processes
from labkit.parallel.processes import ends
from labkit.trace.records import PLACES, Moved, OtherPool, StepRecord
from labkit.transfer import KVPages, TransferError, import_kv

_LOOK = 0.1  # seconds to wait for pages where nothing else is to be done, between looks at new commands
_UNSENT, _THERE, _ARRIVING = PLACES
Arrival = tuple[Progress | Leaving | Computed, KVPages | None]


class _News:
    """What the next record says of the requests that are not here, and of the engine that has them."""

    def __init__(self) -> None:
        self.moved: list[Moved] = []
        self.pools: list[OtherPool] = []  # what was told of it since the last record

    def drain(self) -> dict[str, Any]:
        """Return what is new, as fields of `StepRecord`: of each request there, what it held last.

        Those that have left since are told once more, and are gone in the record after it.
        """
        tables = {held.request_id: held for pool in self.pools for held in pool.tables}
        told = [OtherPool(pool.num_blocks, tuple(tables.values())) for pool in self.pools[-1:]]
        found = {"moved": tuple(self.moved), "other_pool": told[0] if told else None}
        self.moved, self.pools = [], self.pools[-1:] if told != self.pools[-1:] else []
        return found


class _TellingRunner(ModelRunner):
    """A model runner whose results also tell the news."""

    def __init__(self, news: _News, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.news = news

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan, as `ModelRunner.run` does. If it raises, the news waits for the next step."""
        result = super().run(plan)
        result.traffic = self.news.drain()
        return result


class DisaggregatedEngine(Engine):
    """An `Engine` whose prompts are computed by another process, and arrive here as pages.

    A prompt that is no longer than a page, or whose log-probabilities are asked for, is computed here. So are
    all prompts after the other process has ended: those that it had then end with an error. A prompt is sent
    when there is a seat and room for its pages here, so that they are not evicted before they are used.

    Args:
        config: the settings of both engines; the model must be named, because both load it. On a CPU, each
            takes `num_threads` threads; None gives each half of them.
        say: as in `Engine`.

    Attributes:
        elsewhere: for each request that has not arrived here, by id, where it is: one of `PLACES`.

    Raises:
        ValueError: as `Engine` does, and for settings that cannot work here; the message names them.
    """

    def __init__(self, config: EngineConfig | str | None = None, *, say: Say | None = print) -> None:
        config = config if isinstance(config, EngineConfig) else EngineConfig(config or EngineConfig.model)
        if isinstance(config.model, LoadedModel):
            raise ValueError("model must be named, because the other process loads it, too")
        if config.scheduler != "continuous" or not config.enable_prefix_caching:
            raise ValueError("scheduler must be 'continuous', with enable_prefix_caching")
        if config.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size must be 1: the pages of several processes cannot travel")
        if config.num_threads is None and resolve_device(config.device).type == "cpu":
            config = replace(config, num_threads=max(1, torch.get_num_threads() // 2))
        tell(say, "Starting a second process, which computes prompts.")
        self._other = processes.start("labkit.disaggregated.worker")
        self._end_other = weakref.finalize(self, processes.end, self._other)
        self._news = _News()
        self.make_runner = functools.partial(_TellingRunner, self._news)
        super().__init__(config, say=say)
        self.elsewhere: dict[str, str] = {}
        self._outside: dict[str, Request] = {}
        self._aborted: set[str] = set()  # answers of n > 1 that were aborted before they arrived
        self._arrived: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._num_blocks_there = 1
        self._failure = ""  # why the other process is of no use any more
        values = {f.name: getattr(config, f.name) for f in fields(config)}
        self._tell(Load(values | {"speculative": None, "draft_model": None}))
        threading.Thread(target=_receive, args=(ends(self._other.stdout), self._arrived), daemon=True).start()
        self._take(self._arrived.get())  # that it is ready

    def close(self) -> None:
        """End the other process, which otherwise ends with this engine. It can be called again."""
        self._end_other()

    # -- requests ---------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request and its children. Raises as `Engine.add_request` does."""
        short = request.num_prompt_tokens <= self.pool.block_size
        if short or request.params.prompt_logprobs is not None or self._failure:
            super().add(request)
            return
        self.check_unused(request)
        self.scheduler.check(request)
        self.open_outputs([request, *request.children])
        self._outside[request.request_id] = request
        self._move(request, _UNSENT, request.num_prompt_tokens)

    def _move(self, request: Request, place: str, amount: int) -> None:
        self.elsewhere[request.request_id] = place
        self._news.moved.append(Moved(request.request_id, place, amount))

    def abort(self, request_id: str) -> bool:
        """End a request at the next step, wherever it is. False if there is none."""
        if request := self._outside.get(request_id):
            self._tell(Forget(request_id))
            self._arrive(request)
        elif any(request_id == child.request_id for r in self._outside.values() for child in r.children):
            self._aborted.add(request_id)
            return True
        return super().abort(request_id)

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Change a request's priority (lower runs first). Returns False if it is unknown or finished."""
        if request := self._outside.get(request_id):
            request.priority = priority
            return True
        return super().set_priority(request_id, priority)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do, or waits for a prompt from the other process."""
        return super().has_unfinished or bool(self._outside)

    # -- steps ------------------------------------------------------------------------------------

    def step(self) -> StepRecord:
        """Take in the pages that have arrived, send prompts that there is room for, and run a step.

        With nothing to run it waits for pages, a tenth of a second at most.
        """
        self._send()
        with contextlib.suppress(queue.Empty):
            if not super().has_unfinished:
                self._take(self._arrived.get(timeout=_LOOK))
            while True:
                self._take(self._arrived.get_nowait())
        return super().step()

    def _send(self) -> None:
        """Send prompts, in order of priority, as long as there are seats and pages for them here."""
        unsent = [r for name, r in self._outside.items() if self.elsewhere[name] == _UNSENT]
        if not unsent:
            return
        there = [r for name, r in self._outside.items() if self.elsewhere[name] != _UNSENT]
        here = self.scheduler.requests.values()
        seats = self.scheduler.max_num_seqs - sum(1 + len(r.children) for r in there) - len(here)
        coming = [*there, *(r for r in here if r.status == "waiting")]
        room = self.pool.num_free - sum(self.pool.blocks_for(r.num_prompt_tokens + 1) for r in coming)
        for request in sorted(unsent, key=lambda r: r.priority):
            need = self.pool.blocks_for(request.num_prompt_tokens + 1)
            if (seats < 1 or need > room) and (there or here):  # alone, it has all the room that there is
                return
            self._move(request, _THERE, request.num_prompt_tokens)
            self._tell(Prompt(request.request_id, request.token_ids, request.priority))
            there.append(request)
            seats -= 1 + len(request.children)
            room -= need

    def _take(self, arrival: Arrival | None) -> None:
        """Let a request run whose pages are here, or end it with what went wrong."""
        if arrival is None:
            code = self._other.wait()
            self._failure = f"the process that computes prompts ended (exit code {code})"
            for name, request in [*self._outside.items()]:
                if self.elsewhere[name] == _UNSENT:
                    self._arrive(request)
                else:
                    self._end(request, self._failure)
            self._news.pools.append(OtherPool(self._num_blocks_there))
            return
        message, pages = arrival
        if isinstance(message, Progress):
            self._news.pools.append(message.pool)
            self._num_blocks_there = message.pool.num_blocks
            return
        request = self._outside.get(message.request_id)
        if request is None:  # aborted meanwhile
            return
        if isinstance(message, Leaving):
            self._move(request, _ARRIVING, message.num_bytes)
            return
        try:
            if pages is None:
                raise TransferError(f"the prompt failed in its own process: {message.error}")
            import_kv(self, pages, compare=False)
        except TransferError as error:
            self._end(request, str(error))
            return
        self._arrive(request)

    def _arrive(self, request: Request) -> None:
        del self._outside[request.request_id], self.elsewhere[request.request_id]
        EngineCore.add(self, request)  # its output is open already
        for child in [child.request_id for child in request.children]:
            if child in self._aborted:
                self._aborted.discard(child)
                EngineCore.abort(self, child)

    def _end(self, request: Request, why: str) -> None:
        members = [*request.children, request]
        self._arrive(request)
        for member in members:
            member.error = why
            self.scheduler.finish(member, "error")

    def _tell(self, message: Load | Prompt | Forget) -> None:
        with contextlib.suppress(OSError):  # that it has ended is learnt where its answers are read
            processes.send(ends(self._other.stdin), message)


def _receive(pipe: IO[bytes], arrived: queue.SimpleQueue[Arrival | None]) -> None:
    """Read and check what the other process sends, beside the steps; None at its end."""
    try:
        while True:
            message: Progress | Leaving | Computed = pickle.load(pipe)
            pages = (
                KVPages.from_bytes(message.pages) if isinstance(message, Computed) and message.pages else None
            )
            arrived.put((message, pages))
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        arrived.put(None)
