"""An automaton over bytes, lifted to tokens: which tokens of the vocabulary may come next.

The vocabulary is a trie: tokens that begin alike share a path from its root. From a state of the automaton
the trie is walked level by level, all of its nodes at once; a token is allowed if the path of its bytes stays
among the living states. What a state allows is worked out once (as Willard and Louf 2023 index tokens).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from labkit.structured.regex_dfa import ByteDFA, regex_dfa
from labkit.structured.vocabulary import Vocabulary

_MOST_MASKS = 512  # that are kept; each takes a byte for each token
_MOST_FORCED = 256  # bytes that are forced at once


class TokenDFA:
    """A regular expression over the tokens of a vocabulary; `start` begins an answer.

    Args:
        pattern: the expression.
        vocabulary: the vocabulary.

    Raises:
        ValueError: as `regex_dfa` does, or if the vocabulary can write no text that matches.
    """

    def __init__(self, pattern: str, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.dfa: ByteDFA = regex_dfa(pattern, vocabulary.single_bytes)
        if not self.dfa.start:
            raise ValueError("structured: no answer that this model can write has this form")
        self._trie = vocabulary.trie  # made here, where no step waits for it
        self.mask = lru_cache(_MOST_MASKS)(self._mask)

    @property
    def fewest_tokens(self) -> int:
        """The least tokens of an answer: no token has more bytes than the longest."""
        return -(-self.dfa.shortest // self.vocabulary.longest)

    def start(self) -> TokenMatcher:
        """Return a matcher of one answer, at its beginning."""
        return TokenMatcher(self)

    def _mask(self, state: int) -> np.ndarray:
        return self._trie.walk(self.dfa.table, state) > 0

    def forced_bytes(self, state: int) -> tuple[bytes, frozenset[int]]:
        """Return the bytes that must follow a state, up to a choice, and those that it is among."""
        forced = bytearray()
        while True:
            nexts = self.dfa.table[state].nonzero()[0].tolist()
            if len(nexts) != 1 or self.dfa.accepting[state] or len(forced) == _MOST_FORCED:
                return bytes(forced), frozenset(nexts)
            forced += bytes(nexts)
            state = self.dfa.table[state, nexts[0]]


class TokenMatcher:
    """Where an answer is in the automaton: a `Matcher` whose history is the states so far."""

    def __init__(self, form: TokenDFA) -> None:
        self._form, self._dfa = form, form.dfa
        self._states = [form.dfa.start]
        self._tokens: list[int] = []

    @property
    def may_end(self) -> bool:
        return bool(self._dfa.accepting[self._states[-1]])

    @property
    def is_over(self) -> bool:
        return self.may_end and not self._dfa.table[self._states[-1]].any()

    def mask(self) -> np.ndarray:
        return self._form.mask(self._states[-1])

    def advance(self, token: int) -> bool:
        state = self._states[-1]
        for byte in self._form.vocabulary.tokens[token]:
            state = int(self._dfa.table[state, byte])
        if not state or not self._form.vocabulary.tokens[token]:
            return False
        self._states.append(state)
        self._tokens.append(token)
        return True

    def rollback(self, count: int) -> None:
        if count:
            del self._states[-count:], self._tokens[-count:]

    def forced(self) -> list[int]:
        forced, follows = self._form.forced_bytes(self._states[-1])
        return self._form.vocabulary.canonical(self._tokens, forced, follows) if forced else []
