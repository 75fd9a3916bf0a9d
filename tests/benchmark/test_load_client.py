"""The load generator: what it sends, and what it makes of answers. How long a second is decides nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from labkit.analysis.client_measures import Measure, Slo, summary
from labkit.benchmark.serving import load
from labkit.benchmark.serving.arrivals import Arrival, Lengths, at_once, poisson
from labkit.benchmark.serving.load_report import knee
from labkit.benchmark.serving.load_sweep import (
    LoadPlan,
    most_at_once,
)
from labkit.benchmark.serving.processes import numbers
from labkit.models.tiny import tiny_tokenizer
from labkit.sampling_params import SamplingParams
from tests.analysis.test_client_measures import answered
from tests.serving.api_server import MODEL, Served, served
from tests.waiting import wait_for

SHORT = {"prompts": Lengths(10, 0.5, 6, 30), "answers": Lengths(6, 0.5, 3, 12)}


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served() as site:
        yield site


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lengths(10, 1, 0, 20), "low must be between 1 and 10"),
        (lambda: Lengths(10, 1, 5, 8), "high must be between 10"),
        (lambda: Lengths(10, -1, 5, 20), "sigma must be between 0"),
        (lambda: poisson(tiny_tokenizer(), 0, 10), "rate must be between"),
        (lambda: poisson(tiny_tokenizer(), 1, 0), "seconds must be between"),
        (
            lambda: at_once(tiny_tokenizer(), 1, prompts=Lengths(10, 1, 5, 10**6)),
            "prompts: high must be below",
        ),
        (lambda: load.run("http://x", [], seconds=1), "seconds goes with clients"),
        (lambda: load.run("http://x", [], clients=0), "clients must be between 1"),
        (lambda: LoadPlan(rates=[]), "rates is empty"),
        (lambda: LoadPlan(rates=[1, -1]), "rates must be between"),
        (lambda: LoadPlan(seconds=0), "seconds must be between"),
        (lambda: summary([]), "measures is empty"),
        (lambda: summary([answered(0, 1)], between=(2, 1)), "between must be two times"),
        (lambda: knee([]), "rows is empty"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- one stream, with a clock of its own ----------------------------------------------------------


def read(*events: tuple[float, Any], asked: int = 3) -> Measure:
    """What is made of a stream whose lines come at these times."""
    now = 0.0
    measure = Measure(0.5, asked)

    async def lines() -> AsyncIterator[str]:
        nonlocal now
        for at, data in events:
            now = at
            yield data if isinstance(data, str) else f"data: {json.dumps(data)}"
            yield ""

    asyncio.run(load.follow(lines(), measure, lambda: now))
    return measure


def piece(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}], **more}


def test_times_and_tokens_of_a_stream() -> None:
    measure = read(
        (1.0, piece("a", usage=None)),
        (1.25, piece("", usage=None)),  # half a character: nothing to see yet
        (1.5, piece("bc", usage=None)),
        (2.5, piece("d", "length", usage=None)),
        (2.75, {"choices": [], "usage": {"completion_tokens": 5}}),
        (3.0, "data: [DONE]"),
    )
    assert (measure.text, measure.tokens, measure.counted, measure.error) == ("abcd", 5, True, "")
    assert measure.times == [1.0, 1.5, 2.5]
    assert (measure.ttft, measure.gaps, measure.tpot) == (0.5, [0.5, 1.0], 1.5 / 4)
    assert measure.e2e == 2.25


def test_a_stream_need_not_say_how_many_tokens_it_has_nor_that_it_is_done() -> None:
    measure = read((1.0, ": a comment"), (1.0, piece("a")), (2.0, piece("b")), (3.0, piece("", "stop")))
    assert (measure.text, measure.tokens, measure.counted, measure.error) == ("ab", 2, False, "")
    assert measure.end == 3.0


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([(1.0, piece("a"))], "the stream ended before the answer did"),
        ([], "the stream ended before the answer did"),
        ([(1.0, "data: [DONE]")], "the answer has no token"),
        ([(1.0, piece("a")), (2.0, {"error": {"message": "no luck"}}), (2.0, "data: [DONE]")], "no luck"),
        ([(1.0, {"error": "no luck"})], "no luck"),
        ([(1.0, "data: {oops")], "no completion: {oops"),
        ([(1.0, "data: 7")], "no completion: 7"),
        ([(1.0, piece("a", "stop", usage={}))], ""),
    ],
)
def test_what_is_wrong_with_a_stream(events: list[tuple[float, Any]], error: str) -> None:
    measure = read(*events)
    assert error in measure.error and bool(error) == bool(measure.error)


def test_special_tokens_have_no_text_but_a_time() -> None:
    measure = read((2.0, piece("", "length", usage={"completion_tokens": 3})))
    assert (measure.error, measure.times, measure.ttft) == ("", [2.0], 1.5)


# -- against our server ---------------------------------------------------------------------------


def solo(site: Served, arrival: Arrival) -> str:
    params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True)
    *_, output = site.live.stream(site.live.submit(arrival.prompt, params))
    return output.text


@pytest.mark.parametrize("clients", [None, 3])
def test_the_answers_of_a_server(site: Served, clients: int | None) -> None:
    arrivals = poisson(tiny_tokenizer(), 200, 0.1, **SHORT)
    told: list[Measure] = []
    measures = load.run(site.url, arrivals, clients=clients, tell=told.append)
    assert [measure.error for measure in measures] == [""] * 20
    assert [measure.tokens for measure in measures] == [arrival.max_tokens for arrival in arrivals]
    assert [measure.text for measure in measures] == [solo(site, arrival) for arrival in arrivals]
    assert sorted(map(id, told)) == sorted(map(id, measures))
    for measure in measures:
        assert measure.counted and measure.at <= measure.sent <= measure.times[0] <= measure.end
    if clients:
        assert most_at_once(measures) <= clients
    else:
        assert [measure.at for measure in measures] == [arrival.at for arrival in arrivals]
    site.until_quiet()


def test_sixty_streams_at_once_lose_nothing(site: Served) -> None:
    arrivals = at_once(tiny_tokenizer(), 60, **SHORT)
    measures = load.run(site.url, arrivals)
    assert [(measure.error, measure.tokens) for measure in measures] == [("", a.max_tokens) for a in arrivals]
    assert [measure.text for measure in measures[::3]] == [solo(site, arrival) for arrival in arrivals[::3]]
    site.until_quiet()
    assert numbers(site.url)["kv_cache_usage_perc"] == 0
    assert numbers(site.url)["num_requests_running"] == 0


def test_it_runs_where_an_event_loop_runs(site: Served) -> None:
    async def cell() -> list[Measure]:
        return load.run(site.url, at_once(tiny_tokenizer(), 2, **SHORT), model=MODEL)

    assert [measure.error for measure in asyncio.run(cell())] == ["", ""]


def test_a_stop_ends_it_where_an_event_loop_runs_and_the_next_run_works(site: Served) -> None:
    long = Arrival(0.0, "a long one", 150)

    async def notebook() -> None:
        site.live.speed = 5  # it would take half a minute
        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(KeyboardInterrupt):
            load.run(site.url, [long])
        stopper.join()
        site.until_quiet()
        site.live.speed = None
        (measure,) = load.run(site.url, [long])
        assert measure.tokens == 150 and not measure.error

    def stop() -> None:
        wait_for(lambda: site.live.num_unfinished)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    loop = asyncio.new_event_loop()  # `asyncio.run` would take the signal for itself
    try:
        loop.run_until_complete(notebook())
    finally:
        loop.close()


def test_a_closed_loop_ends_with_its_time(site: Served) -> None:
    endless = iter(lambda: Arrival(0.0, "some words", 4), None)
    measures = load.run(site.url, endless, clients=2, seconds=0.05)
    assert len(measures) >= 2 and not any(measure.error for measure in measures)
    assert all(measure.at < 0.05 for measure in measures)


def test_an_error_of_the_server_is_counted(site: Served) -> None:
    arrivals = [Arrival(0, "some words", 4), Arrival(0, "some words " * 300, 4), Arrival(0, "x", 10**7)]
    good, long, much = load.run(site.url, arrivals)
    assert good.error == ""
    assert long.error.startswith("HTTP 400: This model's maximum context length is 200 tokens.")
    assert much.tokens < much.asked and much.error.endswith("tokens came, and 10000000 were asked for")
    of = summary([good, long, much], slo=Slo(1e6, 1e6))
    assert (of.requests, of.errors, of.attained) == (3, 2, 1 / 3)
    (lost,) = load.run(site.url, arrivals[:1], model="another")
    assert lost.error.startswith("HTTP 404: model 'another' is not served here")
    site.until_quiet()


def until_gone(told: list[Measure]) -> Iterator[Arrival]:
    """Arrivals until one of those told was refused a connection, and one more."""
    for i in itertools.count():
        yield Arrival(i / 50, "x", 5)
        if any(measure.error.startswith("ConnectError") for measure in told):
            yield Arrival(i / 50, "x", 5)
            return


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(load.ServerError, match=r"http://127.0.0.1:1/v1/models does not answer"):
        load.run("http://127.0.0.1:1", [Arrival(0, "x", 1)])
    told: list[Measure] = []
    measures = load.run("http://127.0.0.1:1", until_gone(told), model="m", tell=told.append)
    assert measures[0].error.startswith("ConnectError")
    assert measures[-1].error.startswith("not sent") and measures[-1].sent is None
    assert summary(measures).errors == len(measures) == len(told)
    assert numbers("http://127.0.0.1:1") == {}


# -- against others -------------------------------------------------------------------------------


class Plain(BaseHTTPRequestHandler):
    """A server that knows less: it refuses fields, counts nothing, and does not say when it is done."""

    fields = frozenset({"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"})

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        self._send(200 if known else 404, json.dumps({"data": [{"id": "theirs"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if unknown := body.keys() - self.fields:
            self._send(422, json.dumps({"detail": f"unknown: {sorted(unknown)}"}).encode())
            return
        lines = [f"data: {json.dumps(piece(word))}\n\n" for word in ("so ", "it ", "ends")]
        self._send(200, "".join([*lines, f"data: {json.dumps(piece('', 'stop'))}\n\n"]).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def plain() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_server_may_know_less(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named, extras = load.supported(plain)
    assert (named, list(extras)) == ("theirs", ["stream_options"])
    (measure,) = load.run(plain, [Arrival(0, "x", 9)], model=named, extras=extras)
    assert (measure.text, measure.tokens, measure.counted, measure.error) == ("so it ends", 3, False, "")
    assert summary([measure]).uncounted == 1
    assert numbers(plain) == {}
    monkeypatch.setattr(Plain, "fields", frozenset())
    with pytest.raises(load.ServerError, match="answers no completion of model 'theirs': HTTP 422: unknown"):
        load.supported(plain)
