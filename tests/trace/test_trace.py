"""A trace comes back from a file as it was, replays to the pool's state, and broken files say what broke."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from labkit.schedulers import SCHEDULERS
from labkit.trace.records import Admission, Arrival, Blocks, Finish, StepRecord, TraceError, TraceMeta
from labkit.trace.trace import Trace
from tests.core.scheduler_bench import Bench


def played(kind: str = "continuous", *, seed: int = 0, max_steps: int | None = None) -> Bench:
    """A bench after a busy run with preemptions, aborts, forks and shared prefixes."""
    rng = random.Random(seed)
    bench = Bench(kind, blocks=12, size=3, seats=4, budget=9)
    bench.trace.max_steps = max_steps
    todo = 25
    while todo or bench.scheduler.has_unfinished:
        if todo and rng.random() < 0.4:
            bench.add(
                [rng.randrange(2) for _ in range(rng.randint(1, 20))],
                rng.randint(1, 12),
                n=rng.choice([1, 1, 2]),
            )
            todo -= 1
        if bench.scheduler.requests and rng.random() < 0.05:
            bench.scheduler.abort(rng.choice(list(bench.scheduler.requests)))
        record = bench.step(token=rng.randrange(2))
        state = bench.trace.state(record.step, after=True)
        assert state.tables == bench.pool.tables
        assert len(state.waiting) == record.waiting == bench.scheduler.num_waiting
        assert state.cached == set(bench.pool.key_of)
        for request in bench.scheduler.running:
            if kind != "uncached":  # which computed them, and forgets them at once
                assert state.computed[request.request_id] == request.num_computed_tokens
    return bench


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
@pytest.mark.parametrize("max_steps", [None, 7])
def test_the_pool_can_be_rebuilt_at_every_step(kind: str, max_steps: int | None) -> None:
    bench = played(kind, max_steps=max_steps)
    assert Trace.from_lines(bench.trace.lines()) == bench.trace
    if max_steps:
        assert len(bench.trace) <= 2 * max_steps
    else:
        assert any(record.preempted for record in bench.trace) or kind != "continuous"


def test_a_saved_trace_is_equal_to_the_one_in_memory(tmp_path: Path) -> None:
    trace = played().trace
    trace.save(tmp_path / "run.jsonl")
    loaded = Trace.load(tmp_path / "run.jsonl")
    assert loaded == trace
    for record in trace:
        a, b = trace.state(record.step), loaded.state(record.step)
        assert (a.owners, a.filled, a.waiting) == (b.owners, b.filled, b.waiting)


def test_rows_and_state_during_and_after_a_step() -> None:
    bench = Bench(blocks=8, size=4)
    bench.add(6, 2)
    first, last = bench.step(), bench.step()
    row = first.rows[0]
    assert (row.request_id, row.kind, row.start, row.num_tokens, row.sampled, row.padding) == (
        "0",
        "prefill",
        0,
        6,
        (1,),
        0,
    )
    assert last.rows[0].kind == "decode"
    during, after = bench.trace.state(1), bench.trace.state(1, after=True)
    assert during.owners == {0: ("0",), 1: ("0",)}
    assert during.filled == {0: 4, 1: 3}
    assert after.owners == {}
    assert last.finished == (Finish("0", "length", (0, 1)),)
    assert (first.total_tokens, first.total_sampled) == (6, 1)


def test_shared_blocks_have_several_owners() -> None:
    bench = Bench(blocks=10, size=4)
    prompt = list(range(9))
    bench.add(prompt, 3)
    bench.step()
    bench.add(prompt, 3)
    record = bench.step()
    assert record.admitted[0].num_cached_tokens == 8
    assert bench.trace.state(record.step).owners[0] == ("0", "1")
    assert bench.trace.prefix_hit_rate == 8 / 18
    assert Bench().trace.prefix_hit_rate is None


def test_blocks_of_an_aborted_request_can_be_taken_in_the_same_step() -> None:
    bench = Bench(blocks=6, size=2, caching=False)
    bench.add(4, 4)
    bench.step()
    bench.scheduler.abort("0")
    bench.add(12, 1)
    record = bench.step()
    assert record.finished[0].reason == "abort"
    assert set(bench.trace.state(record.step).owners.values()) == {("1",)}


def test_why_a_request_waits() -> None:
    bench = Bench(seats=1, blocks=40)
    for _ in range(3):
        bench.add(3, 3)
    bench.add(3, 3, priority=-1)
    step = bench.step().step
    why = [bench.trace.why(name, step) for name in ("3", "0", "2", "x")]
    assert why == [
        "request 3 is running",
        "request 0 is next, but the only seat is taken",
        "request 2 is number 3 of 3; request 0 is next, but the only seat is taken",
        "request x is not in the engine",
    ]
    bench.scheduler.set_priority("2", -3)
    step = bench.step().step
    assert bench.trace.why("2", step) == "request 2 is next, but the only seat is taken"
    assert Trace.from_lines(bench.trace.lines()).why("2", step) == bench.trace.why("2", step)


def test_children_wait_for_their_parents_prompt_and_not_in_the_queue() -> None:
    bench = Bench(blocks=30, seats=2, budget=4)
    bench.add(8, 3, n=4)
    bench.add(3, 3)
    step = bench.step().step
    assert bench.trace.why("0.3", step) == "request 0.3 waits for the prompt of request 0"
    assert bench.trace.state(step, after=True).queue == ["1"]
    step = bench.step().step
    assert bench.trace.state(step, after=True).queue == ["0.2", "0.3", "1"]
    assert bench.trace.why("0.3", step).startswith("request 0.3 is number 2 of 3; request 0.2 is next, but ")


@pytest.mark.parametrize("max_steps", [None, 3])
def test_hit_rate_counts_tokens_looked_up_and_nothing_else(max_steps: int | None) -> None:
    bench = Bench(blocks=40, size=4, seats=4, budget=5)
    bench.trace.max_steps = max_steps
    bench.add([1] * 30, 20)
    for _ in range(6 if max_steps else 10):
        bench.step()
    assert bench.trace.prefix_hit_rate == (None if max_steps else 0.0)


def test_hit_rate_leaves_out_what_a_preempted_request_finds_of_its_own() -> None:
    bench = Bench(blocks=9, size=4, seats=2, budget=40)
    for first, max_tokens in ((2, 8), (3, 12)):
        bench.add([first] * 13, max_tokens)  # they share nothing
    while bench.scheduler.has_unfinished:
        bench.step()
    again = [a for record in bench.trace for a in record.admitted][2:]
    assert sum(admission.num_cached_tokens for admission in again) > 0
    assert bench.trace.prefix_hit_rate == 0.0


def test_a_new_request_under_the_id_of_a_preempted_one_counts() -> None:
    trace = Trace(TraceMeta(8, 4, 4, 16))
    lookup = Admission("a", 4, (0,), 8)
    gone, again = (Finish("a", "abort", ()),), (Arrival("a", 8, 2),)
    preempted, taken = (Blocks("a", (0, 1)),), (Blocks("a", (1,)),)
    for record in (
        StepRecord(0, arrived=again, admitted=(Admission("a", 0, (), 8),), taken=(Blocks("a", (0, 1)),)),
        StepRecord(1, preempted=preempted, published=(0,), waiting=1),
        StepRecord(2, arrived=again, finished=gone, admitted=(lookup,), taken=taken),
        StepRecord(3, preempted=preempted, waiting=1),
        StepRecord(4, admitted=(lookup,), taken=taken),
    ):
        trace.append(record)
    assert trace.prefix_hit_rate == 4 / 16


def test_records_do_not_depend_on_the_clock() -> None:
    assert StepRecord(3, time=1.0, seconds=2.0) == StepRecord(3, time=5.0, seconds=6.0)
    assert StepRecord(3) != StepRecord(4)


def test_steps_are_found_by_number() -> None:
    trace = played(max_steps=5).trace
    last = trace[-1].step
    assert trace.at(last) is trace[-1]
    for missing in (0, last + 1, -1):
        with pytest.raises(ValueError, match=f"step {missing} is not in this trace \\(steps held: "):
            trace.at(missing)
    with pytest.raises(ValueError, match="steps held: none"):
        Trace(TraceMeta(1, 1, 1, 1)).state(0)


HEAD = (
    '{"format":"labkit-trace","version":1,"num_blocks":4,"block_size":2,'
    '"max_num_seqs":2,"max_num_batched_tokens":8}'
)
RUN = '"requests":["a"],"kinds":"p","starts":[0],"num_tokens":[2],"sampled":[[1]]'


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "line 1: not JSON"),
        (["hello"], "line 1: not JSON"),
        (["[1]"], "line 1: expected an object, found list"),
        (["{}"], 'line 1: not a trace: the first line must say "format"'),
        (['{"format":"labkit-trace","version":9}'], "line 1: version 9 is not one"),
        (['{"format":"labkit-trace","version":1}'], "line 1: .*num_blocks"),
        ([HEAD.replace('"num_blocks":4', '"num_blocks":0')], "num_blocks must be at least 1, not 0"),
        ([HEAD.replace('"num_blocks":4', '"num_blocks":"4"')], "num_blocks: unexpected value '4'"),
        ([HEAD, '{"step":0,"evil":1}'], "line 2: unknown field 'evil'"),
        ([HEAD, '{"step":"0"}'], "line 2: step: unexpected value '0'"),
        ([HEAD, '{"step":true}'], "line 2: step: unexpected value True"),
        ([HEAD, "{}"], "line 2: .*step"),
        ([HEAD, '{"step":0}', "", '{"step":0}'], "line 4: step 0 does not come after step 0"),
        ([HEAD, '{"step":0,"requests":["a"]}'], "line 2: the columns"),
        ([HEAD, '{"step":0,"taken":[["a",[4]]]}'], "line 2: block 4 is outside the pool of 4"),
        ([HEAD, '{"step":0,"taken":[["a",["x"]]]}'], "line 2: taken: unexpected value 'x'"),
        ([HEAD, '{"step":0,"taken":[[1,[0]]]}'], "line 2: taken: unexpected value 1"),
        ([HEAD, '{"step":0,"taken":[["a",[0],1]]}'], "line 2: taken: too many values"),
        ([HEAD, '{"step":0,"taken":[["a"]]}'], "line 2: .*blocks"),
        ([HEAD, '{"step":0,"taken":7}'], "line 2: taken: expected a list, found 7"),
        ([HEAD, '{"step":0,"blocked":["a"]}'], "line 2: "),
        (
            [HEAD, '{"step":0,' + RUN + "}"],
            "line 2: request 'a' computes token 1 but holds blocks for 0 only",
        ),
        ([HEAD, '{"step":0,' + RUN.replace('"p"', '"z"') + "}"], "kinds must be made of the letters"),
        ([HEAD, '{"step":0,"copied":[["a",0,1]]}'], "line 2: copies a block that its request does not hold"),
        ([HEAD, '{"step":0,"waiting":-1}'], "line 2: a count is negative"),
        ([HEAD, '{"step":0,' + RUN + ',"drafted":[]' + ',"padding":[1,2]}'], "padding must have one entry"),
        ([HEAD, '{"step":0,' + RUN + ',"drafted":[[1],[2]]}'], "drafted must have one entry per request"),
        ([HEAD, '{"step":0,' + RUN.replace("[[1]]", "[[1,2,3]]") + ',"drafted":[[1]]}'], "sampled more than"),
        (
            [HEAD, '{"step":0,"taken":[["a",[0]]],"returned":[["a",[1]]],' + RUN + "}"],
            "line 2: request 'a' returns blocks that do not end its table",
        ),
        ([HEAD, "[" * 100_000], "line 2: not JSON"),
    ],
)
def test_a_broken_file_says_which_line_and_why(lines: list[str], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Trace.from_lines(lines)


def test_a_file_that_is_not_text_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\xe9\xfe\x00")
    with pytest.raises(TraceError, match="not UTF-8"):
        Trace.load(path)


def test_any_cut_or_changed_line_is_an_error_or_a_trace() -> None:
    lines = list(played().trace.lines())
    rng = random.Random(0)
    for _ in range(300):
        broken = list(lines)
        at = rng.randrange(len(broken))
        line = broken[at]
        cut = rng.randrange(len(line))
        broken[at] = line[:cut] + rng.choice(["", "9", '"', "]", "-"]) + line[cut + rng.randrange(3) :]
        try:
            Trace.from_lines(broken)
        except TraceError as error:
            assert str(error).startswith("line ")


def test_a_record_stays_small_in_memory_and_on_disk() -> None:
    bench = Bench(blocks=4000, size=16, seats=32, budget=64)
    for _ in range(32):
        bench.add([bench.count] * 20, 500)
    for _ in range(400):
        bench.step(token=bench.steps % 49152)
    rows = sum(len(record.requests) for record in bench.trace)
    disk = sum(len(line) + 1 for line in bench.trace.lines())
    assert disk / rows < 60
    seen: set[int] = set()

    def size(value: object) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        parts = value if isinstance(value, tuple) else ()
        if isinstance(value, StepRecord):
            parts = [getattr(value, name) for name in StepRecord.__slots__]
        return sys.getsizeof(value) + sum(map(size, parts))

    assert sum(map(size, bench.trace)) / rows < 300
    assert json.loads(next(bench.trace.lines()))["format"] == "labkit-trace"
