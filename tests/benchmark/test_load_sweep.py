"""What is concluded from loads, and the whole of it. How long a second is decides nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from labkit.analysis.client_measures import Measure, summary
from labkit.analysis.reference import DifferentTokens
from labkit.benchmark.__main__ import main
from labkit.benchmark.serving.load_report import RateRow, knee, table
from labkit.benchmark.serving.load_sweep import (
    LoadPlan,
    TargetServer,
    compare,
    mean_queue_time,
    most_at_once,
)
from labkit.benchmark.serving.processes import Answer, ServerProcess
from tests.analysis.test_client_measures import answered
from tests.benchmark.test_load_client import until_gone
from tests.serving.api_server import MODEL


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
    assert mean_queue_time({}, {}) is None
    assert mean_queue_time({f"{name}_count": 3.0, f"{name}_sum": 2.0}, after) == 3
    assert mean_queue_time({}, after) == 1.6
    assert mean_queue_time(after, after) is None


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
            bench = TargetServer(LoadPlan(), None, server, FakeBar())
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
