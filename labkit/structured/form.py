"""The form of one answer as the engine sees it, over what any backend says of it.

A backend compiles a form once (`CompiledForm`) and then follows each answer (`Matcher`): which tokens may
come next, what follows a token, back again for drafts that were only tried, and which tokens must come.
`AnswerForm` adds what does not depend on the backend: where an answer may end, drafts, and jump-ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.core.request import Request

Sample = Callable[[Tensor, Sequence[Request]], Any]  # `labkit.core.sampler.sample`
_maker = ThreadPoolExecutor(1, "masks")  # makes masks while the model computes


class Matcher(Protocol):
    """Where one answer is in its form."""

    @property
    def may_end(self) -> bool: ...  # whether what is written so far has the form

    @property
    def is_over(self) -> bool: ...  # whether it has, and nothing may follow

    def mask(self) -> Tensor: ...  # bool (tokens,): which may come next; those that end answers may not

    def advance(self, token: int) -> bool: ...  # take a token; False, and no change, if it breaks the form

    def rollback(self, count: int) -> None: ...  # take the last tokens back

    def forced(self) -> list[int]: ...  # the tokens that must come next, as the tokenizer writes them


class CompiledForm(Protocol):
    """A form for one vocabulary, which any number of answers share."""

    fewest_tokens: int  # no answer has less; 0 if nobody knows

    def start(self) -> Matcher: ...  # at the beginning of an answer


class AnswerForm:
    """What the tokens of one answer may be, one after the other.

    With jump-ahead, a token that the form forces is the only one that its place allows, so that the answer is
    the same whether a step computes one of these tokens or all of them.

    Args:
        matcher: the answer's place in its form.
        stop_ids: the tokens that end it; they are allowed where the form is complete.
        jump_ahead: whether `forced` names the tokens that must come next.

    Attributes:
        forced: the tokens that must come next.
        allowed: for each token that was taken since `start`, how many were allowed in its place.
    """

    def __init__(self, matcher: Matcher, stop_ids: frozenset[int], *, jump_ahead: bool) -> None:
        self._matcher, self._jump_ahead = matcher, jump_ahead
        self._stop_ids = sorted(stop_ids)
        self.forced: tuple[int, ...] = ()
        self._num_taken = 0
        self._look_ahead()
        self.start()

    def push(self, token: int) -> bool:
        """Take the next token of the answer. Return whether nothing may follow it."""
        masks, place = self._making.result(), len(self.allowed)
        self.allowed += (int(masks[min(place, len(masks) - 1)].sum()),)
        self._num_taken += 1
        if token in self._stop_ids:
            return True
        if not self._matcher.advance(token):
            raise ValueError(f"token {token} breaks the form that the answer must have")
        self.forced = self.forced[1:]
        self._look_ahead()
        return self._matcher.is_over

    def start(self, drafts: Sequence[int] = ()) -> None:
        """Begin to make the masks of the next step, on a thread: of the next place, and after each draft."""
        self.allowed: tuple[int, ...] = ()
        self._drafts = tuple(drafts)
        self._making: Future[Tensor] = _maker.submit(self.masks, self._drafts)

    def result(self, request: Request) -> Tensor:
        """Return what is allowed next where a request stands, drafts ahead or not: bool (tokens,)."""
        drafts = tuple(request.output_token_ids[self._num_taken :])
        if drafts != self._drafts[: len(drafts)]:
            self.start(drafts)
        return self._making.result()[len(drafts)]

    def masks(self, drafts: Sequence[int] = ()) -> Tensor:
        """Return which tokens may come next, and after each draft: bool (1 + drafts, tokens).

        After the first draft that breaks the form, the rest say nothing: it will not be accepted.
        """
        rows = [self._mask(0)]
        taken = 0
        for draft in drafts:
            fits = bool(rows[-1][draft]) and self._matcher.advance(draft)
            taken += fits
            if not fits or self._matcher.is_over:
                break
            rows.append(self._mask(taken))
        rows += rows[-1:] * (1 + len(drafts) - len(rows))
        self._matcher.rollback(taken)
        return torch.stack(rows)

    def _mask(self, place: int) -> Tensor:
        """Return what is allowed `place` tokens further on, where the matcher stands."""
        mask = self._matcher.mask()
        if place < len(self.forced):
            mask = torch.zeros_like(mask)
            mask[self.forced[place]] = True
        elif self._matcher.may_end and self._stop_ids:
            mask = mask.clone()
            mask[self._stop_ids] = True
        if not mask.any():
            raise ValueError("no token of the vocabulary can go on in the form that the answer must have")
        return mask

    def _look_ahead(self) -> None:
        if self._jump_ahead and not self.forced:
            self.forced = tuple(self._matcher.forced())


def masked(sample: Sample) -> Sample:
    """Return a sampler that gives each answer only tokens that its form allows."""

    def sample_masked(logits: Tensor, requests: Sequence[Request]) -> Any:
        rows = [row for row, request in enumerate(requests) if request.form is not None]
        if rows:
            allowed = torch.stack([requests[row].form.result(requests[row]) for row in rows])
            logits = logits.clone()
            logits[rows] = logits[rows].masked_fill(~allowed.to(logits.device), -torch.inf)
        return sample(logits, requests)

    return sample_masked
