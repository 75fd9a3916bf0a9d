"""The load generator: what it sends, counts and concludes. How long a second is decides nothing here."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving.api_server import MODEL, Served, served

from labkit.analysis.client_measures import Measure, Slo, Spread, summary
from labkit.analysis.reference import DifferentTokens
from labkit.benchmark.__main__ import main
from labkit.benchmark.serving import load
from labkit.benchmark.serving.arrivals import Arrival, Lengths, at_once, poisson
from labkit.benchmark.serving.load_report import RateRow, knee, table
from labkit.benchmark.serving.load_sweep import Plan, _Bench, _queue, compare, most_at_once
from labkit.benchmark.serving.processes import Answer, ServerProcess, numbers
from labkit.models.tiny import tiny_tokenizer
from labkit.sampling_params import SamplingParams

SHORT = {"prompts": Lengths(10, 0.5, 6, 30), "answers": Lengths(6, 0.5, 3, 12)}


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with served() as site:
        yield site


def answered(at: float, *times: float, tokens: int = 0, error: str = "") -> Measure:
    """A request whose pieces came at these times, the last of them with the end."""
    return Measure(
        at, len(times), at, list(times), times[-1], tokens or len(times), True, "x" * len(times), error
    )


# -- arrivals -------------------------------------------------------------------------------------


def test_arrivals_are_seeded_and_other_rates_bring_the_same_requests() -> None:
    tokenizer = tiny_tokenizer()
    slow = poisson(tokenizer, 4, 25, seed=3)
    assert slow == poisson(tokenizer, 4, 25, seed=3)
    assert slow != poisson(tokenizer, 4, 25, seed=4)
    assert len(slow) == 100
    fast = poisson(tokenizer, 8, 25, seed=3)
    assert [(a.prompt, a.max_tokens) for a in fast[:100]] == [(a.prompt, a.max_tokens) for a in slow]
    assert fast[7].at / fast[3].at == pytest.approx(slow[7].at / slow[3].at)


def test_arrivals_are_as_random_as_a_poisson_process() -> None:
    arrivals = poisson(tiny_tokenizer(), 50, 20, **SHORT)
    times = [arrival.at for arrival in arrivals]
    assert len(times) == 1000 and times == sorted(times) and times[0] > 0 and times[-1] < 20
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.01)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)  # of an exponential: the mean
    assert sum(gap < 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(1 - 2.71828**-1, abs=0.04)


def test_lengths_have_their_median_a_heavy_tail_and_bounds() -> None:
    tokenizer = tiny_tokenizer()
    arrivals = at_once(tokenizer, 600, prompts=Lengths(40, 1.0, 8, 300), answers=Lengths(24, 0.8, 4, 64))
    asked = [arrival.max_tokens for arrival in arrivals]
    assert (min(asked), max(asked)) == (4, 64)
    assert statistics.median(asked) == pytest.approx(24, abs=3)
    lengths = [len(tokenizer.encode(arrival.prompt)) for arrival in arrivals]
    assert min(lengths) >= 6 and max(lengths) <= 304  # cut in the middle of a word, it may be some others
    assert statistics.mean(lengths) > 1.2 * statistics.median(lengths)


def test_no_prompt_begins_like_another_and_another_text_keeps_the_lengths() -> None:
    tokenizer = tiny_tokenizer()
    one, other = (at_once(tokenizer, 200, text=text) for text in ("a", "b"))
    assert len({arrival.prompt[:4] for arrival in one + other}) > 395
    assert [a.max_tokens for a in one] == [a.max_tokens for a in other]
    lengths = ([len(tokenizer.encode(arrival.prompt)) for arrival in some] for some in (one, other))
    assert all(abs(a - b) <= 10 for a, b in zip(*lengths, strict=True))  # a word cut in two is some tokens


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
        (lambda: Plan(rates=[]), "rates is empty"),
        (lambda: Plan(rates=[1, -1]), "rates must be between"),
        (lambda: Plan(seconds=0), "seconds must be between"),
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


# -- what it comes to -----------------------------------------------------------------------------


def test_a_summary_counts_by_hand() -> None:
    measures = [
        answered(0, 1, 2, 3),  # TTFT 1, gaps of 1
        answered(1, 2, 2.5, 3, 3.5),  # TTFT 1, gaps of a half
        answered(2, 6, 9),  # TTFT 4, a gap of 3
        answered(3, 4, error="no luck"),
    ]
    of = summary(measures, slo=Slo(1, 0.75))
    assert (of.requests, of.errors, of.first_error, of.between) == (4, 1, "no luck", (0, 9))
    assert of.ttft == Spread(1, 4, 4) and of.e2e == Spread(3, 7, 7)
    assert of.itl == Spread(statistics.median([1, 1, 0.5, 0.5, 0.5, 3]), 3, 3)
    assert of.e2e_mean == pytest.approx((3 + 2.5 + 7) / 3)
    assert (of.done, of.tokens) == (3 / 9, 10 / 9)
    assert (of.good, of.attained) == (1 / 9, 1 / 4)  # the second alone, of all four
    assert of.in_flight == (3 + 2.5 + 7 + 1) / 9
    assert "4 requests, 1 errors (no luck)" in str(of) and "TTFT: median 1.000 s" in str(of)


def test_rates_can_count_a_part_of_the_time() -> None:
    measures = [answered(0, 1, 2, 3), answered(1, 2, 2.5, 3, 3.5), answered(2, 6, 9)]
    of = summary(measures, between=(2, 4))
    assert (of.done, of.tokens, of.in_flight) == (2 / 2, (2 + 4) / 2, (1 + 1.5 + 2) / 2)
    assert of.ttft.p99 == 4  # latencies are of all
    assert of.good is None and of.attained is None


def test_a_summary_without_any_answer_has_no_latencies() -> None:
    of = summary([Measure(0, 5, end=1.0, error="x"), Measure(0, 5, end=2.0, error="y")])
    assert (of.errors, of.ttft, of.itl, of.e2e_mean, of.done) == (2, None, None, None, 0)
    assert RateRow(1.0, of).power == 0 and "-" in RateRow(1.0, of).cells()
    str(of)


def test_late_is_what_the_client_is_to_blame_for() -> None:
    one, other = answered(1, 2), answered(2, 3)
    one.sent = 1.25
    assert summary([one, other, Measure(3, 1, end=3, error="never sent")]).late == 0.25


def curve(rates: Sequence[float], seconds: Any) -> list[RateRow]:
    """Rows in which every request that comes is served, in a time that depends on the rate."""
    rows = []
    for rate in rates:
        measures = [answered(i / rate, i / rate + seconds(rate)) for i in range(200)]
        rows.append(RateRow(rate, summary(measures, between=(10 / rate, 200 / rate))))
    return rows


@pytest.mark.parametrize(
    ("seconds", "place"),
    [
        (lambda rate: 1 / (1 - rate), 4),  # M/M/1, whose knee is at half its capacity
        (lambda rate: 1.0, 8),  # no knee in sight
        (lambda rate: 1.0 if rate < 0.75 else 100.0, 6),  # a cliff
        (lambda rate: rate**2, 0),  # beyond it from the start
    ],
)
def test_the_knee_is_where_power_is_greatest(seconds: Any, place: int) -> None:
    rows = curve([i / 10 for i in range(1, 10)], seconds)
    assert knee(rows) == place
    assert (
        table(rows, place)[2 + place].endswith("*") and sum("*" in line for line in table(rows, place)) == 1
    )


def test_the_most_at_one_time() -> None:
    measures = [answered(0, 2), answered(1, 3), answered(2, 4), Measure(0, 1, end=9.0, error="never sent")]
    assert most_at_once(measures) == 2  # one ends as another begins
    assert most_at_once([]) == 0


def test_a_queue_is_the_difference_of_two_looks() -> None:
    name = "request_queue_time_seconds"
    after = {f"{name}_count": 5.0, f"{name}_sum": 8.0}
    assert _queue({}, {}) is None
    assert _queue({f"{name}_count": 3.0, f"{name}_sum": 2.0}, after) == 3
    assert _queue({}, after) == 1.6
    assert _queue(after, after) is None


def test_answers_that_differ_are_refused_in_fp32_and_counted_in_half_precision() -> None:
    measures = [answered(0, 1, 2), answered(0, 1, 2, 3)]
    right = [Answer("xx", 2), Answer("xxx", 3)]
    assert compare(measures, right, "float32").startswith("All 2 answers over HTTP")
    for wrong in ([right[0], Answer("xxy", 3)], [right[0], Answer("xxx", 4)]):
        with pytest.raises(DifferentTokens, match=r"1 of 2 answers .* \(first: number 1\); no speed"):
            compare(measures, wrong, "float32")
        assert compare(measures, wrong, "bfloat16").startswith("1 of 2 answers")
    measures[1].error = "no luck"
    with pytest.raises(RuntimeError, match="over HTTP failed: no luck"):
        compare(measures, right, "bfloat16")


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


def test_a_closed_loop_ends_with_its_time(site: Served) -> None:
    endless = iter(lambda: Arrival(0.0, "some words", 4), None)
    measures = load.run(site.url, endless, clients=2, seconds=0.05)
    assert len(measures) >= 2 and not any(measure.error for measure in measures)
    assert all(measure.at < 0.05 for measure in measures)


def test_an_error_of_the_server_is_counted(site: Served) -> None:
    arrivals = [Arrival(0, "some words", 4), Arrival(0, "some words " * 300, 4), Arrival(0, "x", 10**7)]
    good, long, much = load.run(site.url, arrivals)
    assert good.error == ""
    assert long.error.startswith("HTTP 400: prompt has") and "max_model_len is 200" in long.error
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


DYING = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Dying(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": [{"id": "mortal"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"text": "a"}]}\\n\\n')
        self.wfile.flush()
        print("out of breath", file=sys.stderr)
        print('{"id": "a request"}', file=sys.stderr, flush=True)
        os._exit(3)

server = HTTPServer(("127.0.0.1", 0), Dying)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_server_that_dies_ends_the_run_and_says_so() -> None:
    with tempfile.TemporaryFile("a+b") as log:
        server = ServerProcess([sys.executable, "-c", DYING], "", log)
        try:
            while not server.last_words().isdecimal():
                server.check("before it listened", patience=0.05)
            server.url = f"http://127.0.0.1:{server.last_words()}"
            server.wait()
            bench = _Bench(Plan(), None, server, FakeBar())
            told: list[Measure] = []
            with pytest.raises(RuntimeError) as ended:
                bench.run("2.00 requests/s", until_gone(told), tell=told.append)
        finally:
            server.stop()
    assert str(ended.value) == (
        f"the server ended with status 3 in the middle of this: 2.00 requests/s; {len(told)} of {len(told)} "
        "requests were lost; it said: out of breath"
    )
    assert all(measure.error for measure in told)
    assert any(measure.error.startswith("not sent") for measure in told)
    assert sum(measure.text == "a" for measure in told) == 1


class FakeBar:
    def set_description(self, what: str) -> None:
        pass


# -- all of it ------------------------------------------------------------------------------------


def test_the_whole_of_it_on_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--serve --model tiny-random --device cpu --requests 4 --repeats 1 --streams 24 --seed 5"
    arguments += " --rates 40 20 --rate-seconds 0.5 --max-num-seqs 8 --slo-ttft 60"
    files = {"--json": tmp_path / "load.json", "--figure": tmp_path / "load.html"}
    more = [str(part) for pair in files.items() for part in pair]
    status = main([*arguments.split(), *more])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    out, report = captured.out, json.loads(files["--json"].read_text())
    assert "All 4 answers over HTTP have the text and the number of tokens of the engine alone" in out
    assert "24 streams" in out and "24 complete" in out and "no error, 0 tokens lost" in out
    assert "12 of 12 looked at have the text of a solo run; left in the server: nothing." in out
    assert [row["rate"] for row in report["rows"]] == [20, 40]
    assert [row["summary"]["requests"] for row in report["rows"]] == [10, 20]
    for row in (*report["rows"], report["half"]):
        assert row["summary"]["errors"] == 0 and row["queue"] is not None
    assert report["half"]["rate"] == pytest.approx(report["knee_rate"] / 2)
    assert report["itl_ratio_at_half_the_knee"] > 0 and "Knee (*)" in out
    assert report["slo"][0] == 60 and report["slo"][1] == 5 * report["unloaded"]["itl"][0]
    assert report["settings"]["prompts"].startswith("log-normal")
    assert "plotly" in files["--figure"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "1"], "--rates goes with --serve"),
        (["--stream", "--streams", "5"], "--streams goes with --serve"),
        (["--serve", "--url-model", "x"], "--url-model goes with --url"),
        (["--serve", "--rates", "0"], "rates must be between"),
        (["--serve", "--streams", "-1"], "streams must be between 0"),
        (["--serve", "--max-num-seqs", "1", "8"], "several numbers only with --shapes"),
        (["--serve", "--model", "no-such", "--streams", "0"], "no model 'no-such'"),
        (
            ["--serve", "--model", MODEL, "--url", "http://127.0.0.1:1"],
            "127.0.0.1:1/v1/models does not answer",
        ),
    ],
)
def test_arguments_that_cannot_be_served(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_a_benchmark_that_is_told_to_stop_leaves_no_server_behind() -> None:
    command = [sys.executable, "-m", "labkit.benchmark", "--serve", "--model=tiny-random"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as benchmark:
        servers: list[psutil.Process] = []
        while not servers and benchmark.poll() is None:
            children = psutil.Process(benchmark.pid).children()
            servers = [child for child in children if "labkit.server" in child.cmdline()]
            time.sleep(0.1)
        benchmark.terminate()
        assert benchmark.wait(60) == 143
    gone, alive = psutil.wait_procs(servers, timeout=30)
    assert len(gone) == 1 and not alive
