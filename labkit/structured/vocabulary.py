"""The vocabulary of a model as structured output needs it: what each token writes, and what text becomes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from labkit.models.token_bytes import TokenBytes
from labkit.structured.trie import Trie

_RECENT = 4  # tokens of the answer before forced text that it is made into tokens with


class Vocabulary:
    """The tokens of a model.

    Args:
        tokenizer: the model's tokenizer.
        size: how many logits the model has; tokens that the tokenizer does not know write nothing.
        special: tokens that end answers, whatever they write.

    Attributes:
        tokens: the bytes that each token adds inside of a text; none for special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, special: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        before = tokenizer.encode("a", add_special_tokens=False)
        reader = TokenBytes(tokenizer, before)
        known = min(size, len(tokenizer))
        self.tokens = [reader.peek(token) for token in range(known)] + [b""] * (size - known)
        for token in special:
            self.tokens[token] = b""

    @cached_property
    def trie(self) -> Trie:
        """The tokens by their bytes."""
        return Trie(self.tokens)

    @cached_property
    def single_bytes(self) -> frozenset[int]:
        """The bytes that have a token of their own: what these can write, can always be completed."""
        return frozenset(token[0] for token in self.tokens if len(token) == 1)

    @cached_property
    def longest(self) -> int:
        """The bytes of the longest token."""
        return max(map(len, self.tokens))

    def canonical(self, before: Sequence[int], forced: bytes, follows: frozenset[int]) -> list[int]:
        """Return the tokens of forced text that are the same whatever comes next.

        They are those into which the tokenizer cuts the text, as it has cut all that the model has learnt
        from. What might be one token with the bytes that follow is left to the model, and all of it if the
        tokens before are not what the tokenizer makes of them.

        Args:
            before: the tokens of the answer so far.
            forced: the bytes that must come next.
            follows: the bytes that may come after these.
        """
        recent = list(before[-_RECENT:])
        text = self.written(recent) + forced
        kept = self.encode(text)
        for end in self.trie.open_ends(text, follows):  # a token may begin there and reach what follows
            pairs = zip(kept, self.encode(text[:end]), strict=False)
            kept = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if kept[: len(recent)] != recent or not text.startswith(self.written(kept)):
            return []
        return kept[len(recent) :]

    def written(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of some tokens in the middle of a text."""
        return b"".join(self.tokens[token] for token in tokens)

    def encode(self, text: bytes) -> list[int]:
        """Return the tokens of a text, without the character that is open at its end."""
        return list(self.tokenizer.encode(text.decode(errors="ignore"), add_special_tokens=False))
