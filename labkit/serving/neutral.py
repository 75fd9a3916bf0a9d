"""Fields that we do not have, with the values that ask for nothing: what is sent so is let pass.

Clients fill in whatever their own options hold. A field at the value that changes nothing is no wish; at any
other value it is one, and is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Where = Literal["completions", "chat", "stream_options", "message", "part", "tool", "function", "call"]

_HINT = object()  # any value: the field says something to a cache or to a log, and changes no answer

_BOTH: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "store": (False,),
    "service_tier": ("auto", "default"),
    "metadata": ({},),
    "prompt_cache_key": (_HINT,),
    "prompt_cache_retention": (_HINT,),
    "safety_identifier": (_HINT,),
    # vLLM, transformers, llama.cpp and others that speak the same protocol
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "detokenize": (True,),
    "dry_multiplier": (0,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_new_tokens": (0,),
    "mirostat": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "prompt_logprobs": (False,),
    "repeat_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "tfs_z": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
NEUTRAL: dict[Where, dict[str, tuple[Any, ...]]] = {
    "completions": _BOTH | {"add_special_tokens": (True,), "suffix": ("",)},
    "chat": _BOTH
    | {
        "add_special_tokens": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),  # with no function there, both are none
        "functions": ([],),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    },
    "stream_options": {"continuous_usage_stats": (False,), "include_obfuscation": (False,)},
    "message": {
        "annotations": ([],),
        "cache_control": (_HINT,),
        "images": ([],),
        "parsed": (_HINT,),  # what a client makes of its content
        "prefix": (False,),
        "provider_specific_fields": ({},),
        "reasoning_content": ("",),
        "refusal": ("",),
        "thinking_blocks": ([],),
        "videos": ([],),
    },
    "part": {"annotations": ([],), "cache_control": (_HINT,), "citations": ([],)},
    "tool": {"cache_control": (_HINT,)},
    "function": {"cache_control": (_HINT,)},
    "call": {"parsed_arguments": (_HINT,), "provider_specific_fields": ({},)},
}


def first_that_asks(where: Where, extra: Mapping[str, Any] | None) -> str | None:
    """The name of the first field whose value asks for something, or None. Null never does."""
    neutral = NEUTRAL[where]
    for name, value in (extra or {}).items():
        allowed = neutral.get(name, ())
        if value is not None and not any(one is _HINT or _same(one, value) for one in allowed):
            return name
    return None


def _same(one: Any, value: Any) -> bool:
    """Whether two JSON values are equal. To Python, 1 and true are too."""
    return isinstance(one, bool) == isinstance(value, bool) and one == value
