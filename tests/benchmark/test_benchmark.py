"""What the benchmark counts, compares and refuses. Its seconds are nobody's business here."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import loaded
from transformers import LlamaConfig

from labkit.analysis.reference import (
    DifferentTokens,
    Run,
    System,
    agreement,
    compare_tokens,
    run_engine,
    take_turns,
)
from labkit.analysis.roofline import Ceiling, Shape, Work, _keys_read, _keys_seen, measure_ceiling
from labkit.analysis.workload import Job, make_noise, make_workload
from labkit.benchmark.__main__ import main
from labkit.benchmark.engine import perplexity
from labkit.benchmark.engine.meter import Meter, peak_memory
from labkit.benchmark.engine.schedulers import measure
from labkit.benchmark.serving.watched import watched
from labkit.benchmark.serving.watchers import Watchers
from labkit.config import EngineConfig
from labkit.core import model_runner
from labkit.engine import Engine
from labkit.models.load import LoadedModel, load_model
from labkit.trace.records import StepRecord

SIZES = dict(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
)
# A decodes its fifth token, B computes the first four tokens of a longer prompt.
STEP = StepRecord(
    0, ("a", "b"), kinds="dc", starts=(3, 0), num_tokens=(1, 4), sampled=((7,), ()), free_blocks=5
)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


@pytest.fixture(scope="module")
def jobs(tiny: LoadedModel) -> list[Job]:
    return make_workload(tiny.tokenizer, 4, prompt_tokens=(4, 24), output_tokens=(3, 8))


def run_of(*answers: list[int], name: str = "x", seconds: float = 1.0) -> Run:
    return Run(name, seconds, list(answers), [[float(i) for i, _ in enumerate(a)] for a in answers])


# -- the floor ------------------------------------------------------------------------------------


def test_bytes_and_operations_of_a_step_counted_by_hand() -> None:
    shape = Shape.of_config(LlamaConfig(**SIZES), ((None, 2),), weight_bytes=4, value_bytes=4)
    weights = 16 * 8 + 8 * 8 + 24 * 8 + 8 * 12  # qkv, o, gate and up, down
    assert shape.layer_parameters == weights == 480
    per_layer = 4 * (480 + 2 * 8)  # and two norms
    pages = 32 * (5 + 4 + 4)  # five tokens written; A reads four, B its own four; 2 * 2 heads * 2 * 4 bytes
    embeddings, norm, output = 5 * 8 * 4, 8 * 4, 10 * 8 * 4
    pairs = 4 + (1 + 2 + 3 + 4)  # of a query and a key
    assert shape.work(STEP) == Work(
        2 * (per_layer + pages) + embeddings + norm + output,
        2 * (2 * 480 * 5 + 4 * 4 * 2 * pairs) + 2 * 80,  # one row alone samples
    )
    assert shape.work(STEP) == Work(5312, 10656)


def test_a_step_of_int8_reads_a_byte_for_a_weight_and_a_scale_for_a_channel() -> None:
    shape = Shape.of_config(LlamaConfig(**SIZES), ((None, 2),), weight_bytes=1, value_bytes=4)
    per_layer = 480 + 4 * (16 + 8 + 24 + 8) + 4 * 2 * 8
    assert shape.work(STEP).bytes == 2 * (per_layer + 32 * 13) + 5 * (8 + 4) + 8 * 4 + (80 + 40)
    assert shape.work(STEP).operations == 10656


def test_padding_is_computed_and_an_idle_seat_goes_through_the_output_layer() -> None:
    shape = Shape.of_config(LlamaConfig(**SIZES), ((None, 2),), weight_bytes=4, value_bytes=4)
    one = StepRecord(0, ("a",), kinds="d", starts=(3,), num_tokens=(1,), sampled=((7,),))
    with_idle = StepRecord(
        0, ("a", "b"), kinds="di", starts=(3, 2), num_tokens=(1, 0), sampled=((7,), ()), padding=(0, 1)
    )
    more = shape.work(with_idle).operations - shape.work(one).operations
    assert more == 2 * 2 * 480 + 2 * 80
    assert shape.work(with_idle).bytes - shape.work(one).bytes == 8 * 4  # its embedding
    assert shape.work(StepRecord(0)) == Work()


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_windows_are_counted_as_one_by_one(window: int | None) -> None:
    for start in range(7):
        for queries in range(1, 7):
            seen = [
                {k for k in range(p + 1) if window is None or k > p - window}
                for p in range(start, start + queries)
            ]
            assert _keys_seen(start, queries, window) == sum(map(len, seen))
            assert _keys_read(start, queries, window) == len(set().union(*seen))


def test_parameters_of_a_shape_are_those_of_the_model(family: str) -> None:
    model = loaded(family)
    shape = Shape.of(model)
    assert shape.layers == len(model.module.layers)
    counted = shape.layers * (shape.layer_parameters + shape.vectors) + shape.hidden
    counted += shape.vocab * shape.hidden * (1 if model.config.tie_word_embeddings else 2)
    assert counted == sum(parameter.numel() for parameter in model.module.parameters())


def test_the_floor_is_the_slower_of_moving_and_computing_step_by_step() -> None:
    ceiling = Ceiling(100.0, {"float32": 1000.0})
    works = [Work(200, 500), Work(10, 4000)]
    assert ceiling.floor(works, "float32") == 2.0 + 4.0
    best = ceiling.best(Ceiling(90.0, {"float32": 1500.0}))
    assert best == Ceiling(100.0, {"float32": 1500.0})


def test_a_ceiling_is_measured_in_the_dtypes_asked_for() -> None:
    sizes = dict(read_bytes=2**20, gemm_size=64, repeats=1)
    ceiling = measure_ceiling(torch.device("cpu"), torch.float32, int8=True, **sizes)
    assert ceiling.bandwidth > 0
    assert set(ceiling.peak) == {"float32", "int8"}
    assert min(ceiling.peak.values()) > 0


# -- the meter ------------------------------------------------------------------------------------


def test_a_meter_divides_the_steps_and_leaves_no_trace(tiny: LoadedModel, jobs: list[Job]) -> None:
    engine = Engine(EngineConfig(model=tiny))
    model, sample = engine.runner.model, model_runner.sample
    meter = Meter()
    assert meter.bookkeeping_share is None
    with meter.watching(engine):
        engine.add_request(jobs[0].prompt)
        engine.step()
    assert 0 < meter.computing_seconds < meter.step_seconds
    assert 0 < meter.bookkeeping_share < 1
    assert engine.runner.model is model
    assert model_runner.sample is sample
    assert "step" not in vars(engine)
    assert peak_memory(torch.device("cpu")) is None or peak_memory(torch.device("cpu")) > 2**20


def test_metered_tokens_are_the_same(tiny: LoadedModel, jobs: list[Job]) -> None:
    config = EngineConfig(model=tiny)
    plain, metered = run_engine(config, jobs), run_engine(config, jobs, meter=Meter())
    assert metered.tokens == plain.tokens
    assert list(metered.records) == list(plain.records)


# -- runs -----------------------------------------------------------------------------------------


def test_agreement_names_the_first_difference() -> None:
    true = run_of([1, 2, 3], [4, 5], [6])
    assert agreement(true, run_of([1, 2, 3], [4, 6])) == [None, 1]
    assert agreement(true, run_of([1, 2], [4, 5, 6], [6])) == [2, 2, None]


def test_other_tokens_are_refused_in_fp32_and_counted_in_half_precision() -> None:
    runs = [run_of([1, 2], [3, 4], name="a"), run_of([1, 2], [3, 5], name="b")]
    with pytest.raises(DifferentTokens, match=r"b and a disagree on 1 of 2 answers \(first: number 1\)"):
        compare_tokens(runs, torch.float32)
    assert "1 of 2 equal answers" in compare_tokens(runs, torch.bfloat16)
    few = run_of([1, 2], name="few")
    assert compare_tokens([few, runs[0]], torch.float32) == "All 2 systems gave the same 4 tokens."


def test_what_may_fail_has_a_reason_and_what_may_not_raises(jobs: list[Job]) -> None:
    calls: list[str] = []

    def good(some: list[Job], bar: object) -> Run:
        calls.append("good")
        return run_of([1])

    def bad(some: list[Job], bar: object) -> Run:
        calls.append("bad")
        raise OSError("no luck\nat all")

    todo = [System("good", good, jobs), System("bad", bad, jobs, optional=True)]
    runs, failed = take_turns(todo, 2, check=lambda runs: None, progress=False)
    assert calls == ["good", "bad", "good"]  # in turn, and never again
    assert list(runs) == ["good"]
    assert failed == {"bad": "OSError: no luck"}
    with pytest.raises(OSError, match="no luck"):
        take_turns([System("bad", bad, jobs)], 1, check=lambda runs: None, progress=False)


def test_the_three_schedulers_in_one_table(tiny: LoadedModel, jobs: list[Job]) -> None:
    report = measure(tiny, None, jobs, max_num_seqs=2, repeats=1, progress=False)
    assert report.same_tokens.startswith("All 3 systems gave the same")
    assert [row.system for row in report.rows] == ["naive", "static", "continuous"]
    assert report.rows[0].speedup == 1
    assert report.rows[2].steps < report.rows[0].steps
    json.dumps(report.to_json())


def test_a_workload_of_noise_is_seeded_and_within_its_bounds() -> None:
    jobs = make_noise(50, 20, seed=3, prompt_tokens=(2, 9), output_tokens=(1, 5))
    assert jobs == make_noise(50, 20, seed=3, prompt_tokens=(2, 9), output_tokens=(1, 5))
    assert all(2 <= len(job.prompt) <= 9 and 1 <= job.max_tokens <= 5 for job in jobs)
    assert all(0 <= token < 50 for job in jobs for token in job.prompt)


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
    same, other = perplexity.compare_text(tiny, [("int8", int8)], text, size=40)
    nats = []
    for first in (0, 40, 80):
        piece = text[first : first + 40]
        logits = perplexity.teacher_forced(tiny.module, piece).double().log_softmax(-1)
        nats += [-float(logits[i, token]) for i, token in enumerate(piece[1:])]
    assert same.positions == len(nats) == 87
    assert same.perplexity == pytest.approx(torch.tensor(nats).mean().exp().item(), rel=1e-3)
    assert (same.ratio, same.top1_agreement) == (1, 1)
    assert other.precision == "int8"
    assert 0.8 < other.top1_agreement <= 1
    assert 0.9 < other.ratio < 1.1
    table = perplexity.table([same, other])
    assert "int8" in table and "2%" in table
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
    monkeypatch.setattr("labkit.benchmark.engine.bookkeeping.report", lambda trace_steps: {"n": trace_steps})
    monkeypatch.setattr("labkit.benchmark.engine.bookkeeping.table", lambda figures: "a table")
    file = tmp_path / "figures.json"
    assert main(["--bookkeeping", "--trace-steps", "9", "--json", str(file)]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert json.loads(file.read_text()) == {"n": 9}
