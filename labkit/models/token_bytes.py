"""The bytes that a token adds to a text, after the tokens that stand before it.

The text of a token depends on its place. Where a space belongs to the word after it, most tokenizers drop the
one at the start of a text and write it anywhere else; a token of a single byte is a part of a character. So
no token is decoded alone: what counts is the difference that it makes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}  # as byte-level tokenizers write bytes
_BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")  # and as those do that fall back to bytes
_MOST_PENDING = 8  # tokens without text of their own that are kept in case a later one shows it


def _one_for_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):  # for bytes alone
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("labkit.one-for-each-byte", _one_for_each_byte)


class TokenBytes:
    """The bytes that tokens add to a text, one token after the other.

    Args:
        tokenizer: a tokenizer of any kind.
        before: the tokens that stand before the first, as a prompt stands before its answer.
        skip_special_tokens: whether special tokens add nothing, and not their names.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        decoders = _decoders_of(self._backend)
        self._byte_level = decoders == {"ByteLevel"}
        self._byte_fallback = "ByteFallback" in decoders
        # Where nobody says how the bytes of a character are written, U+FFFD at the end may be half of one.
        self._opaque = not self._byte_level and (self._backend is None or "ByteLevel" in decoders)
        self._before: tuple[int, ...] = () if self._byte_level else self._tail(before)
        self._text = self._decode(self._before)  # what `_before` says alone
        self._pending: tuple[int, ...] = ()  # tokens after it, which have added nothing so far

    def utf8(self) -> codecs.IncrementalDecoder:
        """Return what turns these bytes into text, with U+FFFD where the tokenizer writes it."""
        errors = "labkit.one-for-each-byte" if self._byte_fallback else "replace"
        return codecs.getincrementaldecoder("utf-8")(errors)

    def peek(self, token: int) -> bytes:
        """Return what a token would add if it came next."""
        own = self._own_bytes(token)
        return self._added(token).encode() if own is None else own

    def push(self, token: int) -> bytes:
        """Return what the next token adds."""
        own = self._own_bytes(token)
        if self._byte_level:
            return own or b""
        added = self._added(token).encode() if own is None else own
        if not added and self.is_special(token):
            return b""
        half = self._opaque and added.endswith("\ufffd".encode())
        if (half or not added) and len(self._pending) < _MOST_PENDING:
            self._pending += (token,)
            return b""
        if added:
            self._before = (*self._pending, token)
            self._text = self._decode(self._before)
        self._pending = ()
        return added

    def finish(self) -> bytes:
        """Return what was kept back, as no more tokens come."""
        kept, self._pending = self._pending, ()
        return self._difference(kept).encode() if self._opaque and kept else b""

    def is_special(self, token: int) -> bool:
        """Return whether a token is left out of texts though it has a name."""
        return not self._decode([token]) and bool(self._decode([token], skip=False))

    def _own_bytes(self, token: int) -> bytes | None:
        """Return a token's bytes if they are the same wherever it stands, otherwise None."""
        if not (self._byte_level or self._byte_fallback):
            return None
        name = self._backend.id_to_token(token)
        if self._byte_level:
            if name is None or not self._decode([token]):
                return b""
            known = all(char in _BYTE_OF for char in name)  # an added token is written as it is
            return bytes(_BYTE_OF[char] for char in name) if known else name.encode()
        match = _BYTE_NAME.fullmatch(name or "")
        if not match:
            return None
        byte = int(match[1], 16)
        at_start = not self._before and not self._pending
        return None if at_start and byte < 0x80 else bytes([byte])  # a space at the start may be dropped

    def _added(self, token: int) -> str:
        return self._difference((*self._pending, token))

    def _difference(self, tokens: Sequence[int]) -> str:
        """Return what tokens add to what stands before; nothing of that is taken back."""
        whole = self._decode((*self._before, *tokens))
        if whole.startswith(self._text):
            return whole[len(self._text) :]
        pairs = enumerate(zip(self._text, whole, strict=False))
        return whole[next((place for place, (old, new) in pairs if old != new), len(whole)) :]

    def _tail(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the last few tokens, and as many as it takes to have some text among them."""
        size = 4
        while size < len(tokens) and not self._decode(tokens[-size:]):
            size *= 2
        return tuple(token for token in tokens[-size:] if not self.is_special(token))

    def _decode(self, tokens: Sequence[int], *, skip: bool | None = None) -> str:
        skip = self._skip if skip is None else skip
        if self._backend is not None:
            return self._backend.decode(list(tokens), skip_special_tokens=skip)
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def decode_inside(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Return a `decode` for tokens out of the middle of a text: the space before a word stays."""
    decoders = _decoders_of(getattr(tokenizer, "backend_tokenizer", None))
    if not decoders or decoders == {"ByteLevel"}:
        return tokenizer.decode  # type: ignore[return-value]
    before = list(tokenizer.encode("a", add_special_tokens=False))
    length = len(tokenizer.decode(before))
    return lambda tokens: tokenizer.decode([*before, *tokens])[length:]  # type: ignore[return-value]


def _decoders_of(backend: Any) -> set[str]:
    """Return the names of the decoders that a backend runs one after the other."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return set()
    names, unread = set(), [json.loads(decoder.__getstate__())]
    while unread:
        each = unread.pop()
        if each["type"] == "Sequence":
            unread += each["decoders"]
        else:
            names.add(each["type"])
    return names
