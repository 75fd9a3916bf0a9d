"""JSON schemas and grammars, by llguidance: an Earley parser over tokens, in Rust.

It refuses what it cannot promise, which is why it is here (`README.md` compares it). JSON is written with one
space after a comma and a colon, and nowhere else: small models that may write spaces go on writing them.
"""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from labkit.structured.dates import with_real_dates
from labkit.structured.shortest import fewest_bytes
from labkit.structured.vocabulary import Vocabulary

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_HEAD = '%llguidance {"no_forcing": true}\n'  # masks show all that is allowed, and not only what it prefers
_PLACE = re.compile(r"(?:at )?(\d+)\(\d+\): (?:failed to compile JSON schema: )?")


def library() -> ModuleType:
    """Return llguidance. Raises `ValueError` if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "structured: JSON schemas, grammars and tools need llguidance: pip install llguidance "
            "(a choice and a regular expression do without)"
        ) from None
    return llguidance


def json_grammar(schema: str) -> str:
    """Return the part of a grammar that stands for JSON of a schema. Raises as `Guidance.compile` does."""
    tree = json.loads(schema)
    if isinstance(tree, bool):
        tree = {} if tree else {"enum": []}
    try:
        return f"%json {json.dumps(with_real_dates(tree) | {'x-guidance': SPACING})}"
    except RecursionError:
        raise ValueError("structured: json: the schema is nested too deeply") from None


class Guidance:
    """Compiles grammars for a vocabulary.

    Args:
        vocabulary: the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @cached_property
    def tokenizer(self) -> Any:
        """The vocabulary as the library has it."""
        library()
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Tokens(self._vocabulary)))

    def compile(self, kind: str, text: str) -> GuidedForm:
        """Return the form of a JSON schema ("json") or a Lark grammar ("grammar").

        Raises:
            ValueError: for what is no schema or grammar, or is not supported; the message names the part.
        """
        grammar = f"start: {json_grammar(text)}" if kind == "json" else text
        matcher = library().LLMatcher(self.tokenizer, _HEAD + grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"structured: {kind}: {_reason(matcher.get_error(), kind)}")
        least = fewest_bytes(json.loads(text)) if kind == "json" else 0
        if least == math.inf:
            raise ValueError(f"structured: {kind}: no answer of this schema ends: it requires itself")
        fewest = math.ceil(least / self._vocabulary.longest)
        return GuidedForm(matcher, len(self._vocabulary.tokens), fewest)


class _Tokens:
    """What the library asks of a tokenizer. The token that ends texts is one that no model has."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = len(vocabulary.tokens)
        self.tokens = [*vocabulary.tokens, b""]
        self.special_token_ids = [token for token, data in enumerate(self.tokens) if not data]
        self.bos_token_id = None
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.encode() if isinstance(text, str) else text)


class GuidedForm:
    """A compiled grammar; `start` begins an answer."""

    def __init__(self, matcher: Any, num_tokens: int, fewest_tokens: int) -> None:
        self._matcher, self._num_tokens, self.fewest_tokens = matcher, num_tokens, fewest_tokens

    def start(self) -> GuidedMatcher:
        """Return a matcher of one answer, at its beginning."""
        return GuidedMatcher(self._matcher.deep_copy(), self._num_tokens)


class GuidedMatcher:
    """Where an answer is in a grammar: a `Matcher`."""

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher, self._num_tokens = matcher, num_tokens

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little", count=self._num_tokens).view(bool)

    def advance(self, token: int) -> bool:
        fits = self._matcher.try_consume_tokens([token]) == 1
        self._check()
        return fits

    def rollback(self, count: int) -> None:
        if count:
            self._matcher.rollback(count)
            self._check()

    def forced(self) -> list[int]:
        self._matcher.compute_ff_bytes()  # without it, there are no tokens (llguidance 1.9.1)
        return self._matcher.compute_ff_tokens()

    def _check(self) -> None:
        if self._matcher.is_error():  # it stays in its errors, and raises none
            raise ValueError(f"structured: {_reason(self._matcher.get_error())}")


def _reason(message: str, kind: str = "json") -> str:
    """Return the part of the library's message that says what is wrong, and in which line of a grammar."""
    first, *more = message.splitlines() or [message]
    place = _PLACE.match(first)
    said = " ".join([_PLACE.sub("", first), *(line for line in more if line.startswith("error: "))])
    return f"line {int(place[1]) - 1}: {said}" if place and kind == "grammar" else said  # _HEAD has a line
