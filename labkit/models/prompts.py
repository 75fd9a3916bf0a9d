"""Prompts as callers give them: text, token ids, or a dictionary with either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.models.load import LoadedModel
from labkit.sampling_params import check_number

Prompt = str | Sequence[int] | Mapping[str, Any]
_KEYS = ("prompt", "prompt_token_ids")


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the model, or a server, takes."""


def read_prompt(prompt: Prompt, model: LoadedModel, max_model_len: int) -> tuple[str | None, list[int]]:
    """Return the text of a prompt, if it has one, and its token ids.

    Raises:
        ValueError: for what is no prompt, or has no tokens, or some that the model does not know.
        PromptTooLongError: if no token is left for the answer.
    """
    if not isinstance(prompt, Mapping):
        text = prompt if isinstance(prompt, str) else None
        return text, _tokenise(prompt, model, max_model_len)
    text, token_ids = (prompt.get(key) for key in _KEYS)
    if not set(prompt) <= set(_KEYS) or (text is None and token_ids is None):
        raise ValueError(f"prompt must have the key {' or '.join(_KEYS)}, and no others, not {list(prompt)}")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"prompt must be text, not {type(text).__name__}")
    if isinstance(token_ids, str):
        raise ValueError("prompt_token_ids must be a list of token ids, not text")
    return text, _tokenise(text if token_ids is None else token_ids, model, max_model_len)


def check_tokens(name: str, token_ids: Sequence[int], model: LoadedModel) -> None:
    """Raise `ValueError`, naming the field, unless these are token ids of a model."""
    for token in token_ids:
        check_number(f"{name}: a token id", token, 0, model.config.vocab_size - 1, whole=True)


def _tokenise(prompt: str | Sequence[int], model: LoadedModel, max_model_len: int) -> list[int]:
    if isinstance(prompt, str):
        try:
            token_ids = list(model.tokenizer.encode(prompt))
        except TypeError:
            raise ValueError("prompt is not text: it holds half a surrogate pair") from None
        if max(token_ids, default=0) >= model.config.vocab_size:  # a tokenizer with tokens added
            check_tokens("prompt", token_ids, model)
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
        token_ids = list(prompt)
        check_tokens("prompt", token_ids, model)
    else:
        raise ValueError(f"prompt must be text or a list of token ids, not {type(prompt).__name__}")
    if not token_ids:
        raise ValueError("prompt is empty: it must have at least one token")
    if len(token_ids) >= max_model_len:
        raise PromptTooLongError(
            f"prompt has {len(token_ids)} tokens, but max_model_len is {max_model_len} and at least "
            "one token must be left for the answer"
        )
    return token_ids
