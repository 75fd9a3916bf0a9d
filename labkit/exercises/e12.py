"""The exercise of notebook 12: decide which replica a request goes to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from labkit import notebook
from labkit.analysis.capacity import GPUS, MODELS, Replay, Roofline, Settings, draw_demands, replay
from labkit.analysis.capacity.replay import SLACK, prefix_aware
from labkit.core.request import Request
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import whole
from labkit.sampling_params import SamplingParams

Route = Callable[[Request, Sequence[Any]], int]

_PAGE = 16


class StandIn:
    """A stand-in for a replica, with the numbers that a router may ask for.

    Args:
        running: number of requests that run.
        waiting: number of requests that wait.
        cached: number of tokens of the prompt in its prefix cache.
    """

    def __init__(self, running: int, waiting: int = 0, cached: int = 0) -> None:
        self.num_running, self.num_waiting, self._cached = running, waiting, cached
        self.num_unfinished = running + waiting
        self.num_free_blocks = 100 - running

    def num_cached_tokens(self, request: Request) -> int:
        return self._cached

    def add(self, request: Request, now: float = 0.0) -> None:
        raise Wrong("a router only says where a request goes: its caller adds it", "it called `add`")

    def __repr__(self) -> str:
        return f"{self.num_running} running, {self.num_waiting} waiting, {self._cached} tokens cached"


# -- what is right ---------------------------------------------------------------------------------

_LEAST = "where no replica has the prompt cached, choose the one with the fewest unfinished requests"
_WAITING = "unfinished requests are those that run and those that wait"
_CACHED = "of replicas with equally many requests, choose the one with most of the prompt cached"
_WORTH = f"cached tokens are worth some more requests: up to {SLACK} more than the least loaded replica has"
_FAR = f"never choose a replica with over {SLACK} requests more than the least loaded one, whatever is cached"
_SECOND = "where the replica with most cached has too many requests, the cache of the others still counts"
_TIE = "of replicas with equally much cached, choose the one with the fewest unfinished requests"

# The rule, and replicas as (running, waiting, cached), the smallest case first.
_CASES: tuple[tuple[str, tuple[tuple[int, int, int], ...]], ...] = (
    (_LEAST, ((0, 0, 0),)),
    (_LEAST, ((1, 0, 0), (0, 0, 0))),
    (_LEAST, ((0, 0, 0), (1, 0, 0))),
    (_LEAST, ((1, 0, 0), (2, 0, 0), (0, 0, 0))),
    (_WAITING, ((2, 3, 0), (4, 0, 0))),
    (_WAITING, ((5, 0, 0), (1, 2, 0))),
    (_CACHED, ((2, 0, 0), (2, 0, 32))),
    (_CACHED, ((2, 0, 16), (2, 0, 48), (2, 0, 32))),
    (_WORTH, ((0, 0, 0), (1, 0, 32))),
    (_WORTH, ((3, 0, 16), (1, 0, 0))),
    (_WORTH, ((4, 0, 0), (4, 4, 64), (6, 0, 0))),
    (_FAR, ((0, 0, 0), (5, 0, 64))),
    (_FAR, ((8, 9, 64), (12, 0, 0), (13, 0, 0))),
    (_SECOND, ((3, 0, 0), (5, 3, 64), (7, 0, 32))),
    (_TIE, ((3, 0, 32), (1, 0, 32), (2, 0, 32))),
    (_TIE, ((0, 0, 0), (4, 0, 32), (3, 0, 32), (9, 0, 32))),
    (_WAITING, ((0, 6, 64), (1, 0, 0))),
)


def _examine(function: Callable[..., Any]) -> None:
    for rule, sizes in _CASES:
        _ask(function, rule, sizes)
    for turn in range(60):  # many at once, in any order
        sizes = tuple(
            ((turn * 7 + i * 5) % 9, (turn + i) % 4, (turn * 3 + i * 11) % 5 * _PAGE) for i in range(5)
        )
        _ask(function, f"{_CACHED}; {_FAR}", sizes)
    rng = random.Random(12)
    for _ in range(200):
        most = rng.randrange(1, 14)
        sizes = tuple(
            (rng.randrange(most), rng.randrange(most), rng.randrange(80)) for _ in range(rng.randrange(1, 9))
        )
        _ask(function, f"{_CACHED}; {_FAR}", sizes)


def _ask(function: Callable[..., Any], rule: str, sizes: tuple[tuple[int, int, int], ...]) -> None:
    replicas = [StandIn(*size) for size in sizes]
    request = Request("7", [5] * 80, SamplingParams(max_tokens=16))
    given = list(replicas)
    returned = function(request, given)
    told = "\n".join(f"replica {i}: {replica}" for i, replica in enumerate(replicas))
    told += f"\nyours: {returned!r}"
    same = [(replica.num_running, replica.num_waiting, replica.num_unfinished) for replica in replicas]
    untouched = given == replicas and request.token_ids == [5] * 80
    untouched = untouched and same == [(running, waiting, running + waiting) for running, waiting, _ in sizes]
    expect(untouched, "leave the request and the list of replicas as they are", told)
    index = whole(returned)
    if index is None or not 0 <= index < len(replicas):
        raise Wrong("return the index of a replica, from 0 on", told)
    right = _right(sizes)
    expect(index in right, rule, f"{told}\nright: {' or '.join(map(str, right))}")


def _right(sizes: tuple[tuple[int, int, int], ...]) -> list[int]:
    """The indices of all replicas that the rules allow."""
    least = min(running + waiting for running, waiting, _ in sizes)
    near = [i for i, (running, waiting, _) in enumerate(sizes) if running + waiting <= least + SLACK]
    best = max((sizes[i][2], -sizes[i][0] - sizes[i][1]) for i in near)
    return [i for i in near if (sizes[i][2], -sizes[i][0] - sizes[i][1]) == best]


# -- in the replay ---------------------------------------------------------------------------------


def serve(routing: str | Route, replicas: int = 4, rate: float = 36.0) -> Replay:
    """Replay some T4s, each with an 8B model in eight bits, with requests that share long instructions.

    Args:
        routing: name of a policy, or a function that returns the index of a replica.
        replicas: number of GPUs.
        rate: requests per second.
    """
    demands = draw_demands(
        600, rate=rate, prompt_tokens=(16, 96), answer_tokens=(16, 96), groups=60, shared=768, seed=12
    )
    clock = Roofline(GPUS["T4"], replace(MODELS["llama-3.1-8b"], weight_bytes=1), overhead=0.005)
    settings = Settings(clock.num_blocks(_PAGE), _PAGE, max_num_seqs=64)
    return replay(demands, clock, settings, replicas=replicas, routing=routing)


def _run(function: Callable[..., Any]) -> Run:
    ways: dict[str, str | Route] = {
        "yours": lambda request, replicas: int(function(request, replicas)),
        "reference": prefix_aware,
        "least loaded": "least-loaded",
        "round robin": "round-robin",
    }
    told = {name: serve(way) for name, way in ways.items()}
    late = {name: round(some.percentile("ttft", 95), 2) for name, some in told.items()}
    hits = {name: round(100 * some.prefix_hit_rate, 1) for name, some in told.items()}
    sentence = (
        f"4 replicas served {len(told['yours'].demands)} requests with it: 95% had their first token within "
        f"{late['yours']:.2f} s, with the reference {late['reference']:.2f} s, in turn "
        f"{late['round robin']:.2f} s."
    )
    title = "Prompt tokens that were found in a prefix cache"
    return Run(
        sentence,
        [
            (
                "How long the unlucky wait:",
                notebook.bars(late, "95th percentile of TTFT", unit="s", digits=2),
            ),
            ("Why:", notebook.bars(hits, title, unit="%")),
        ],
    )


EXERCISES = (Exercise("12.1", "send a request where its prompt is known", prefix_aware, _examine, _run),)
