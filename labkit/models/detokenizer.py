"""Tokens to text while they are sampled.

A token can end in the middle of a character, and a text in the middle of a stop string. What could still
change is held back, so that a reader never sees anything that must be taken back. Nothing is lost at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from labkit.models.token_bytes import TokenBytes


class IncrementalDetokenizer:
    """The text of one answer, growing by a token at a time. What has been shown is final.

    The text is what the answer adds to the text of its prompt: `decode` of both without that of the prompt,
    special tokens skipped if so asked. It differs where `decode` takes back what it said of fewer tokens:
    - if a run of byte tokens (`<0xE2>`) is not text throughout, `decode` turns each of its bytes into U+FFFD;
      here the characters in it that are whole stay;
    - if the prompt ends in the middle of a character, the answer does not complete it, but has U+FFFD;
    - where tokens that stand next to each other rewrite one another's text, the earlier one stays as it was.

    Args:
        tokenizer: a tokenizer of any kind.
        stop: strings that end the answer.
        before: the tokens of the prompt.
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
        before: Sequence[int] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._bytes = TokenBytes(tokenizer, before, skip_special_tokens=skip_special_tokens)
        self._utf8 = self._bytes.utf8()
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._early = 0  # how many of the first characters are too early for a stop string to end in
        self._num_tokens = 0
        self._decoded = ""  # all whole characters so far
        self._bad = ""  # after them: bytes that are no text, shown when text follows
        self._searched = 0  # no stop string begins before this place
        self._stopped = False
        self.text = ""

    def push(self, token: int) -> bool:
        """Take the next token. Return whether it completes a stop string, where the text then ends."""
        self._num_tokens += 1
        piece = self._bad + self._utf8.decode(self._bytes.push(token))
        whole = piece.rstrip("\ufffd")
        self._bad = piece[len(whole) :]
        self._decoded += whole
        if not self._stop:  # nothing to look for
            self.text = self._decoded
            return False
        return self._show(final=False)

    def finish(self) -> bool:
        """Let out what was held back, as no more tokens come. Return whether that completes a stop string."""
        if self._stopped:
            return True
        self._decoded += self._bad + self._utf8.decode(self._bytes.finish(), final=True)
        self._bad = ""
        return self._show(final=True)

    def _show(self, *, final: bool) -> bool:
        """Move `text` on as far as it may be shown. Return whether a stop string was found."""
        if self._num_tokens <= self._min_tokens:
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
