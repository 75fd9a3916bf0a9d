"""The result of a race in words, and why. Every number in them was measured in that race."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labkit.page.race.run import Result
from labkit.page.race.workloads import CHUNKED, RESERVED, SPECULATION, WHOLE


def verdict(results: Sequence[Result]) -> list[tuple[str, str]]:
    """What was seen and why, for each pair of settings that ran and is worth a comparison."""
    by_name = {result.setting.name: result for result in results}
    pairs = ((by_name.get(one), by_name.get(other), say) for one, other, say in _PAIRS)
    return [say(one, other) for one, other, say in pairs if one and other]


def _static(static: Result, continuous: Result) -> tuple[str, str]:
    return (
        f"Static batching took {_cost(static)}, continuous {_cost(continuous)}, for the same tokens.",
        f"In static batches, seats whose answer was over stood idle {_times(_idle(static))} (thin double "
        "lines), until the longest answer of the batch was done. Continuous batching gives a free seat to "
        f"the next in the queue at once: a step worked for {continuous.batch:.1f} requests rather than "
        f"{static.batch:.1f}, and the longest wait for a first token was {continuous.ttft_max:.1f} s rather "
        f"than {static.ttft_max:.1f} s.{_doubt(static, continuous)}",
    )


def _naive(naive: Result, static: Result) -> tuple[str, str]:
    return (
        f"One at a time (naive) took {_cost(naive)}, static batches {_cost(static)}.",
        f"A step for one request makes one token; a step for a batch worked for {static.batch:.1f} requests "
        f"on average, and took {_per_step(static) / _per_step(naive):.1f} times as long.",
    )


def _memory(reserved: Result, paged: Result) -> tuple[str, str]:
    lost = _times(paged.preemptions)
    price = f" The price: {lost} a request gave its pages back and began again." if paged.preemptions else ""
    return (
        f"Of the memory that requests held, {reserved.waste:.0%} was empty where it was reserved, "
        f"{paged.waste:.0%} where it was paged (hatched, below each picture).",
        "Reserved memory takes pages for the whole answer before it begins, paged memory takes a page when "
        f"tokens come. So the same memory served {paged.batch:.1f} requests in a step rather than "
        f"{reserved.batch:.1f}, and paged took {_cost(paged)} rather than {_cost(reserved)}.{price}"
        f"{_doubt(reserved, paged)}",
    )


def _chunks(whole: Result, chunked: Result) -> tuple[str, str]:
    one, other = (result.itl_max or 0.0 for result in (whole, chunked))
    return (
        f"An answer stood still for up to {one:.2f} s with whole prompts, {other:.2f} s with chunks.",
        "A prompt that is read whole has the step for itself; a chunk shares each step with the answers, so "
        f"everybody gets a token in it. The longest wait for a first token: {whole.ttft_max:.1f} s with "
        f"whole prompts, {chunked.ttft_max:.1f} s with chunks.",
    )


def _drafts(plain: Result, drafting: Result) -> tuple[str, str]:
    right = round(drafting.drafted * (drafting.acceptance or 0.0))
    return (
        f"Token by token it took {_cost(plain)}, with guesses {_cost(drafting)}, for the same tokens.",
        f"{right} of {drafting.drafted} guesses were right, and each of those saves a step. The wrong ones "
        f"are computed for nothing: a step took {_per_step(drafting) / _per_step(plain):.1f} times as long.",
    )


def _cost(result: Result) -> str:
    return f"{result.steps} steps ({result.seconds:.1f} s)"


def _doubt(one: Result, other: Result) -> str:
    """A sentence for a clock that contradicts the number of steps."""
    if (one.steps - other.steps) * (one.seconds - other.seconds) >= 0:
        return ""
    return (
        " The clock contradicts the steps here: how long a step takes depends on its size and on what else "
        "the machine does."
    )


def _per_step(result: Result) -> float:
    return max(1e-9, result.seconds) / result.steps


def _idle(result: Result) -> int:
    """How often, over all steps, a request held a seat and computed nothing."""
    return sum(row.kind == "idle" for record in result.trace for row in record.rows)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


_PAIRS: tuple[tuple[str, str, Callable[[Result, Result], tuple[str, str]]], ...] = (
    ("static", "continuous", _static),
    ("naive", "static", _naive),
    (RESERVED, "continuous", _memory),
    (WHOLE, CHUNKED, _chunks),
    ("continuous", SPECULATION, _drafts),
)
