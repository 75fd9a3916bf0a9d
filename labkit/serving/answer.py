"""One answer while the engine writes it, in the forms in which others read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from labkit.outputs import FinishReason, RequestOutput, TokenLogprobs


class Piece(NamedTuple):
    """What is new of an answer since the piece before."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    error: str | None


class AnswerProgress(NamedTuple):
    """How far an answer is after the latest step."""

    text: str
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: FinishReason | None
    error: str | None


@dataclass(eq=False, slots=True)
class Answer:
    """The engine's own output, which may change at any moment, and what of it the latest step published.

    Args:
        output: the engine's output; a blank one until the engine has seen the request.
        family: the ids of all answers to the same prompt; the first is that of the request itself.
    """

    output: RequestOutput
    family: tuple[str, ...]
    text: str = ""
    num_tokens: int = 0
    finished: bool = False
    wakers: set[Callable[[], object]] = field(default_factory=set)  # each is called once, at the next news

    @property
    def ends_with(self) -> tuple[str, ...]:
        """The ids of the answers that end when this one is aborted: all of the family if it is the first."""
        own = self.output.request_id
        return self.family if own == self.family[0] else (own,)

    def snapshot(self) -> RequestOutput:
        """A copy that never changes: the state at the end of a step, not in the middle of one."""
        output, count = self.output, self.num_tokens
        prompts = output.prompt_logprobs if count else None  # until the first token comes, they grow
        return replace(
            output,
            token_ids=output.token_ids[:count],
            text=self.text,
            finish_reason=output.finish_reason if self.finished else None,
            metrics=replace(output.metrics, token_times=output.metrics.token_times[:count]),
            logprobs=None if output.logprobs is None else output.logprobs[:count],
            prompt_logprobs=prompts,
        )

    def snapshots(self, changed: threading.Condition) -> Iterator[RequestOutput]:
        """Snapshots as it grows, the finished one last; waits between them. `changed` guards the answer."""
        news, seen, snapshot = threading.Event(), -1, None
        while snapshot is None or not snapshot.finished:
            with changed:
                snapshot = self.snapshot() if self.finished or self.num_tokens > seen else None
                if snapshot is None:
                    news.clear()
                    self.wakers.add(news.set)
            if snapshot is None:
                news.wait()
            else:
                yield snapshot
                seen = len(snapshot.token_ids)

    def progress(self) -> AnswerProgress:
        """The part of it that grows, without a copy."""
        output = self.output
        reason = output.finish_reason if self.finished else None
        return AnswerProgress(self.text, self.num_tokens, len(output.prompt_token_ids), reason, output.error)


@dataclass
class Cursor:
    """How far a reader has come in one of several answers."""

    index: int
    answer: Answer
    characters: int = 0
    num_tokens: int = 0
    at_end: bool = False
