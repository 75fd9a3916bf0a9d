"""The result of a race in words, and why. Every number in them was measured in that race."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labkit.page.race.noise import busy, noise
from labkit.page.race.run import Result
from labkit.page.race.workloads import CHUNKED, RESERVED, SPECULATION, WHOLE


def verdict(results: Sequence[Result]) -> list[tuple[str, str]]:
    """What was seen and why, for each pair of settings that ran and is worth a comparison.

    Steps come first, because they are the same on every machine. Seconds come after them, with what they can
    be trusted for.
    """
    by_name = {result.setting.name: result for result in results}
    trust = noise(results)
    pairs = [(by_name.get(one), by_name.get(other), say) for one, other, say in _PAIRS]
    if "static" not in by_name:  # else continuous batching is compared with that
        pairs.append((by_name.get("naive"), by_name.get("continuous"), _naive))
    said = [say(one, other, trust) for one, other, say in pairs if one and other]
    if said and (doubt := busy(trust)):
        said[0] = (said[0][0], f"{said[0][1]} {doubt}")
    return said


def _static(static: Result, continuous: Result, trust: float) -> tuple[str, str]:
    return (
        _steps("Static batching", static, "continuous batching", continuous),
        f"In static batches, seats whose answer was over stood idle {_times(_idle(static))} (thin double "
        "lines), until the longest answer of the batch was done. Continuous batching gives a free seat to "
        f"the next in the queue at once: a step worked for {continuous.batch:.1f} requests rather than "
        f"{static.batch:.1f}. {_clock(static, continuous, trust)}",
    )


def _naive(naive: Result, batched: Result, trust: float) -> tuple[str, str]:
    longer = _per_step(batched) / _per_step(naive)
    saved = "because all the weights are read once for a step, however many requests share it"
    but = f", and not {batched.batch:.1f} times, {saved}" if longer < batched.batch else ""
    return (
        _steps("One request at a time (naive)", naive, f"{batched.setting.name} batching", batched),
        f"A step for one request makes one token; a step for a batch worked for {batched.batch:.1f} requests "
        f"on average, and took {longer:.1f} times as long{but}. {_clock(naive, batched, trust)}",
    )


def _memory(reserved: Result, paged: Result, trust: float) -> tuple[str, str]:
    lost = _times(paged.preemptions)
    price = f" The price: {lost} a request gave its pages back and began again." if paged.preemptions else ""
    seen = _steps("Reserved memory", reserved, f"paged memory ({paged.setting.name})", paged)
    return (
        f"{seen} Of the memory that requests held, "
        f"{reserved.waste:.0%} was empty where it was reserved, {paged.waste:.0%} where it was paged.",
        "Reserved memory takes pages for the whole answer before it begins (hatched, below each picture), "
        "paged memory takes a page when tokens come. So the same memory served "
        f"{paged.batch:.1f} requests in a step rather than {reserved.batch:.1f}.{price} "
        f"{_clock(reserved, paged, trust)}",
    )


def _chunks(whole: Result, chunked: Result, trust: float) -> tuple[str, str]:
    one, other = (result.itl_max or 0.0 for result in (whole, chunked))
    return (
        f"Whole prompts took {whole.steps} steps, chunks {chunked.steps}; an answer stood still for up to "
        f"{one:.2f} s with whole prompts, {other:.2f} s with chunks{_alike(one, other, trust)}.",
        "A prompt that is read whole has the step for itself; a chunk shares each step with the answers, so "
        f"everybody gets a token in it. The longest wait for a first token: {whole.ttft_max:.1f} s with "
        f"whole prompts, {chunked.ttft_max:.1f} s with chunks.",
    )


def _drafts(plain: Result, drafting: Result, trust: float) -> tuple[str, str]:
    right = round(drafting.drafted * (drafting.acceptance or 0.0))
    return (
        _steps("Token by token", plain, "with guesses", drafting),
        f"{right} of {drafting.drafted} guesses were right, and each of those saves a step. The wrong ones "
        f"are computed for nothing: a step took {_per_step(drafting) / _per_step(plain):.1f} times as long. "
        f"{_clock(plain, drafting, trust)}",
    )


def _steps(one: str, first: Result, other: str, second: Result) -> str:
    """Compare steps, the ratio first."""
    ratio = first.steps / second.steps
    if f"{ratio:.1f}" == "1.0":
        return f"{one} and {other} took about as many steps: {first.steps} and {second.steps}."
    return (
        f"{one} took {ratio:.1f} times as many steps as {other}: {first.steps} rather than {second.steps}, "
        "for the same tokens."
    )


def _clock(one: Result, other: Result, trust: float) -> str:
    """A sentence on seconds, which says what they can be trusted for."""
    both = f"{one.seconds:.1f} s against {other.seconds:.1f} s"
    if _alike(one.seconds, other.seconds, trust):
        return f"On the clock, {both}: no difference beyond noise. Steps of one size differed by as much."
    if (one.steps - other.steps) * (one.seconds - other.seconds) >= 0:
        return f"On the clock, {both}."
    return (
        f"On the clock, {both}: that contradicts the steps. How long a step takes depends on its size and on "
        "what else the machine does."
    )


def _alike(one: float, other: float, trust: float) -> str:
    """Words for two times that are no further apart than the noise of the race, else ""."""
    low, high = sorted((one, other))
    return (
        " (no difference beyond noise: steps of one size differed by as much)"
        if high <= low * (1 + trust)
        else ""
    )


def _per_step(result: Result) -> float:
    return max(1e-9, result.seconds) / result.steps


def _idle(result: Result) -> int:
    """How often, over all steps, a request held a seat and computed nothing."""
    return sum(row.kind == "idle" for record in result.trace for row in record.rows)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


_PAIRS: tuple[tuple[str, str, Callable[[Result, Result, float], tuple[str, str]]], ...] = (
    ("static", "continuous", _static),
    ("naive", "static", _naive),
    (RESERVED, "continuous", _memory),
    (WHOLE, CHUNKED, _chunks),
    ("continuous", SPECULATION, _drafts),
)
