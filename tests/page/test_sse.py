"""One stream for all: who gets what, and that nobody holds up anybody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import gradio as gr
import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from labkit.config import EngineConfig
from labkit.core.block_pool import BlockPool
from labkit.core.plan import StepResult
from labkit.core.recorder import record_step
from labkit.core.request import Request
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.page import sse
from labkit.page.gradio_page import build, serve
from labkit.page.session import Lab
from labkit.page.snapshot import Known, News
from labkit.page.sse import AGAIN, BEAT, BEHIND, PATH, Broadcast
from labkit.page.submissions import KEEP
from labkit.page.upload import MAX_BYTES
from labkit.page.visitors import mark
from labkit.sampling_params import SamplingParams
from labkit.schedulers import SCHEDULERS
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.records import StepRecord
from labkit.views.live_feed import WINDOW
from tests.page.test_session import wait_for

PATIENCE = 60  # seconds until a test gives up; nothing is decided by it
FOUR = SamplingParams(max_tokens=4, ignore_eos=True)
SIZES = dict(num_blocks=14, block_size=4, max_num_seqs=5, max_num_batched_tokens=16)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random", say=None)


@pytest.fixture
def lab(model: LoadedModel) -> Iterator[Lab]:
    with AsyncEngine(Engine(EngineConfig(model=model, **SIZES))) as live:
        lab = Lab(live)
        lab.bench.feed._min_interval = 0
        wait_for(lambda: not live.busy)
        yield lab
        lab.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SECONDS", 0.005)
    monkeypatch.setattr(sse, "SECONDS_FOR_FEW", 0.005)


class Watcher:
    """Somebody with the stream open, as a server would have them."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.start: dict[str, Any] = {}
        self.over = False
        self.gone = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.start = message
        elif message.get("more_body"):
            self.texts.append(message["body"])
        else:
            self.over = True

    @property
    def news(self) -> list[dict[str, Any]]:
        texts = [text.removeprefix(AGAIN) for text in self.texts if text != BEAT]
        assert all(text.startswith(b"data: ") and text.endswith(b"\n\n") for text in texts)
        return [json.loads(text[6:]) for text in texts]


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), PATIENCE)


async def nobody(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("it was handed on")


@asynccontextmanager
async def watching(told: Broadcast, count: int = 1) -> Any:
    """Watchers who have all heard the first news."""
    watchers = [Watcher() for _ in range(count)]
    front, scope = told.before(nobody), {"type": "http", "method": "GET", "path": PATH}
    doing = [asyncio.create_task(front(scope, watcher.receive, watcher.send)) for watcher in watchers]
    await until(lambda: all(watcher.texts for watcher in watchers))
    yield watchers[0] if count == 1 else watchers
    for watcher in watchers:
        watcher.reading.set()
        watcher.gone.set()
    await asyncio.wait_for(asyncio.gather(*doing), PATIENCE)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


# -- who gets what --------------------------------------------------------------------------------


def test_first_everything_and_then_what_is_new(lab: Lab) -> None:
    told, bench = Broadcast(News(lab)), lab.bench
    request_id = bench.desk.inject("me", "hello", FOUR, name="Ada")
    wait_for(lambda: not bench.live.busy)

    async def test() -> None:
        async with watching(told) as early:
            first = early.news[0]
            assert first["pictures"]["full"] and first["pictures"]["step"] == 3
            assert first["lab"]["settings"] == lab.settings and first["live"] == bench.desk.clock()
            assert [(card["id"], card["prompt"]) for card in first["cards"]["items"]] == [
                (request_id, "hello")
            ]
            assert dict(early.start["headers"])[b"content-type"].startswith(b"text/event-stream")
            bench.live.pause()
            await until(lambda: early.news[-1]["live"]["paused"])
            second = bench.desk.inject("me", "again", FOUR)
            await until(lambda: early.news[-1]["plan"].get("plan"))
            for step in range(4, 8):
                bench.live.single_step()
                await until(lambda step=step: early.news[-1]["pictures"]["step"] == step)
            await until(lambda: not early.news[-1]["busy"])
            later = early.news[1:]
            assert not any(news["pictures"].get("full") or "lab" in news for news in later)
            steps = [step[0] for news in later for step in news["pictures"].get("steps", ())]
            assert steps == [4, 5, 6, 7]
            text = ""
            items = [item for news in later for item in news["cards"]["items"]]
            for item in items:
                assert item["id"] == second and ("prompt" in item) == (item is items[0])
                text = text[: item["at"]] + item["text"]
            assert text == bench.live.output(second).text and items[-1]["reason"] == "length"
            async with watching(told) as late:
                assert [card["id"] for card in late.news[0]["cards"]["items"]] == [request_id, second]
                assert len(late.news[0]["pictures"]["steps"]) == 8 and late.news[0]["pictures"]["full"]

    run(test)


def test_everybody_reads_the_same_bytes(lab: Lab) -> None:
    told, desk = Broadcast(News(lab)), lab.bench.desk

    async def test() -> None:
        async with watching(told, 3) as watchers:
            desk.inject("me", "hello", FOUR)
            await until(lambda: lab.bench.live.num_unfinished == 0)
            await until(lambda: not watchers[0].news[-1]["busy"])
            await until(lambda: len({len(watcher.texts) for watcher in watchers}) == 1)
            assert len(watchers[0].texts) > 1
            for texts in zip(*(watcher.texts for watcher in watchers), strict=True):
                assert all(text is texts[0] for text in texts), "it was made once for each"

    run(test)


def test_what_is_told_is_what_a_page_that_asks_is_answered(lab: Lab) -> None:
    told, news, asking = Broadcast(News(lab)), News(lab), Known()
    heard = Known()

    async def test() -> None:
        async with watching(told) as watcher:
            for who in ("me", "you", "me"):
                lab.bench.desk.inject(who, "hello", FOUR)
                await until(lambda: lab.bench.live.num_unfinished == 0)
            await until(lambda: not watcher.news[-1]["busy"])
            for answer in watcher.news:
                heard.hear(answer)

    run(test)
    asking.hear(news.now().since(asking))
    assert heard == asking and not heard.open
    assert set(news.now().since(heard)["pictures"]) == {"feed", "step"}


def test_another_engine_is_told_from_the_beginning(lab: Lab) -> None:
    told, before = Broadcast(News(lab)), lab.bench

    async def test() -> None:
        async with watching(told, 2) as (watcher, other):
            before.desk.inject("me", "hello", FOUR)
            await until(lambda: watcher.news[-1]["cards"]["items"])
            await asyncio.to_thread(lab.change, {"max_num_seqs": 3}, running="cancel")
            await until(lambda: "lab" in watcher.news[-1])
            news = watcher.news[-1]
            assert news["pictures"]["full"] and news["pictures"]["feed"] == lab.bench.feed.name
            assert news["cards"] == {"since": 0, "items": [], "gone": [], "reset": True}
            assert news["lab"]["settings"]["max_num_seqs"] == 3
            request_id = lab.bench.desk.inject("me", "hello", FOUR)
            await until(lambda: any(c["id"] == request_id for c in watcher.news[-1]["cards"]["items"]))
            await until(lambda: len(other.texts) == len(watcher.texts))

    run(test)


def test_nobody_is_told_the_secret_of_another(lab: Lab) -> None:
    told, desk = Broadcast(News(lab)), lab.bench.desk
    secrets = [lab.visitors.arrive("tab 1"), lab.visitors.arrive("tab 2"), "the session of a program"]

    async def test() -> None:
        async with watching(told) as watcher:
            for secret in secrets:
                desk.inject(secret, "hello", FOUR)
            desk.control(secrets[0], "pause")
            await until(lambda: watcher.news[-1]["live"]["paused"])
            desk.control(secrets[0], "resume")
            await until(lambda: not watcher.news[-1]["busy"])
            async with watching(told) as late:
                texts = b"".join(watcher.texts + late.texts).decode()
                owners = [card["owner"] for card in late.news[0]["cards"]["items"]]
        assert not any(secret in texts for secret in (*secrets, "tab 1", "tab 2"))
        assert owners == [mark(secret) for secret in secrets] and len(set(owners)) == 3

    run(test)
    assert mark("") == "" and len(mark("\ud800")) == 12


# -- nobody holds up anybody ----------------------------------------------------------------------


def test_whoever_reads_too_slowly_is_let_go(lab: Lab) -> None:
    told, live = Broadcast(News(lab)), lab.bench.live

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
    news = News(lab)
    told, moments = Broadcast(news), []
    now = news.now
    monkeypatch.setattr(news, "now", lambda: moments.append(1) or now())

    async def test() -> None:
        await asyncio.sleep(0.05)
        assert not moments
        async with watching(told) as watcher:
            await until(lambda: len(moments) > 5)
            assert len(watcher.texts) == 1, "nothing was new"
        await until(lambda: told._ticking is None)
        seen = len(moments)
        await asyncio.sleep(0.05)
        assert len(moments) == seen and not told._readers

    run(test)


def test_a_heartbeat_in_the_silence(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT", 0.02)
    told = Broadcast(News(lab))

    async def test() -> None:
        async with watching(told) as watcher:
            await until(lambda: len(watcher.texts) > 3)
            assert watcher.texts[1:] == [BEAT] * (len(watcher.texts) - 1)

    run(test)


def test_a_fault_ends_the_stream_and_is_logged(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    news = News(lab)
    told = Broadcast(news)

    async def test() -> None:
        async with watching(told) as watcher:
            with monkeypatch.context() as patch:
                patch.setattr(news, "now", lambda: 1 / 0)
                await until(lambda: watcher.over)
            async with watching(told) as again:
                assert again.news[0]["pictures"]["full"]

    run(test)
    assert "the news could not be told" in caplog.text


def test_the_end_lets_go_of_everybody(lab: Lab) -> None:
    told, handed_on = Broadcast(News(lab)), []

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
    news, feed, known = News(lab), lab.bench.feed, Known()
    everything: list[int] = []
    increments: list[int] = []
    for record in steady(5_000):
        feed.append(record)
        if record.step % 2:
            moment = news.now()
            increments.append(len(sse._event(moment.since(known))))
            known.hear(moment.since(known))
        if record.step % 100 == 99:
            everything.append(len(sse._event(moment.since(Known()))))
    early = slice(WINDOW, len(increments) // 2)
    assert max(increments[len(increments) // 2 :]) < 1.1 * max(increments[early])
    assert max(everything[25:]) < 1.1 * max(everything[2:25])
    assert sum(increments[early]) / len(increments[early]) < 0.2 * max(everything), "they are increments"


def test_cards_do_not_grow_with_the_length_of_the_run(lab: Lab) -> None:
    news, desk, sizes = News(lab), lab.bench.desk, []
    for _ in range(2):
        for _ in range(KEEP + 10):
            request_id = desk.submit("me", "hello", "hello", SamplingParams(max_tokens=1))
            wait_for(lambda request_id=request_id: not desk.live.unfinished(request_id))
        wait_for(lambda: not desk.live.busy)
        cards = news.now().since(Known())["cards"]
        assert len(cards["items"]) == KEEP
        sizes.append(len(json.dumps(cards)))
    assert sizes[1] < 1.05 * sizes[0]
    assert news.now().since(Known(lab.bench.feed.name, cards=cards["since"]))["cards"]["items"] == []


# -- on a real server -----------------------------------------------------------------------------


def events(address: str, count: int = 1) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """The first events of a stream, and the answer that they came in."""
    got: list[dict[str, Any]] = []
    with httpx.stream("GET", address, timeout=PATIENCE) as response:
        if response.status_code == 200:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    got.append(json.loads(line[6:]))
                if len(got) == count:
                    break
    return response, got


def test_the_route_of_a_page_that_is_served(lab: Lab) -> None:
    page = serve(lab, share=False, quiet=True, root_path="/some/where", server_name="127.0.0.1")
    try:
        assert page.max_file_size == MAX_BYTES
        home = f"http://127.0.0.1:{page.server_port}"
        request_id = lab.bench.desk.inject("me", "hello", FOUR)
        wait_for(lambda: not lab.bench.live.busy)
        for address in (home + PATH, f"{home}/some/where{PATH}"):  # a proxy may cut it off, or not
            response, got = events(address)
            assert response.status_code == 200 and "content-encoding" not in response.headers
            assert [card["id"] for card in got[0]["cards"]["items"]] == [request_id]
        wait_for(lambda: not page.broadcast._readers)
        assert httpx.post(home + PATH).status_code in (404, 405)
        assert httpx.get(home + PATH + "/more").status_code == 404
        assert httpx.get(home + "/config").status_code == 200
        with httpx.stream("GET", home + PATH, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            assert next(lines) == "retry: 1000"
            page.close(verbose=False)
            assert len(list(lines)) == 2, "the stream ends when the page is closed"
    finally:
        page.close(verbose=False)
    assert not page.server.thread.is_alive()


def test_where_one_must_log_in_there_is_no_open_stream(lab: Lab) -> None:
    page = serve(lab, share=False, quiet=True, auth=("me", "secret"), server_name="127.0.0.1")
    try:
        assert events(f"http://127.0.0.1:{page.server_port}{PATH}")[0].status_code == 404
    finally:
        page.close(verbose=False)


def test_a_page_that_is_mounted_elsewhere_has_none(lab: Lab) -> None:
    app = gr.mount_gradio_app(FastAPI(), build(lab), path="/lab", ssr_mode=False)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

    async def test() -> None:
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        response, _ = await asyncio.to_thread(events, f"http://127.0.0.1:{port}/lab{PATH}")
        assert response.status_code == 404
        server.should_exit = True
        await serving

    run(test)
