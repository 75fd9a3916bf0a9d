"""From the messages of a conversation to a prompt, by the chat template that came with the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PROBE = "wordsofauser"


def as_chat(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str | list[int]:
    """Write a user's message, or a list of messages, in the model's chat format.

    Args:
        tokenizer: the tokenizer, which has the template.
        prompt: text, or messages {"role", "content"}; a content is text, or a list of parts
            {"type": "text", "text"}. The template sees what else a message has, such as a name.
        add_generation_prompt: whether the result ends where the model's answer begins.
        continue_final_message: whether it ends in the last message instead, for the model to go on with that.
        variables: more variables for the template, such as {"enable_thinking": False}.

    Returns:
        Token ids; or text, a paragraph for each message, if the model has no chat template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(map(text_of, messages))
    more = dict(variables or {})
    messages = _in_its_form(tokenizer, messages, more)
    if continue_final_message:
        text = _written(tokenizer, messages, continue_final_message=True, **more)
    else:
        text = _written(tokenizer, messages, add_generation_prompt=add_generation_prompt, **more)
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template has written them already


def beginning(tokenizer: Any) -> list[int]:
    """The tokens with which each talk begins in the model's chat format, a default system prompt included."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    one, other = as_chat(tokenizer, "a"), as_chat(tokenizer, "b")
    differs = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    return list(one[:differs])


def check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a variable that the model's chat template does not read."""
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    taken = inspect.signature(tokenizer.apply_chat_template).parameters if template else {}
    for name in variables:
        if name in taken or name == "messages" or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"chat_template_kwargs: the model's chat template has no variable {name!r}")


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _in_its_form(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Messages with contents as the template reads them: as text, as parts, or as they are if it reads both.

    A template does not say which it reads, so it is tried. One that expects parts finds none in text, and
    loses it without a word; one that expects text writes a list of parts as Python does.
    """
    of_text, of_parts = (_tried(tokenizer, content, variables) for content in (_PROBE, _parts(_PROBE)))
    if of_text is not None and of_text == of_parts:
        return [dict(message) for message in messages]
    if of_text is None and of_parts is not None and "'text'" not in of_parts:
        two = _tried(tokenizer, _parts("first") + _parts(_PROBE), variables)
        if two is None:  # it reads the first part alone
            return [{**message, "content": _parts(text_of(message))} for message in messages]
        return [{**message, "content": _parts(message["content"])} for message in messages]
    return [{**message, "content": text_of(message)} for message in messages]


def _tried(tokenizer: Any, content: object, variables: Mapping[str, Any]) -> str | None:
    """What the template makes of a content; None if it refuses it, or loses its words."""
    try:
        message = {"role": "user", "content": content}
        written = _written(tokenizer, [message], add_generation_prompt=True, **variables)
    except Exception:  # of any kind: templates raise what they like
        return None
    return written if _PROBE in written else None


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
