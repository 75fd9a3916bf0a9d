"""One stream for all: who gets what, and that nobody holds up anybody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page import sse
from labkit.page.session import Lab
from labkit.page.snapshot import ClientState, Snapshotter
from labkit.page.sse import AGAIN, BEAT, BEHIND, PATH, PIECE, Broadcast
from labkit.page.submissions import KEEP
from labkit.page.visitors import mark
from labkit.sampling_params import SamplingParams
from labkit.schedulers import SCHEDULERS
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord
from labkit.views.live_feed import WINDOW
from tests.page.watching import learn, run, until, watching
from tests.waiting import wait_for

FOUR = SamplingParams(max_tokens=4, ignore_eos=True)
SIZES = dict(num_blocks=14, block_size=4, max_num_seqs=5, max_num_batched_tokens=16)


@pytest.fixture
def lab(model: LoadedModel) -> Iterator[Lab]:
    with AsyncEngine(Engine(EngineConfig(model=model, **SIZES))) as live:
        lab = Lab(live)
        lab.session.feed._min_interval = 0
        wait_for(lambda: not live.busy)
        yield lab
        lab.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SECONDS", 0.005)
    monkeypatch.setattr(sse, "SECONDS_FOR_FEW", 0.005)


# -- who gets what --------------------------------------------------------------------------------


def test_first_everything_and_then_what_is_new(lab: Lab) -> None:
    told, session = Broadcast(Snapshotter(lab)), lab.session
    request_id = session.submissions.inject("me", "hello", FOUR, name="Ada")
    wait_for(lambda: not session.live.busy)

    async def test() -> None:
        async with watching(told) as early:
            first = early.updates[0]
            assert first["pictures"]["full"] and first["pictures"]["step"] == 3
            assert first["lab"]["settings"] == lab.settings and first["live"] == session.submissions.clock()
            assert [(card["id"], card["prompt"]) for card in first["cards"]["items"]] == [
                (request_id, "hello")
            ]
            assert dict(early.start["headers"])[b"content-type"].startswith(b"text/event-stream")
            session.live.pause()
            await until(lambda: early.updates[-1]["live"]["paused"])
            second = session.submissions.inject("me", "again", FOUR)
            await until(lambda: early.updates[-1]["plan"].get("plan"))
            for step in range(4, 8):
                session.live.single_step()
                await until(lambda step=step: early.updates[-1]["pictures"]["step"] == step)
            await until(lambda: not early.updates[-1]["busy"])
            later = early.updates[1:]
            assert not any(update["pictures"].get("full") or "lab" in update for update in later)
            steps = [step[0] for update in later for step in update["pictures"].get("steps", ())]
            assert steps == [4, 5, 6, 7]
            text = ""
            items = [item for update in later for item in update["cards"]["items"]]
            for item in items:
                assert item["id"] == second and ("prompt" in item) == (item is items[0])
                text = text[: item["at"]] + item["text"]
            assert text == session.live.output(second).text and items[-1]["reason"] == "length"
            async with watching(told) as late:
                assert [card["id"] for card in late.updates[0]["cards"]["items"]] == [request_id, second]
                assert len(late.updates[0]["pictures"]["steps"]) == 8 and late.updates[0]["pictures"]["full"]

    run(test)


def test_everybody_reads_the_same_bytes(lab: Lab) -> None:
    told, submissions = Broadcast(Snapshotter(lab)), lab.session.submissions

    async def test() -> None:
        async with watching(told, 3) as watchers:
            submissions.inject("me", "hello", FOUR)
            await until(lambda: lab.session.live.num_unfinished == 0)
            await until(lambda: not watchers[0].updates[-1]["busy"])
            await until(lambda: len({len(watcher.texts) for watcher in watchers}) == 1)
            assert len(watchers[0].texts) > 1
            for texts in zip(*(watcher.texts for watcher in watchers), strict=True):
                assert all(text is texts[0] for text in texts), "it was made once for each"

    run(test)


def test_what_is_told_is_what_a_page_that_asks_is_answered(lab: Lab) -> None:
    told, snapshotter = Broadcast(Snapshotter(lab)), Snapshotter(lab)
    heard, asking = ClientState(), ClientState()

    async def test() -> None:
        async with watching(told) as watcher:
            for who in ("me", "you", "me"):
                lab.session.submissions.inject(who, "hello", FOUR)
                await until(lambda: lab.session.live.num_unfinished == 0)
            await until(lambda: not watcher.updates[-1]["busy"])
            for update in watcher.updates:
                learn(heard, update)

    run(test)
    answered = ClientState()
    learn(answered, snapshotter.take().tell(asking))
    assert heard == asking == answered and not heard.unfinished
    assert set(snapshotter.take().tell(heard)["pictures"]) == {"feed", "step"}


def test_another_engine_is_told_from_the_beginning(lab: Lab) -> None:
    told, before = Broadcast(Snapshotter(lab)), lab.session

    async def test() -> None:
        async with watching(told, 2) as (watcher, other):
            before.submissions.inject("me", "hello", FOUR)
            await until(lambda: watcher.updates[-1]["cards"]["items"])
            await asyncio.to_thread(lab.change, {"max_num_seqs": 3}, running="cancel")
            await until(lambda: "lab" in watcher.updates[-1])
            update = watcher.updates[-1]
            assert update["pictures"]["full"] and update["pictures"]["feed"] == lab.session.feed.name
            assert update["cards"] == {"since": 0, "items": [], "gone": [], "reset": True}
            assert update["lab"]["settings"]["max_num_seqs"] == 3
            request_id = lab.session.submissions.inject("me", "hello", FOUR)
            await until(lambda: any(c["id"] == request_id for c in watcher.updates[-1]["cards"]["items"]))
            await until(lambda: len(other.texts) == len(watcher.texts))

    run(test)


def test_nobody_is_told_the_secret_of_another(lab: Lab) -> None:
    told, submissions = Broadcast(Snapshotter(lab)), lab.session.submissions
    secrets = [lab.visitors.arrive("tab 1"), lab.visitors.arrive("tab 2"), "the session of a program"]

    async def test() -> None:
        async with watching(told) as watcher:
            for secret in secrets:
                submissions.inject(secret, "hello", FOUR)
            submissions.control(secrets[0], "pause")
            await until(lambda: watcher.updates[-1]["live"]["paused"])
            submissions.control(secrets[0], "resume")
            await until(lambda: not watcher.updates[-1]["busy"])
            async with watching(told) as late:
                texts = b"".join(watcher.texts + late.texts).decode()
                owners = [card["owner"] for card in late.updates[0]["cards"]["items"]]
        assert not any(secret in texts for secret in (*secrets, "tab 1", "tab 2"))
        assert owners == [mark(secret) for secret in secrets] and len(set(owners)) == 3

    run(test)
    assert mark("") == "" and len(mark("\ud800")) == 12


# -- nobody holds up anybody ----------------------------------------------------------------------


def test_a_long_text_is_handed_on_piece_by_piece(lab: Lab) -> None:
    """A server keeps what it was handed until it is read: of a reader who does not read, a piece."""
    told, submissions = Broadcast(Snapshotter(lab)), lab.session.submissions
    ids = [submissions.live.submit("hello", FOUR) for _ in range(90)]
    for request_id in ids:
        submissions.enter("", request_id, "x" * 1000, 4)

    async def test() -> None:
        async with watching(told) as watcher:
            await until(lambda: b"".join(watcher.texts).endswith(b"\n\n"))
            assert max(map(len, watcher.texts)) == PIECE < len(b"".join(watcher.texts))
            items = json.loads(b"".join(watcher.texts).removeprefix(AGAIN + b"data: ").split(b"\n")[0])
            assert len(items["cards"]["items"]) == 90

    run(test)


def test_a_reader_who_is_too_slow_is_let_go(lab: Lab) -> None:
    told, live = Broadcast(Snapshotter(lab)), lab.session.live

    async def test() -> None:
        async with watching(told, 2) as (quick, slow):
            slow.reading.clear()
            for i in range(2 * BEHIND + 4):
                seen = len(quick.texts)
                (live.pause, live.resume)[i % 2]()
                await until(lambda seen=seen: len(quick.texts) > seen)
            assert len(told._readers) == 1 and len(slow.texts) == 1 and not slow.over
            slow.reading.set()
            await until(lambda: slow.over)
            assert len(slow.texts) <= 2 and not quick.over  # the rest of its texts was not kept for it

    run(test)


def test_nothing_is_done_while_nobody_watches(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshotter = Snapshotter(lab)
    told, taken = Broadcast(snapshotter), []
    take = snapshotter.take
    monkeypatch.setattr(snapshotter, "take", lambda: taken.append(1) or take())

    async def test() -> None:
        await asyncio.sleep(0.05)
        assert not taken
        async with watching(told) as watcher:
            await until(lambda: len(taken) > 5)
            assert len(watcher.texts) == 1, "nothing was new"
        await until(lambda: told._ticking is None)
        seen = len(taken)
        await asyncio.sleep(0.05)
        assert len(taken) == seen and not told._readers

    run(test)


def test_a_heartbeat_in_the_silence(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT", 0.02)
    told = Broadcast(Snapshotter(lab))

    async def test() -> None:
        async with watching(told) as watcher:
            await until(lambda: len(watcher.texts) > 3)
            assert watcher.texts[1:] == [BEAT] * (len(watcher.texts) - 1)

    run(test)


def test_a_fault_ends_the_stream_and_is_logged(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    snapshotter = Snapshotter(lab)
    told = Broadcast(snapshotter)

    async def test() -> None:
        async with watching(told) as watcher:
            with monkeypatch.context() as patch:
                patch.setattr(snapshotter, "take", lambda: 1 / 0)
                await until(lambda: watcher.over)
            async with watching(told) as again:
                assert again.updates[0]["pictures"]["full"]

    run(test)
    assert "a snapshot could not be told" in caplog.text


def test_the_end_lets_go_of_everybody(lab: Lab) -> None:
    told, handed_on = Broadcast(Snapshotter(lab)), []

    async def rest(scope: Any, receive: Any, send: Any) -> None:
        handed_on.append(scope["path"])

    async def test() -> None:
        async with watching(told, 2) as watchers:
            await asyncio.to_thread(told.close)
            await until(lambda: all(watcher.over for watcher in watchers))
            await told.before(rest)({"type": "http", "method": "GET", "path": PATH}, None, None)
        assert handed_on == [PATH]

    run(test)
    told.close()  # the loop is gone


# -- it does not grow -----------------------------------------------------------------------------


def steady(steps: int) -> Iterator[StepRecord]:
    """A run of the real scheduler with always seven requests, without a model."""
    pool = BlockPool(SIZES["num_blocks"], SIZES["block_size"])
    planner = SCHEDULERS["continuous"](pool, max_num_seqs=5, max_num_batched_tokens=16)
    arrived = 0
    for step in range(steps):
        while len(planner.requests) < 7:
            prompt = [7] * 4 + [100 + arrived % 50] * (arrived % 9)
            planner.add(Request(f"{arrived:06}", prompt, SamplingParams(max_tokens=8 + arrived % 5)))
            arrived += 1
        plan = planner.schedule()
        rows = zip(plan.requests, plan.starts, plan.num_tokens, strict=True)
        ends = [n and s + n == len(r.token_ids) for r, s, n in rows]
        result = StepResult([(step % 50,) if end else () for end in ends])
        planner.commit(plan, result)
        yield record_step(step, plan, result, planner, seconds=0.01)


def test_a_text_does_not_grow_with_the_length_of_the_run(lab: Lab) -> None:
    snapshotter, feed, client = Snapshotter(lab), lab.session.feed, ClientState()
    everything: list[int] = []
    increments: list[int] = []
    for record in steady(5_000):
        feed.append(record)
        if record.step % 2:
            snapshot = snapshotter.take()
            increments.append(len(sse.event(snapshot.tell(client))))
        if record.step % 100 == 99:
            everything.append(len(sse.event(snapshot.tell(ClientState()))))
    early = slice(WINDOW, len(increments) // 2)
    assert max(increments[len(increments) // 2 :]) < 1.1 * max(increments[early])
    assert max(everything[25:]) < 1.1 * max(everything[2:25])
    assert sum(increments[early]) / len(increments[early]) < 0.2 * max(everything), "they are increments"


def test_cards_do_not_grow_with_the_length_of_the_run(lab: Lab) -> None:
    snapshotter, submissions, sizes = Snapshotter(lab), lab.session.submissions, []
    for _ in range(2):
        for _ in range(KEEP + 10):
            request_id = submissions.submit("me", "hello", "hello", SamplingParams(max_tokens=1))
            wait_for(lambda request_id=request_id: not submissions.live.unfinished(request_id))
        wait_for(lambda: not submissions.live.busy)
        cards = snapshotter.take().tell(ClientState())["cards"]
        assert len(cards["items"]) == KEEP
        sizes.append(len(json.dumps(cards)))
    assert sizes[1] < 1.05 * sizes[0]
    assert (
        snapshotter.take().tell(ClientState(lab.session.feed.name, cards=cards["since"]))["cards"]["items"]
        == []
    )
