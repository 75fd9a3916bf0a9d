"""A plan says in one letter what each row amounts to, and counts drafts among its tokens."""

from __future__ import annotations

import pytest

from labkit.core.plan import StepPlan
from labkit.core.request import Request
from labkit.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "computed, cached, answered, num_tokens, kind",
    [
        (0, 0, 0, 6, "p"),  # the whole prompt
        (4, 4, 0, 2, "p"),  # all of it that the prefix cache had not
        (0, 0, 0, 4, "c"),
        (4, 0, 0, 2, "c"),  # its last chunk
        (6, 0, 1, 1, "d"),
        (6, 6, 1, 1, "d"),  # a child of n > 1, whose prompt was computed for it
        (0, 0, 3, 9, "p"),  # back after a preemption
        (0, 0, 0, 0, "i"),
    ],
)
def test_kinds(computed: int, cached: int, answered: int, num_tokens: int, kind: str) -> None:
    request = Request("r", [1] * 6, SamplingParams())
    request.token_ids += [2] * answered
    request.num_computed_tokens, request.num_cached_tokens = computed, cached
    plan = StepPlan()
    plan.add(request, num_tokens)
    assert (plan.kinds, plan.starts, plan.num_tokens) == ([kind], [computed], [num_tokens])


def test_drafts_are_computed_with_the_row_that_they_follow() -> None:
    plan = StepPlan()
    for name in ("a", "b"):
        request = Request(name, [1, 2], SamplingParams())
        request.append(3)
        request.num_computed_tokens = 2
        plan.add(request, 1)
    plan.draft(1, (4, 5))
    assert plan.num_tokens == [1, 3]
    assert plan.drafts == {1: (4, 5)}
    assert plan.kinds == ["d", "d"]
