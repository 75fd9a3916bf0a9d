"""What a request that joins a running batch costs the others: one sentence each, said once and for good.

An event begins with the step in which a newcomer's prompt is first computed. All that is said of it comes
from one window: steps of one size before it, the steps that computed the prompt, and steps of one size after
it. Those who join before the prompt is complete belong to the same event.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from labkit.trace.records import StepRecord
from labkit.views import style
from labkit.views.style import plural
from labkit.views.wire import Joined

KEPT = 8  # events
WINDOW = 8  # steps before an event, and after it
LEAST = 3  # of those, for anything to be said
ALIKE = 1.1  # steps of one size differ by so much on any machine
_NAMED = 4  # newcomers that are named one by one


@dataclass
class _Event:
    """Requests that join `others`, while it is measured. `before`, `during` and `after` are seconds of steps.

    `tokens` are those of the newcomers' prompts, of which `cached` were found. `got` counts the tokens of the
    others while the prompts were computed, `due` what a token for each in each step makes, and `own` the
    newcomers' tokens in the steps after.
    """

    first: int
    others: set[str]
    before: list[float]
    requests: list[str] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    running: set[str] = field(default_factory=set)  # in the steps after
    joined: int = 0  # how many others there were
    tokens: int = 0
    cached: int = 0
    got: int = 0
    due: int = 0
    preempted: int = 0
    own: int = 0


class Joins:
    """Measures what newcomers cost, from records that come in one by one.

    Attributes:
        changed: the step since which nothing new was to be said; -1 if nothing ever was.
    """

    def __init__(self) -> None:
        self.changed = -1
        self._unread: dict[str, int] = {}  # requests that wait for their first step: the tokens of the prompt
        self._calm: deque[float] = deque(maxlen=WINDOW)  # the latest steps, while the same requests decode
        self._running: set[str] = set()  # those requests
        self._seated: set[str] = set()  # all who ran in the latest step and go on
        self._event: _Event | None = None
        self._said: deque[Joined] = deque(maxlen=KEPT)

    def rows(self) -> tuple[Joined, ...]:
        """What is said of each event, in their order. One that goes on has no verdict yet."""
        return tuple(self._said)

    def append(self, record: StepRecord) -> None:
        """Take in the next step."""
        self._unread |= {arrival.request_id: arrival.num_prompt_tokens for arrival in record.arrived}
        kinds = dict(zip(record.requests, record.kinds, strict=True))
        reads = {name for name, kind in kinds.items() if kind in "pc"}
        new = [name for name in kinds if name in reads and name in self._unread]
        calm = not reads and record.total_sampled > 0
        self._measure(record, reads, new, calm)
        if not calm or kinds.keys() != self._running:
            self._calm.clear()
        if calm:
            self._running = set(kinds)
            self._calm.append(record.seconds)
        for name in (*kinds, *(finish.request_id for finish in record.finished)):
            self._unread.pop(name, None)
        self._seated = kinds.keys() - {finish.request_id for finish in record.finished}

    def _measure(self, record: StepRecord, reads: set[str], new: list[str], calm: bool) -> None:
        event = self._event
        if event and not event.after and (new or reads & set(event.requests)):
            return self._compute(event, record, new)
        if event:
            event.running = event.running or set(record.requests)
            if calm and event.running == set(record.requests):
                event.after.append(record.seconds)
                event.own += _tokens_of(record, event.requests)
            if not calm or event.running != set(record.requests) or len(event.after) == WINDOW:
                self._event = None
                self._say(event, record.step, over=True)
        others = self._seated - {name for name, _ in record.preempted}
        if new and others and len(self._calm) >= LEAST:
            self._event = _Event(record.step, others, list(self._calm), joined=len(others))
            self._said.append(Joined(record.step))
            self._compute(self._event, record, new)

    def _compute(self, event: _Event, record: StepRecord, new: list[str]) -> None:
        """A step in which prompts of the newcomers are computed."""
        lost = event.others & {name for name, _ in record.preempted}
        event.preempted += len(lost)
        event.others -= lost
        event.requests += new
        event.tokens += sum(self._unread[name] for name in new)
        event.cached += sum(a.num_cached_tokens for a in record.admitted if a.request_id in new)
        event.during.append(record.seconds)
        event.got += _tokens_of(record, event.others)
        event.due += len(event.others)
        event.others -= {finish.request_id for finish in record.finished}
        if new:
            self._say(event, record.step)

    def _say(self, event: _Event, step: int, *, over: bool = False) -> None:
        verdict, story = words_of(event) if over else ("", _begun(event))
        name = event.requests[0]
        looks = style.label(name, 6), style.color_index(name)
        self._said[-1] = Joined(event.first, tuple(event.requests), *looks, verdict, story)
        self.changed = step


def _tokens_of(record: StepRecord, names: Sequence[str] | set[str]) -> int:
    """How many tokens some requests got in a step."""
    return sum(len(new) for name, new in zip(record.requests, record.sampled, strict=True) if name in names)


def _begun(event: _Event) -> str:
    return f"{_who(event)} joined {_others(event)} in step {event.first}: what that costs is being measured."


def words_of(event: _Event) -> tuple[str, str]:
    """The verdict on an event, and the rest of the sentence.

    Seconds count where they stand out of what steps of one size differ by; else it is told in steps, which
    are the same on every machine.
    """
    low, high = _range([*event.before, *event.after])
    before, during, steps = _mean(event.before), _mean(event.during), len(event.during)
    noise = _times(low, high)
    who, others, work, lost = _who(event), _others(event), _work(event), ""
    if event.preempted:
        lost = f"; {event.preempted} of them lost their pages to it, and must begin again"
    if not event.got:
        wait = f"no token for {_time(sum(event.during))}, rather than one in {_time(before)}"
        return f"{who} stopped {others} for {plural(steps, 'step')}", f"{wait}, {work}{lost}."
    if statistics.median(event.during) <= max(high, before * ALIKE):
        price, got = "no step", "each got a token in every step"
        if event.got < event.due:
            price, got = "some tokens", f"they got {event.got} tokens rather than {event.due}"
        took = f"a step took {_time(during)} then, and steps of one size {noise}"
        return (
            f"{who} cost {others} {price}, and in seconds nothing beyond noise",
            f"{got} {work}; {took}{lost}.",
        )
    paid = (
        f"{during / before:.1f} times as long for {'one token' if steps == 1 else f'each of {steps} tokens'}"
    )
    back = own = ""
    if len(event.after) >= LEAST:
        after = _mean(event.after)
        if after > max(high, before * ALIKE):
            paid += f", and {after / before:.1f} times as long since"
            back = f", and is {_time(after)} since"
        elif after * ALIKE < _range(event.before)[0]:  # what made it slow before ended meanwhile
            back = f", then came down to {_time(after)}"
        else:
            paid += ", then as long as before"
            back = f", then went back to {_time(after)}"
        own = f"; {_rate(event)}" if event.own else ""
    grew = f"the gap grew from {_times(before, during)} {work}{back}"
    return f"{who} made {others} wait {paid}", f"{grew} (noise: {noise}){lost}{own}."


def _work(event: _Event) -> str:
    steps, last, alone = len(event.during), event.first + len(event.during) - 1, len(event.requests) == 1
    found = f", {event.cached:,} of them from the prefix cache," if 2 * event.cached >= event.tokens else ""
    where = f"in steps {event.first} to {last}"
    if steps == 1:
        where = f"in step {last}"
    elif alone:
        where = f"in {steps} chunks (steps {event.first} to {last})"
    prompt = "its prompt" if alone else "their prompts"
    return f"while {prompt} of {event.tokens:,} tokens{found} {'was' if alone else 'were'} computed {where}"


def _who(event: _Event) -> str:
    names = [style.label(name, 6) for name in event.requests]
    if len(names) == 1:
        return f"Request {names[0]}"
    if len(names) > _NAMED:
        names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
    return f"Requests {', '.join(names[:-1])} and {names[-1]}"


def _others(event: _Event) -> str:
    return "the other one" if event.joined == 1 else f"the {event.joined} others"


def _rate(event: _Event) -> str:
    rate = event.own / len(event.requests) / sum(event.after)
    return f"{'it' if len(event.requests) == 1 else 'each of them'} got {float(f'{rate:.2g}'):,g} tokens/s"


def _mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds)


def _range(seconds: Sequence[float]) -> tuple[float, float]:
    """The shortest and the longest of some steps, but for one at each end that may be an accident."""
    ordered = sorted(seconds)
    return (ordered[1], ordered[-2]) if len(ordered) > LEAST else (ordered[0], ordered[-1])


def _times(one: float, other: float) -> str:
    first, second = _time(one), _time(other)
    same = first.rpartition(" ")[2] == second.rpartition(" ")[2]
    return f"{first.rpartition(' ')[0] if same else first} to {second}"


def _time(seconds: float) -> str:
    """Two digits of it: more would promise what a second run does not keep."""
    if seconds < 0.995:
        return f"{float(f'{1000 * seconds:.2g}'):g} ms"
    return f"{float(f'{seconds:.2g}'):,g} s"
