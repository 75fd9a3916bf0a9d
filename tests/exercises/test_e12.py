"""The exercise of notebook 12: wrong routers are refused for what is wrong, right ones run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from labkit.analysis.capacity.replay import least_loaded, prefix_aware
from labkit.exercises import e12, judge
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- wrong -----------------------------------------------------------------------------------------


def always_the_first(request: Any, replicas: Any) -> Any:
    return 0


def in_turn() -> Callable[..., Any]:
    turns = itertools.count()
    return lambda request, replicas: next(turns) % len(replicas)


def only_those_who_run(request: Any, replicas: Any) -> Any:
    return min(range(len(replicas)), key=lambda i: replicas[i].num_running)


def only_those_who_wait(request: Any, replicas: Any) -> Any:
    return min(range(len(replicas)), key=lambda i: (replicas[i].num_waiting, replicas[i].num_running))


def load_before_cache(request: Any, replicas: Any) -> Any:
    return min(
        range(len(replicas)),
        key=lambda i: (replicas[i].num_unfinished, -replicas[i].num_cached_tokens(request)),
    )


def cache_before_all(request: Any, replicas: Any) -> Any:
    return max(
        range(len(replicas)),
        key=lambda i: (replicas[i].num_cached_tokens(request), -replicas[i].num_unfinished),
    )


def less_than_four(request: Any, replicas: Any) -> Any:
    least = min(replica.num_unfinished for replica in replicas)
    near = [i for i, replica in enumerate(replicas) if replica.num_unfinished < least + 4]
    return max(near, key=lambda i: (replicas[i].num_cached_tokens(request), -replicas[i].num_unfinished))


def first_of_the_cached(request: Any, replicas: Any) -> Any:
    least = min(replica.num_unfinished for replica in replicas)
    near = [i for i, replica in enumerate(replicas) if replica.num_unfinished <= least + 4]
    if not any(replicas[i].num_cached_tokens(request) for i in near):
        return least_loaded(request, replicas)
    return max(near, key=lambda i: replicas[i].num_cached_tokens(request))


def cached_or_not(request: Any, replicas: Any) -> Any:
    """Does not ask how much is cached."""
    least = min(replica.num_unfinished for replica in replicas)
    near = [i for i, replica in enumerate(replicas) if replica.num_unfinished <= least + 4]
    return min(near, key=lambda i: (not replicas[i].num_cached_tokens(request), replicas[i].num_unfinished))


def all_or_nothing(request: Any, replicas: Any) -> Any:
    """Where the best is too busy, it forgets the second best."""
    best = cache_before_all(request, replicas)
    least = least_loaded(request, replicas)
    far = replicas[best].num_unfinished > replicas[least].num_unfinished + 4
    return least if far else best


def the_replica_itself(request: Any, replicas: Any) -> Any:
    return replicas[prefix_aware(request, replicas)]


def adds_it(request: Any, replicas: Any) -> Any:
    replicas[0].add(request, 0.0)
    return 0


def sorts_them(request: Any, replicas: Any) -> Any:
    replicas.sort(key=lambda replica: -replica.num_unfinished)
    return prefix_aware(request, replicas)


def counts_from_one(request: Any, replicas: Any) -> Any:
    return prefix_aware(request, replicas) + 1


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (always_the_first, "choose the one with the fewest unfinished requests"),
        (in_turn(), "where no replica has the prompt cached"),
        (only_those_who_run, "those that run and those that wait"),
        (only_those_who_wait, "those that run and those that wait"),
        (
            least_loaded,
            "of replicas with equally many requests, choose the one with most of the prompt cached",
        ),
        (load_before_cache, "cached tokens are worth some more requests"),
        (cache_before_all, "never choose a replica with over 4 requests more"),
        (less_than_four, "up to 4 more than the least loaded replica has"),
        (first_of_the_cached, "of replicas with equally much cached"),
        (cached_or_not, "the one with most of the prompt cached"),
        (all_or_nothing, "the cache of the others still counts"),
        (the_replica_itself, "return the index of a replica"),
        (counts_from_one, "return the index of a replica"),
        (adds_it, "a router only says where a request goes"),
        (sorts_them, "leave the request and the list of replicas as they are"),
    ],
)
def test_wrong_routers_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("12.1", function, rule)


# -- right -----------------------------------------------------------------------------------------


def in_a_loop(request: Any, replicas: Any) -> Any:
    loads = [replica.num_running + replica.num_waiting for replica in replicas]
    best, found = None, None
    for i, replica in enumerate(replicas):
        if loads[i] - min(loads) > 4:
            continue
        score = (replica.num_cached_tokens(request), -loads[i])
        if found is None or score >= found:  # of equals, the last
            best, found = i, score
    return best


@pytest.mark.parametrize("function", [prefix_aware, in_a_loop])
def test_right_routers_run_in_the_replay(function: Callable[..., Any]) -> None:
    verdict = assert_accepted("12.1", function)
    assert "4 replicas served 600 requests with it" in verdict.text
    assert [caption for caption, _ in verdict.pictures] == ["How long the unlucky wait:", "Why:"]
    assert "round robin" in repr(verdict.pictures[0][1])


def test_the_folded_solution_is_right() -> None:
    assert_accepted("12.1", function_from(solution("12", "12.1"), "route"))


def test_an_untouched_stub_is_open() -> None:
    def route(request: Any, replicas: Any) -> int:
        raise NotImplementedError

    assert_open("12.1", route)


def test_what_a_message_shows_is_the_smallest_case() -> None:
    text = judge("12.1", load_before_cache).text
    assert "replica 1: 1 running, 0 waiting, 32 tokens cached" in text
    assert "yours: 0\n  right: 1" in text


def test_the_reference_wins_where_it_is_run() -> None:
    """Otherwise the picture shows nothing."""
    late = {name: e12.serve(name).percentile("ttft", 95) for name in ("prefix-aware", "round-robin")}
    assert late["prefix-aware"] < 0.5 * late["round-robin"]
