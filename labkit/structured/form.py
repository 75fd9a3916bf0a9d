"""The form of one answer as the engine sees it, over what any backend says of it.

Masks are NumPy's until the sampler has them: PyTorch would share such small work out among its threads.

A backend compiles a form once (`CompiledForm`) and then follows each answer (`Matcher`): which tokens may
come next, what follows a token, back again for drafts that were only tried, and which tokens must come.
`AnswerForm` adds what does not depend on the backend: where an answer may end, drafts, and forced tokens.
The sampler asks it what is allowed next, and `Request.append` tells it what came.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from labkit.core.request import Request
from labkit.outputs import in_one_line


@lru_cache(maxsize=1)
def _maker() -> ThreadPoolExecutor:
    """Return the thread that makes masks while the model computes."""
    return ThreadPoolExecutor(1, "masks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_maker.cache_clear)  # threads do not live on in a child


class Matcher(Protocol):
    """Where one answer is in its form."""

    @property
    def may_end(self) -> bool: ...  # whether what is written so far has the form

    @property
    def is_over(self) -> bool: ...  # whether it has, and nothing may follow

    def mask(self) -> np.ndarray: ...  # bool (tokens,): which may come next; those that end answers may not

    def advance(self, token: int) -> bool: ...  # take a token; False, and no change, if it breaks the form

    def rollback(self, count: int) -> None: ...  # take the last tokens back

    def forced(self) -> list[int]: ...  # the tokens that must come next, as the tokenizer writes them


class CompiledForm(Protocol):
    """A form for one vocabulary, which any number of answers share."""

    fewest_tokens: int  # no answer has less, but the shortest may have more

    def start(self) -> Matcher: ...  # at the beginning of an answer


class AnswerForm:
    """What the tokens of one answer may be, one after the other.

    Where the form leaves one text alone, its tokens are those that the tokenizer makes of it: no others are
    allowed there. So the answer is the same whether a step computes one of these tokens or all of them.

    A mask that cannot be made is all False, and `error` says why: only this answer ends with it.

    Args:
        matcher: the answer's place in its form.
        num_tokens: the size of the vocabulary.
        stop_ids: the tokens without text that end the answer; they are allowed where the form is complete.

    Attributes:
        forced: the tokens that must come next, as far as that is known.
        allowed: for each token that was taken since `start`, how many were allowed in its place.
        error: what went wrong when a mask was made; "" if nothing has.
    """

    def __init__(self, matcher: Matcher, num_tokens: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._num_tokens = matcher, num_tokens
        self._stop_ids = sorted(stop_ids)
        self._num_taken = 0
        self.allowed: tuple[int, ...] = ()
        self.error = ""
        self.forced = self._look_ahead(())
        self._drafts: tuple[int, ...] = ()
        self._making = self._submit(())

    def push(self, token: int) -> bool:
        """Take the next token of the answer. Return whether nothing may follow it."""
        masks, place = self._making.result(), len(self.allowed)
        self.allowed += (int(np.count_nonzero(masks[min(place, len(masks) - 1)])),)
        self._num_taken += 1
        if token in self._stop_ids:
            return True
        if not self._matcher.advance(token):
            raise ValueError(f"token {token} breaks the form that the answer must have")
        self.forced = self._look_ahead(self.forced[1:])
        return self._matcher.is_over

    def start(self, drafts: Sequence[int] = ()) -> None:
        """Begin to make the masks of the next step, on a thread: of the next place, and after each draft."""
        if self.allowed or tuple(drafts) != self._drafts:
            self.allowed, self._drafts = (), tuple(drafts)
            self._making = self._submit(self._drafts)

    def allowed_next(self, request: Request) -> Tensor:
        """Return what may come next where a request stands, drafts ahead or not: bool (tokens,)."""
        drafts = tuple(request.output_token_ids[self._num_taken :])
        known = not self.allowed and drafts == self._drafts[: len(drafts)]
        making = self._making if known else self._submit(drafts)  # a model that drafts asks for others
        return torch.from_numpy(making.result()[len(drafts)])

    def _submit(self, drafts: tuple[int, ...]) -> Future[np.ndarray]:
        return _maker().submit(self._masks, drafts)

    def _masks(self, drafts: Sequence[int]) -> np.ndarray:
        """Return which tokens may come next, and after each draft: bool (1 + drafts, tokens).

        After the first draft that breaks the form, the rest say nothing: it will not be accepted.
        """
        rows: list[np.ndarray] = []
        try:
            self._follow(drafts, rows)
        except Exception as error:  # no other request shall suffer
            self.error = in_one_line(error)
            rows.append(np.zeros(self._num_tokens, bool))
        return np.stack(rows + rows[-1:] * (1 + len(drafts) - len(rows)))

    def _follow(self, drafts: Sequence[int], rows: list[np.ndarray]) -> None:
        """Append a row for the next place, and one after each draft that fits, as `push` would go on."""
        forced, taken = self.forced, 0
        try:
            rows.append(self._mask(forced))
            for draft in drafts:
                if not rows[-1][draft] or draft in self._stop_ids or not self._matcher.advance(draft):
                    break
                taken += 1
                if self._matcher.is_over:
                    break
                forced = self._look_ahead(forced[1:])
                rows.append(self._mask(forced))
        finally:
            self._matcher.rollback(taken)

    def _mask(self, forced: Sequence[int]) -> np.ndarray:
        """Return what is allowed where the matcher stands: the first forced token, if there is one."""
        if forced:
            mask = np.zeros(self._num_tokens, bool)
            mask[forced[0]] = True
            return mask
        mask = self._matcher.mask()
        if self._matcher.may_end and self._stop_ids:
            mask = mask.copy()
            mask[self._stop_ids] = True
        if not mask.any():
            raise ValueError("no token of the vocabulary can go on in the form that the answer must have")
        return mask

    def _look_ahead(self, forced: tuple[int, ...]) -> tuple[int, ...]:
        """Return what is forced where the matcher stands, if this is what is left of what was forced."""
        return forced or (() if self._matcher.may_end else tuple(self._matcher.forced()))
