"""From the messages of a conversation to a prompt, by the chat template that came with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def as_chat(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> str | list[int]:
    """Write a user's message, or a list of messages {"role", "content"}, in the model's chat format.

    Returns:
        Token ids; or text, a paragraph for each message, if the model has no chat template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template has written them already
