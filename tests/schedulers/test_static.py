"""A static batch pads to its longest member, and keeps the seats of those that are done."""

from __future__ import annotations

from tests.core.scheduler_bench import Bench


def test_static_pads_to_the_longest_and_keeps_idle_seats() -> None:
    bench = Bench("static", blocks=60, seats=3, budget=12)
    bench.add(8, 1)
    bench.add(3, 4)
    bench.add(5, 2)
    bench.add(1, 1)  # must wait for the whole batch
    records = []
    while bench.scheduler.has_unfinished:
        records.append(bench.step())
    prefill = records[:2]  # 8 columns, 12 // 3 at a time
    assert [sum(r.num_tokens[i] for r in prefill) for i in range(3)] == [8, 3, 5]
    assert [sum(r.padding[i] for r in prefill) for i in range(3)] == [0, 5, 3]
    assert records[1].sampled == ((1,), (1,), (1,))  # left padding: all reach the first token together
    decode = records[2:5]
    assert [record.kinds for record in decode] == ["idd", "idi", "idi"]
    assert all(record.padding[0] == 1 for record in decode)
    assert records[5].requests == ("3",)
