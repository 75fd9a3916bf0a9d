"""Messages of a conversation to a prompt, by the chat template that came with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def as_chat(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> str | list[int]:
    """A user's message, or a talk of {"role", "content"}, in the model's chat format.

    As plain text, paragraph by paragraph, if the model has none.
    """
    talk = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in talk)
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template has written them
