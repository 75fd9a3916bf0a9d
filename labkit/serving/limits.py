"""What one visitor or client, and all of them together, may ask of the engine that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from labkit.sampling_params import check_number


@dataclass(frozen=True)
class Limits:
    """Bounds on what comes in. None is no bound other than what the engine itself can hold.

    Args:
        requests: the number of requests that one visitor may have under way.
        queue: the number of requests of all visitors under way, whether they run or wait.
        prompt_chars: the characters of a prompt, counted before it is tokenised (some 5,000 English tokens).
        prompt_tokens: the tokens of a prompt, the chat template included.
        answer_tokens: the tokens that a request may ask for.

    Raises:
        ValueError: for a bound below 1; the message names the field.
    """

    requests: int = 64
    queue: int = 512
    prompt_chars: int = 20_000
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "queue", "prompt_chars"):
            check_number(name, getattr(self, name), 1, math.inf, whole=True)
        for name in ("prompt_tokens", "answer_tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, math.inf, whole=True)

    def check_prompt(self, prompt: object) -> None:
        """Raise `ValueError`, in words for the person who typed it, unless a prompt can be taken."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("The prompt is empty: type something, or pick an example.")
        if len(prompt) > self.prompt_chars:
            raise ValueError(
                f"The prompt is too long: it has {len(prompt):,} characters, and the limit is "
                f"{self.prompt_chars:,}."
            )

    def check_tokens(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise as `check_prompt` does unless prompt and answer are short enough."""
        if self.prompt_tokens is not None and num_prompt_tokens > self.prompt_tokens:
            raise ValueError(
                f"The prompt is too long for this lab: it has {num_prompt_tokens:,} tokens, and the limit is "
                f"{self.prompt_tokens:,}."
            )
        if self.answer_tokens is not None and max_tokens > self.answer_tokens:
            raise ValueError(
                f"Max tokens is {max_tokens:,}, and the limit of this lab is {self.answer_tokens:,}."
            )

    def check_room(self, own: int, everybody: int, more: int = 1) -> None:
        """Raise as `check_prompt` does unless a visitor with `own` requests under way may add `more`.

        Several that come together, such as a preset, may be more than a visitor's limit if nothing else of
        theirs is under way: else it could never be played.
        """
        if more > self.queue:
            raise ValueError(f"This needs {more} requests, and the lab takes {self.queue} of all at a time.")
        if own and own + more > self.requests:
            needs = f"This needs {more} requests. " if more > 1 else ""
            until = "all of yours have" if more > self.requests else "one has" if more == 1 else "some have"
            raise ValueError(
                f"{needs}You have {own} requests under way, and {self.requests} is the limit: wait until "
                f"{until} ended, or cancel some."
            )
        if everybody + more > self.queue:
            needs = f"this needs {more}, and " if more > 1 else ""
            raise ValueError(
                f"The lab is full: {needs}{everybody} requests are under way, and {self.queue} is the limit. "
                "Wait a moment, and inject again."
            )
