"""Tokens to text while they are sampled.

A token can end in the middle of a character, and a text in the middle of a stop string. What could still
change is held back, so that a reader never sees anything that must be taken back. Nothing is lost at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class IncrementalDetokenizer:
    """The text of one answer, growing by a token at a time.

    Args:
        tokenizer: a tokenizer; the finished text equals what its `decode` says.
        stop: strings that end the answer.
        min_tokens: the number of tokens before which none ends it: it must end in the text of a later one.
        keep_stop: whether the text ends after the stop string, and not before it.
        skip_special_tokens: whether special tokens are left out.

    Attributes:
        text: what may be shown so far.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._early = 0  # how many of the first characters are too early for a stop string to end in
        self._token_ids: list[int] = []
        self._decoded = ""  # all whole characters so far
        self._searched = 0  # no stop string begins before this place
        self._stopped = False
        self.text = ""

    def push(self, token: int) -> bool:
        """Take the next token. Return whether it completes a stop string, where the text then ends."""
        self._token_ids.append(token)
        self._decoded += self._piece(token)
        if not self._stop:  # nothing to look for
            self.text = self._decoded
            return False
        return self._show(final=False)

    def finish(self) -> bool:
        """Let out what was held back, as no more tokens come. Return whether that completes a stop string."""
        if self._stopped:
            return True
        self._decoded = self._decode_all()
        return self._show(final=True)

    def _piece(self, token: int) -> str:
        """Return the characters that a token completes."""
        if self._backend is None:  # not a fast tokenizer: decode all, and wait while a character is open
            whole = self._decode_all()
            return "" if whole.endswith("\ufffd") else whole[len(self._decoded) :]
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception as error:
            # The stream gives up at bytes that are no text: from here on, decode the whole answer each time.
            if "prefix" not in str(error):
                raise
            self._backend = None
            return self._piece(token)

    def _decode_all(self) -> str:
        return self._tokenizer.decode(
            self._token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _show(self, *, final: bool) -> bool:
        """Move `text` on as far as it may be shown. Return whether a stop string was found."""
        if len(self._token_ids) <= self._min_tokens:
            self._early = len(self._decoded)
        begins = [max(self._searched, self._early - len(stop) + 1) for stop in self._stop]
        places = [self._decoded.find(stop, begin) for stop, begin in zip(self._stop, begins, strict=True)]
        found = min((place for place in places if place >= 0), default=-1)
        if found >= 0:
            kept = len(self._stop[places.index(found)]) if self._keep_stop else 0
            self._decoded = self.text = self._decoded[: found + kept]
            self._stopped = True
            return True
        held = 0 if final else self._head_of_stop()
        self._searched = len(self._decoded) - held
        self.text = self._decoded[: self._searched]
        return False

    def _head_of_stop(self) -> int:
        """Return how many of the last characters may turn out to begin a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._decoded)), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self._stop):
                return length
        return 0
