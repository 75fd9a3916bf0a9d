"""What visitors may ask, and the words in which more is refused."""

from __future__ import annotations

import pytest

from labkit.serving.limits import Limits


@pytest.mark.parametrize("field", ["requests", "queue", "prompt_chars", "prompt_tokens", "answer_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many"])
def test_a_bound_that_cannot_be(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        Limits(**{field: value})


def test_at_the_bound_and_one_beyond() -> None:
    limits = Limits(requests=2, queue=5, prompt_chars=10, prompt_tokens=4, answer_tokens=8)
    limits.check_prompt("x" * 10)
    limits.check_tokens(4, 8)
    limits.check_room(1, 4)
    limits.check_room(0, 3, more=2)
    limits.check_room(0, 0, more=5)  # together, and alone
    for check, message in (
        (lambda: limits.check_prompt("x" * 11), "it has 11 characters, and the limit is 10"),
        (lambda: limits.check_prompt(" "), "The prompt is empty"),
        (lambda: limits.check_tokens(5, 8), "it has 5 tokens, and the limit is 4"),
        (lambda: limits.check_tokens(4, 9), "Max tokens is 9, and the limit of this lab is 8"),
        (lambda: limits.check_room(2, 4), "You have 2 requests under way, and 2 is the limit"),
        (lambda: limits.check_room(1, 1, more=2), "needs 2 requests. You have 1 .* 2 is .* until some have"),
        (lambda: limits.check_room(1, 1, more=3), "This needs 3 requests. .* until all of yours have ended"),
        (lambda: limits.check_room(0, 0, more=6), "This needs 6 requests, and the lab takes 5 of all"),
        (lambda: limits.check_room(0, 1, more=5), "The lab is full: this needs 5, and 1 requests"),
        (lambda: limits.check_room(0, 5), "The lab is full: 5 requests are under way"),
    ):
        with pytest.raises(ValueError, match=message):
            check()
