"""The engine for a list of prompts: `generate` returns once all of them are answered."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm.auto import tqdm

from labkit.config import EngineConfig
from labkit.engine import Engine, Prompt
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams


class LLM:
    """A model and an engine that answers lists of prompts.

    Args:
        model: the model, as in `EngineConfig`.
        config: other fields of `EngineConfig`.

    Raises:
        ValueError: for a setting that does not exist, and as `Engine` does.
    """

    def __init__(self, model: Any = "smollm2-135m", **config: Any) -> None:
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        for name in config:
            if name not in known:
                raise ValueError(f"{name} is not a setting; known are {', '.join(sorted(known))}")
        self.engine = Engine(EngineConfig(model=model, **config))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts, and return when the last is done.

        Args:
            prompts: one prompt or many; each is text or token ids.
            params: sampling parameters for all prompts, or a list with those of each.
            progress: whether to show a bar with tokens per second.

        Returns:
            The output of each prompt, in order; with n > 1, n outputs in a row.

        Raises:
            ValueError: if a prompt cannot be served; then none is run.
        """
        if not isinstance(prompts, Iterable):
            raise ValueError(f"prompts must be text, token ids, or a list of either, not {prompts!r}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"params must be one or one per prompt: {len(params)} for {len(prompts)} prompts"
            )
        engine = self.engine
        requests = [engine.make_request(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
        ids = [member.request_id for request in requests for member in (request, *request.children)]
        for request in requests:
            engine.enqueue(request)
        try:
            with tqdm(total=len(ids), desc="generate", unit="answer", disable=not progress) as bar:
                self._run(set(ids), bar)
        except BaseException:
            for request_id in ids:
                if not engine.outputs[request_id].finished:
                    engine.abort(request_id)
            with contextlib.suppress(Exception):  # what went wrong first is what matters
                engine.step()  # carries the aborts out
            for request_id in ids:
                engine.outputs.pop(request_id)
            raise
        return [engine.outputs.pop(request_id) for request_id in ids]

    def _run(self, open_ids: set[str], bar: tqdm) -> None:
        begin, tokens = time.perf_counter(), 0
        while open_ids:
            record = self.engine.step()
            tokens += record.total_sampled
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):.1f} tokens/s", refresh=False)
            for finish in record.finished:
                open_ids.discard(finish.request_id)
                bar.update()
