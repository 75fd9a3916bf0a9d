"""Steps in which every request decodes, taken without planning each: the same result for less work."""

from __future__ import annotations

from labkit.analysis.roofline import StepWork
from labkit.core.request import Request
from labkit.core.scheduler import Scheduler


class DecodeRun:
    """A run of steps of a scheduler in which everybody who runs computes one token, and nobody joins.

    What planning and committing each would do, in the same order: a request whose last page is full takes one
    before the step, a page that the step fills is published after it. Between two pages nothing happens to a
    request but that it gets longer, and that is done once, when its page is full or the run is over.

    A step can be taken so as long as nobody would be admitted. That holds

    - while nobody waits, or all seats are taken;
    - after a step that could not admit the head of the queue for want of pages, as long as everybody decodes:
      pages only get fewer, and what is published holds tokens of answers, which no other prompt shares.

    The caller sees to this, and ends the run at an arrival that would get a seat. Every token of an answer is
    the request's `seed`, different for each.

    Args:
        scheduler: all its running requests have sampled before, and have one token to compute.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self._rows = list(scheduler.running)
        self._left = min(request.max_len - len(request.token_ids) for request in self._rows)
        self._keys = sum(request.num_computed_tokens for request in self._rows) + len(self._rows)
        self._done = 0  # steps
        # Those who stand at the same place of a page get to its end in the same step.
        self._at: list[list[Request]] = [[] for _ in range(self.pool.block_size)]
        for request in self._rows:
            self._at[request.num_computed_tokens % self.pool.block_size].append(request)

    def begin(self) -> StepWork | None:
        """Take the pages of the next step and return its work; None if too few are free: somebody must go."""
        growing = [
            request
            for request in self._at[-self._done % self.pool.block_size]
            if request.num_computed_tokens + self._done >= request.num_slots
        ]
        if len(growing) > self.pool.num_free:
            return None
        for request in growing:
            self.pool.allocate(request.request_id, 1)
            request.num_slots += self.pool.block_size
        rows = len(self._rows)
        return StepWork(rows, rows, rows, self._keys, self._keys)

    def end(self) -> list[Request]:
        """The step is over; returns who finished in it, which ends the run."""
        self._done += 1
        self._keys += len(self._rows)
        for request in self._at[-self._done % self.pool.block_size]:
            computed = request.num_computed_tokens + self._done
            self._lengthen(request, computed)
            self.pool.publish(request.request_id, request.token_ids, computed)
        if self._done < self._left:
            return []
        self.stop()
        finished = [request for request in self._rows if len(request.token_ids) >= request.max_len]
        for request in finished:
            self.scheduler.finish(request, "length")
        return finished

    def stop(self) -> None:
        """Leave the requests as planning each step would have."""
        for request in self._rows:
            request.num_computed_tokens += self._done
            self._lengthen(request, request.num_computed_tokens + 1)
        self._done = 0

    def _lengthen(self, request: Request, length: int) -> None:
        request.token_ids += [request.seed] * (length - len(request.token_ids))
