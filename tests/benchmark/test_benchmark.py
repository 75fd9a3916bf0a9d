"""What the benchmark counts, compares and refuses. Its seconds are nobody's business here."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from labkit.analysis.reference import Run
from labkit.analysis.workload import Job, make_workload
from labkit.benchmark.__main__ import main
from labkit.benchmark.engine import perplexity
from labkit.benchmark.engine.bookkeeping import BookkeepingReport, TraceCost
from labkit.benchmark.engine.meter import Meter, peak_memory
from labkit.benchmark.engine.runs import System, run_engine, take_turns
from labkit.benchmark.engine.schedulers import measure
from labkit.benchmark.serving.watched import watched
from labkit.benchmark.serving.watchers import Watchers
from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.models.teacher_forcing import teacher_forced
from tests.analysis.test_reference import run_of


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


@pytest.fixture(scope="module")
def jobs(tiny: LoadedModel) -> list[Job]:
    return make_workload(tiny.tokenizer, 4, prompt_tokens=(4, 24), output_tokens=(3, 8))


# -- the meter ------------------------------------------------------------------------------------


def test_a_meter_divides_the_steps_and_leaves_no_trace(tiny: LoadedModel, jobs: list[Job]) -> None:
    engine = Engine(EngineConfig(model=tiny))
    model, sample = engine.runner.model, engine.runner.sample
    meter = Meter()
    assert meter.bookkeeping_share is None
    with meter.watching(engine):
        engine.add_request(jobs[0].prompt)
        engine.step()
    assert 0 < meter.computing_seconds < meter.step_seconds
    assert 0 < meter.bookkeeping_share < 1
    assert engine.runner.model is model
    assert engine.runner.sample is sample
    assert "step" not in vars(engine)
    assert peak_memory(torch.device("cpu")) is None or peak_memory(torch.device("cpu")) > 2**20


def test_metered_tokens_are_the_same(tiny: LoadedModel, jobs: list[Job]) -> None:
    config = EngineConfig(model=tiny)
    plain, metered = run_engine(config, jobs), run_engine(config, jobs, watching=Meter().watching)
    assert metered.tokens == plain.tokens
    assert list(metered.records) == list(plain.records)


# -- runs -----------------------------------------------------------------------------------------


def test_what_may_fail_has_a_reason_and_what_may_not_raises(jobs: list[Job]) -> None:
    calls: list[str] = []

    def good(some: list[Job], bar: object) -> Run:
        calls.append("good")
        return run_of([1])

    def bad(some: list[Job], bar: object) -> Run:
        calls.append("bad")
        raise OSError("no luck\nat all")

    todo = [System("good", good, jobs), System("bad", bad, jobs, optional=True)]
    runs, failed, said = take_turns(todo, 2, check=lambda runs: "fine", progress=False)
    assert calls == ["good", "bad", "good"]  # in turn, and never again
    assert list(runs) == ["good"]
    assert failed == {"bad": "OSError: no luck"} and said == "fine"
    with pytest.raises(OSError, match="no luck"):
        take_turns([System("bad", bad, jobs)], 1, check=lambda runs: "fine", progress=False)


def test_the_three_schedulers_in_one_table(tiny: LoadedModel, jobs: list[Job]) -> None:
    report = measure(tiny, None, jobs, max_num_seqs=2, repeats=1, progress=False)
    assert report.same_tokens.startswith("All 3 systems gave the same")
    assert [row.system for row in report.rows] == ["naive", "static", "continuous"]
    assert report.rows[0].speedup == 1
    assert report.rows[2].steps < report.rows[0].steps
    json.dumps(report.to_json())


# -- watched --------------------------------------------------------------------------------------


def test_being_watched_changes_no_token_and_all_watchers_get_every_frame(
    tiny: LoadedModel, jobs: list[Job]
) -> None:
    report = watched(tiny, jobs, count=3, seats=2, repeats=2, progress=False)
    assert report.same_tokens.startswith("All 2 systems gave the same")
    assert list(report.tokens_per_second) == ["not watched", "watched by 3"]
    assert report.ratio == report.tokens_per_second["watched by 3"] / report.tokens_per_second["not watched"]
    assert report.frames_per_second > 0 and report.bytes_per_frame > 100 and report.lost == 0
    assert "Watched, the engine gives" in str(report) and "frames a second of" in str(report)
    json.dumps(report.to_json())


def test_a_watcher_counts_events_however_they_come_and_notices_the_end() -> None:
    pieces = [b"data: 1\n\ndata: 2\n", b"\ndata: 3", b"\n\n", b"data: 4\n\n"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer(status: bytes) -> socket.socket:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
            return connection

        with ThreadPoolExecutor() as pool:
            answering = pool.submit(answer, b"200 OK")
            watchers = Watchers(port, "/stream", 1)
            connection = answering.result()
            for piece in pieces:
                seen = watchers.bytes
                connection.sendall(piece)
                while watchers.bytes == seen:
                    watchers.look()
            connection.close()
            while not watchers.lost:
                watchers.look()
            assert watchers.frames == [4]
            pool.submit(answer, b"404 Not Found")
            with pytest.raises(ConnectionError, match=r"there is no stream: .*404"):
                Watchers(port, "/stream", 1)


# -- perplexity -----------------------------------------------------------------------------------


def test_pieces_cover_the_text_and_predict_something() -> None:
    assert [list(piece) for piece in perplexity.pieces(range(7), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(piece) for piece in perplexity.pieces(range(8), 3)][-1] == [6, 7]


def test_perplexity_is_that_of_the_logits_and_int8_stays_near(tiny: LoadedModel) -> None:
    text = make_workload(tiny.tokenizer, 1, prompt_tokens=(90, 90))[0].prompt
    int8 = load_model("tiny-random", device="cpu", quantization="int8", say=None)
    same, cache, other = perplexity.compare_text(tiny, [("int8", int8)], text, size=40, int8_kv=True)
    nats = []
    for first in (0, 40, 80):
        piece = text[first : first + 40]
        logits = teacher_forced(tiny.module, piece).double().log_softmax(-1)
        nats += [-float(logits[i, token]) for i, token in enumerate(piece[1:])]
    assert same.positions == len(nats) == 87
    assert same.perplexity == pytest.approx(torch.tensor(nats).mean().exp().item(), rel=1e-3)
    assert (same.ratio, same.top1_agreement) == (1, 1)
    assert (cache.precision, other.precision, cache.target) == ("int8 KV", "int8", 0.003)
    assert cache.top1_agreement > 0.8 and 0.95 < cache.ratio < 1.05
    assert 0.8 < other.top1_agreement <= 1
    assert 0.9 < other.ratio < 1.1
    table = perplexity.table([same, cache, other])
    assert "int8 KV" in table and "2%" in table and "0.3%" in table
    outside = perplexity.Perplexity("bad", 87, 9.0, 1.03, 0.5)
    assert "OUTSIDE" in perplexity.table([same, outside])


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests must be at least 1"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--max-num-seqs", "1", "8"], "several numbers only with --shapes"),
        (["--slow-seconds", "nan", "--ladder"], "--slow-seconds must be at least 1"),
        (["--watched", "0"], "--watched must be at least 1"),
        (["--peers"], "--peers goes with --ladder"),
        (["--rungs", "int8"], "--rungs goes with --ladder"),
        (["--busy"], "--busy goes with --peer"),
        (["--peer", "vllm"], "--peer takes transformers, vllm=PYTHON"),
        (["--stream", "--figure", "x.html"], "--figure goes with --ladder"),
        (["--ladder", "--shapes", "tiny", "--figure", "x.html"], "--figure draws one ladder"),
        (["--ladder", "--shapes", "GPT-9"], "no shape 'GPT-9'"),
        (["--ladder", "--json", "/nowhere/at/all.json"], "--json: there is no folder /nowhere/at"),
        (["--ladder", "--figure", "/nowhere/at/all.html"], "--figure: there is no folder /nowhere/at"),
        (["--ladder", "--device", "cpu", "--model", "no-such"], "no model 'no-such'"),
        (
            ["--ladder", "--device", "cpu", "--model", "tiny-random", "--rungs", "CUDA graphs"],
            "there is no rung 'CUDA graphs' on cpu",
        ),
    ],
)
def test_arguments_that_cannot_be_served(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("arguments", [["--rungs", "warp"], ["--ladder", "--stream"], ["--systems", "none"]])
def test_arguments_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_bookkeeping_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def report(trace_steps: int) -> BookkeepingReport:
        return BookkeepingReport([], TraceCost(32, trace_steps, 200.0, 50.0))

    monkeypatch.setattr("labkit.benchmark.engine.bookkeeping.report", report)
    file = tmp_path / "figures.json"
    assert main(["--bookkeeping", "--trace-steps", "9", "--json", str(file)]) == 0
    assert capsys.readouterr().out == f"{report(9)}\n" and "A trace of 9 steps of 32 requests" in str(
        report(9)
    )
    trace = {"running": 32, "steps": 9, "memory": 200.0, "disk": 50.0}
    assert json.loads(file.read_text()) == {"cells": [], "trace": trace}
