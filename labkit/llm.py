"""The engine for a list of prompts: `generate` and `chat` return once all of them are answered."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.chat import as_chat, check_variables
from labkit.models.prompts import Prompt
from labkit.outputs import RequestOutput
from labkit.sampling_params import SamplingParams, unknown
from labkit.transfer import load_session, save_session

Message = Mapping[str, Any]  # {"role": "user", "content": "Why is the sky blue?"}
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model and an engine that answers lists of prompts.

    `generate` lets the model go on with a text, as it stands. `chat` asks it as a conversation, in the format
    that it was trained on: use that for questions to an instruct model, which often has nothing to add to a
    bare text and ends at once.

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
                raise ValueError(unknown(name, known))
        self.engine = Engine(EngineConfig(model=model, **config))
        self._hinted = False  # whether `chat` was hinted at

    def __repr__(self) -> str:
        model = self.engine.model
        return f"LLM({model.name!r}, {model.dtype} on {model.device})"

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer, as `transformers` has it."""
        return self.engine.model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return how prompts without `params` are sampled (see `EngineConfig.generation_config`)."""
        return SamplingParams(**self.engine.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool = True,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Go on with all prompts, as they stand, and return when the last is done. For questions, see `chat`.

        Args:
            prompts: one prompt or many; each is text, token ids, or a dictionary with "prompt" or
                "prompt_token_ids".
            params: sampling parameters for all prompts, or a list with those of each; None takes those of
                `get_default_sampling_params`.
            progress: whether to show a bar with tokens per second.
            sampling_params, use_tqdm: the names that vLLM has for `params` and `progress`.

        Returns:
            The output of each prompt, in order; with n > 1, n outputs in a row.

        Raises:
            ValueError: if a prompt cannot be served; then none is run.
        """
        if not isinstance(prompts, Iterable):
            raise ValueError(f"prompts must be text, token ids, or a list of either, not {prompts!r}")
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        outputs = self._answer(prompts, _either(params, sampling_params), _shown(progress, use_tqdm))
        self._hint_at_chat(outputs)
        return outputs

    def chat(
        self,
        messages: str | Sequence[Message] | Sequence[str | Sequence[Message]],
        params: Params = None,
        *,
        progress: bool = True,
        sampling_params: Params = None,
        use_tqdm: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer all conversations, each in the model's own chat format, and return when the last is done.

        A model without a chat template gets the messages as paragraphs; `generate` suits it better.

        Args:
            messages: one conversation or many; each is a list of messages {"role", "content"}, or the text of
                a user's only message.
            params, progress, sampling_params, use_tqdm: what `generate` says.
            add_generation_prompt: whether prompts end where the model's answer begins.
            continue_final_message: whether they end in the last message instead, for the model to go on.
            chat_template_kwargs: more variables for the template, such as {"enable_thinking": False}.

        Returns:
            The output of each conversation, in order; with n > 1, n outputs in a row.

        Raises:
            ValueError: if a conversation cannot be served, or the model's template refuses it; then none is
                run.
        """
        if isinstance(messages, str):
            messages = [messages]
        if not isinstance(messages, Iterable):
            raise ValueError(
                f"messages must be text, a list of messages, or a list of either, not {messages!r}"
            )
        messages = list(messages)
        if messages and isinstance(messages[0], Mapping):
            messages = [messages]
        variables = chat_template_kwargs or {}
        check_variables(self.get_tokenizer(), variables)
        options = {"add_generation_prompt": add_generation_prompt, "variables": variables}
        options |= {"continue_final_message": continue_final_message}
        prompts = [self._written(conversation, options) for conversation in messages]
        return self._answer(prompts, _either(params, sampling_params), _shown(progress, use_tqdm))

    def save_session(self, output: RequestOutput, path: str | os.PathLike[str]) -> int:
        """Keep the keys and values of a prompt and its answer in a file, to go on with them another day.

        Args:
            output: what `generate` or `chat` returned, as long as the cache still has its pages.
            path: the file; an older one is replaced.

        Returns:
            How many tokens the file holds: those in whole pages.

        Raises:
            TransferError: if the cache has none of them.
        """
        return save_session(self.engine, output.prompt_token_ids + output.token_ids, path)

    def load_session(self, path: str | os.PathLike[str]) -> list[int]:
        """Take a session up again: a prompt that begins as it did need not be computed so far.

        Returns:
            The tokens that the cache holds now.

        Raises:
            TransferError: if the file is damaged, something else, or of another model or layout.
        """
        return load_session(self.engine, path)

    def _written(self, conversation: str | Sequence[Message], options: Mapping[str, Any]) -> Prompt:
        """Return a conversation as a prompt."""
        if not isinstance(conversation, str):
            if not isinstance(conversation, Sequence) or not conversation:
                raise ValueError(f"messages must have at least one message, not {conversation!r}")
            for message in conversation:
                if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                    raise ValueError(f"messages: each must have a role and a content, not {message!r}")
        tokenizer = self.get_tokenizer()
        try:
            written = as_chat(tokenizer, conversation, **options)
        except Exception as error:  # some models' templates refuse some conversations, in their own words
            raise ValueError(f"messages: the chat template says: {error}") from None
        if isinstance(written, str):
            return written
        return {"prompt": tokenizer.decode(written), "prompt_token_ids": written}

    def _hint_at_chat(self, outputs: list[RequestOutput]) -> None:
        """Hint at `chat`, once, if the model had nothing to add to a text, and has a chat template."""
        model = self.engine.model
        if self._hinted or not getattr(model.tokenizer, "chat_template", None):
            return
        for output in outputs:
            ended = output.token_ids and output.token_ids[-1] in model.eos_token_ids
            if output.prompt and ended and not output.text.strip():
                self._hinted = True
                warnings.warn(
                    f"{model.name} ended its answer at once: `generate` does not apply its chat template. "
                    "For a question to an instruct model, use `chat`.",
                    stacklevel=3,
                )
                return

    def _answer(self, prompts: list[Prompt], params: Params, progress: bool) -> list[RequestOutput]:
        """Run the prompts, and return their outputs in order."""
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


def _either(params: Params, sampling_params: Params) -> Params:
    """Return what was given, under one name or the other."""
    if params is not None and sampling_params is not None:
        raise ValueError("params and sampling_params are two names of one thing: give one of them")
    return sampling_params if params is None else params


def _shown(progress: bool, use_tqdm: bool | None) -> bool:
    return progress if use_tqdm is None else bool(use_tqdm)
