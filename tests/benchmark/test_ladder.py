"""The ladder on a tiny model: what it runs, refuses, counts and shows."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.analysis.devices import Ceiling
from labkit.analysis.reference import DifferentTokens, Run, reference_model, run_reference
from labkit.analysis.roofline import Shape
from labkit.analysis.shapes import SHAPES, config_of, random_model, random_reference
from labkit.analysis.workload import Job, make_noise, make_workload
from labkit.benchmark.__main__ import main
from labkit.benchmark.engine import ladder as ladder_module
from labkit.benchmark.engine.ablations import NAMES, Sizes, ablations_for
from labkit.benchmark.engine.ladder import Contender, climb
from labkit.benchmark.engine.ladder_report import LadderReport, figure
from labkit.benchmark.engine.peers import run_padded
from labkit.benchmark.engine.stream import stream
from labkit.models.architecture import build, supports
from labkit.models.load import LoadedModel, load_model
from labkit.models.tiny import tiny_random

CEILING = Ceiling(1e10, {"float32": 1e11, "int8": 4e11})
load = functools.partial(load_model, "tiny-random", device="cpu", say=None)


def as_transformers(loaded: LoadedModel) -> Any:
    return reference_model(loaded, "tiny-random")


def quick(loads: Any, jobs: list[Job], rungs: Any, **more: Any) -> LadderReport:
    """A ladder that measures as little as it can."""
    settings: dict[str, Any] = dict(
        reference=None, seats=3, budget=64, repeats=1, memory=False, progress=False
    )
    return climb(loads, jobs, rungs, ceiling=lambda *args, **kwargs: CEILING, **settings | more)


@pytest.fixture
def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line measures no device."""
    patched = functools.partial(climb, ceiling=lambda *args, **kwargs: CEILING, progress=False)
    monkeypatch.setattr("labkit.benchmark.__main__.climb", patched)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return make_workload(load().tokenizer, 6, prompt_tokens=(6, 40), output_tokens=(3, 12))


@pytest.fixture(scope="module")
def report(jobs: list[Job]) -> LadderReport:
    return quick(load, jobs, ablations_for("cpu"), reference=as_transformers, peers=True, seats=9)


# -- rungs ----------------------------------------------------------------------------------------


def test_each_ablation_turns_on_one_thing_more() -> None:
    for device in ("cpu", "cuda"):
        rungs = ablations_for(device)
        for below, above in itertools.pairwise(rungs):
            changed = dict(above.engine.items() - below.engine.items())
            changed |= dict(above.weights.items() - below.weights.items())
            assert 1 <= len(changed) <= 2, above.name
    assert set(NAMES) == {rung.name for device in ("cpu", "cuda") for rung in ablations_for(device)}
    (last,) = ablations_for("cpu", ["int8"])
    assert not last.exact
    assert last.engine["attention_backend"] == "auto"  # nothing of the rungs for a GPU
    assert ablations_for("cuda", ["int8"])[0].engine["attention_backend"] == "triton"


def test_ablations_come_in_the_order_of_the_ladder() -> None:
    assert [rung.name for rung in ablations_for("cpu", ["int8", "KV cache"])] == ["KV cache", "int8"]
    with pytest.raises(ValueError, match="no rung 'CUDA graphs' on cpu"):
        ablations_for("cpu", ["CUDA graphs"])
    with pytest.raises(ValueError, match="needs a rung"):
        ablations_for("cpu", [])


def test_the_pool_is_half_of_what_the_seats_would_reserve_and_holds_any_request() -> None:
    assert Sizes.of([Job([0] * 30, 18)] * 5, seats=8, budget=64) == Sizes(12, 8, 64)  # 3 pages each
    assert Sizes.of([Job([0] * 100, 60), Job([0], 1)], seats=1, budget=64) == Sizes(11, 1, 160)


# -- the report -----------------------------------------------------------------------------------


def test_every_exact_rung_gives_the_same_tokens_and_every_rung_has_figures(
    report: LadderReport, jobs: list[Job]
) -> None:
    names = [rung.name for rung in ablations_for("cpu")]
    assert [row.name for row in report.rungs] == names
    tokens = sum(job.max_tokens for job in jobs)
    assert report.same_tokens == f"All {len(names) - 1} systems gave the same {tokens} tokens."
    for row in report.rungs:
        assert not row.failure
        assert row.requests == len(jobs)
        assert row.tokens_per_second > 0 and row.bytes_per_step > 0 and row.operations_per_step > 0
        assert 0 < row.bookkeeping_share < 1
        assert row.bytes_per_second == pytest.approx(row.bytes_per_step * row.steps / row.seconds)
        assert row.gain_reference == pytest.approx(row.tokens_per_second / report.peers[0].tokens_per_second)
        if row.name != "int8":
            assert (row.equal, row.first_divergence) == (1, None)
    first, second = report.rungs[:2]
    assert first.gain_before is first.gain_first is None
    assert (
        second.gain_before
        == second.gain_first
        == pytest.approx(second.tokens_per_second / first.tokens_per_second)
    )
    assert first.steps == second.steps == tokens  # one request and one token at a time
    assert first.operations_per_step > 2 * second.operations_per_step
    assert report.rungs[-1].bytes_per_step < 0.5 * second.bytes_per_step


def test_figures_of_a_rung_follow_from_its_trace(jobs: list[Job]) -> None:
    (rung,) = ablations_for("cpu", ["paged KV cache"])
    loaded, sizes = load(**rung.weights), Sizes.of(jobs, 3, 64)
    run = Contender(rung, loaded, sizes).run(jobs)
    works = [Shape.of(loaded).work(record) for record in run.records]
    (row,) = quick(load, jobs, [rung]).rungs
    assert row.steps == len(works)
    assert row.bytes_per_step == sum(work.bytes for work in works) / len(works)
    assert row.roofline_share == pytest.approx(CEILING.least_seconds(works, "float32") / row.seconds)


def test_reserving_and_paging_differ_in_a_small_pool(jobs: list[Job]) -> None:
    rows = quick(load, jobs, ablations_for("cpu", ["continuous batching", "paged KV cache"])).rungs
    assert rows[1].steps <= rows[0].steps


def test_peers_are_in_the_same_table(report: LadderReport) -> None:
    peers = {peer.system: peer for peer in report.peers}
    assert list(peers) == [
        "transformers",
        "transformers, batches of 8",
        "transformers, batches of 32",
        "transformers, generate_batch",
        "labkit float32, 1 seat",
        "labkit int8, 1 seat",
        "labkit float32, 8 seats",
        "labkit int8, 8 seats",
        "labkit float32, 9 seats",
        "labkit int8, 9 seats",
    ]
    for name, peer in peers.items():
        assert not peer.failure, peer.failure
        if "int8" not in name:
            assert peer.equal == 1, name
    assert peers["transformers"].gain == 1


def test_the_table_fits_and_says_what_each_rung_adds(report: LadderReport) -> None:
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    for rung in ablations_for("cpu"):
        assert rung.adds in text
    for word in ("blocks", "torch", "transformers", "threads", "GB/s read", "of the", "roofline", "seats 9"):
        assert word in text


def test_the_json_is_complete(report: LadderReport) -> None:
    figures = json.loads(json.dumps(report.to_json()))
    assert set(figures) == {"settings", "same_tokens", "jobs", "ceiling", "rungs", "peers"}
    assert figures["ceiling"] == {"bandwidth": 1e10, "peak": CEILING.peak}
    assert len(figures["rungs"][0]["all_seconds"]) == 1
    assert {"torch", "transformers", "python", "device", "blocks"} <= set(figures["settings"])


def test_the_figure_has_a_bar_for_each_line(report: LadderReport) -> None:
    drawn = figure(report)
    rungs, peers = drawn.data
    assert list(rungs.y) == [row.name for row in report.rungs]
    assert list(peers.x) == [peer.tokens_per_second for peer in report.peers]
    assert all("of the roofline" in text for text in rungs.text)
    assert drawn.layout.xaxis.type == "log"
    as_json = json.loads(drawn.to_json())
    assert isinstance(as_json["data"][0]["x"], list)  # not an encoded array


# -- what is refused or left out ------------------------------------------------------------------


def other_weights(**switches: Any) -> LoadedModel:
    """Load as `load` does, but with fused projections return another model."""
    if not switches["fused_projections"]:
        return load(**switches)
    config, tensors, tokenizer = tiny_random(seed=1)
    module = build(config, tensors.items(), dtype=torch.float32, device=torch.device("cpu"))
    return LoadedModel("other", module, tokenizer, config, frozenset())


def test_a_rung_with_other_tokens_is_refused(jobs: list[Job]) -> None:
    rungs = ablations_for("cpu", ["mixed prefill, decode", "fused projections"])
    with pytest.raises(DifferentTokens, match="fused projections and mixed prefill, decode disagree"):
        quick(other_weights, jobs[:2], rungs)


def test_int8_may_differ_and_says_how_often(jobs: list[Job]) -> None:
    def wild(**switches: Any) -> LoadedModel:
        return other_weights(fused_projections="quantization" in switches)

    report = quick(wild, jobs[:3], ablations_for("cpu", ["fused projections", "int8"]))
    row = report.rungs[-1]
    assert row.equal < 1
    assert "of its answers equal those of the exact rungs" in str(report)


def test_a_rung_that_cannot_be_had_is_a_line(jobs: list[Job]) -> None:
    def without_int8(**switches: Any) -> LoadedModel:
        if switches.get("quantization"):
            raise ValueError("no 8 bits here")
        return load(**switches)

    rungs = ablations_for("cpu", ["fused projections", "int8"])
    report = quick(without_int8, jobs[:2], rungs)
    assert report.rungs[-1].failure == "ValueError: no 8 bits here"
    assert "int8: not here: ValueError: no 8 bits here" in str(report)
    assert len(figure(report).data[0].y) == 1
    with pytest.raises(ValueError, match="no rung can be run"):
        quick(without_int8, jobs, rungs[1:])


def test_a_peer_that_fails_is_a_line(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Run:
        raise RuntimeError("it gave up")

    monkeypatch.setattr("labkit.benchmark.engine.peers.run_generate_batch", broken)
    rungs = ablations_for("cpu", ["fused projections"])
    report = quick(load, jobs[:2], rungs, reference=as_transformers, peers=True)
    assert "transformers, generate_batch: RuntimeError: it gave up" in str(report).splitlines()
    assert not any(peer.failure for peer in report.peers if "generate_batch" not in peer.system)


def test_what_is_slow_runs_on_fewer_requests_and_says_so(jobs: list[Job]) -> None:
    rungs = ablations_for("cpu", ["no cache", "fused projections"])
    report = quick(load, jobs, rungs, reference=as_transformers, slow_seconds=1e-9)
    assert [row.requests for row in report.rungs] == [4, 6]
    assert report.peers[0].requests == 4
    text = str(report)
    assert "on the first 4 of 6 requests only" in text
    assert "4 of 6" in next(line for line in text.splitlines() if line.startswith("transformers  "))


def test_memory_is_that_of_a_process_of_its_own(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = ablations_for("cpu", ["fused projections"])
    report = quick(load, jobs[:1], rungs, memory=True)  # starts a process
    assert report.rungs[0].peak_memory is None or report.rungs[0].peak_memory > 2**26
    monkeypatch.setattr(ladder_module, "_memory_of", lambda *args: 1_500_000_000)
    line = next(
        line for line in str(quick(load, jobs[:1], rungs, memory=True)).splitlines() if "1.50" in line
    )
    assert line.startswith("fused projections")


# -- peers, shapes, stream ------------------------------------------------------------------------


def test_a_padded_batch_counts_each_requests_own_length(jobs: list[Job]) -> None:
    model = as_transformers(load())
    run = run_padded(model, 4, jobs)
    assert run.tokens == run_reference(model, jobs).tokens
    assert [len(times) for times in run.token_times] == [job.max_tokens for job in jobs]


def test_shapes_are_those_of_the_models() -> None:
    sizes = {}
    for name in SHAPES:
        config = config_of(name)
        assert supports(config)
        shape = Shape.of_config(config, ((None, config.num_hidden_layers),), weight_bytes=2, value_bytes=2)
        layers = shape.layers * (shape.layer_parameters + shape.vectors)
        sizes[name] = round((layers + shape.hidden + shape.vocab * shape.hidden) / 1e6)
    assert sizes == {"SmolLM2-135M": 135, "Qwen2.5-0.5B": 494, "Llama-3.2-1B": 1236}


def test_random_weights_are_the_same_each_time_and_as_transformers_has_them() -> None:
    loaded = random_model("tiny", device="cpu")
    jobs = make_noise(loaded.config.vocab_size, 3, prompt_tokens=(4, 9), output_tokens=(12, 12))
    (rung,) = ablations_for("cpu", ["packed weights"])
    run = Contender(rung, random_model("tiny", device="cpu", **rung.weights), Sizes.of(jobs, 2, 32)).run(jobs)
    assert run.tokens == run_reference(random_reference("tiny", loaded), jobs).tokens
    assert all(len(set(answer)) > 4 for answer in run.tokens)  # they don't run in a circle
    with pytest.raises(ValueError, match="no shape 'GPT-9'"):
        random_model("GPT-9", device="cpu")


@pytest.mark.usefixtures("no_ceiling")
def test_shapes_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "shapes.json"
    arguments = ["--ladder", "--device", "cpu", "--shapes", "tiny", "--max-num-seqs", "1", "2"]
    arguments += ["--rungs", "fused projections", "--requests", "1", "--repeats", "1", "--no-memory"]
    assert main([*arguments, "--json", str(file)]) == 0
    assert [part["settings"]["seats"] for part in json.loads(file.read_text())] == [1, 2]
    assert capsys.readouterr().out.count("fused projections: q, k and v in one product") == 2


@pytest.mark.usefixtures("no_ceiling")
def test_the_ladder_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--json": tmp_path / "ladder.json", "--figure": tmp_path / "ladder.html"}
    arguments = ["--ladder", "--device", "cpu", "--model", "tiny-random", "--rungs", "fused projections"]
    arguments += ["--requests", "1", "--repeats", "1", "--no-memory"]
    for name, file in files.items():
        arguments += [name, str(file)]
    assert main(arguments) == 0
    assert "fused projections" in capsys.readouterr().out
    assert json.loads(files["--json"].read_text())["rungs"][0]["name"] == "fused projections"
    assert "The ladder: tiny-random" in files["--figure"].read_text(encoding="utf-8")


def test_a_stream_in_fp32_and_int8(jobs: list[Job]) -> None:
    report = stream(load, jobs, reference=as_transformers, seats=2, budget=64, repeats=1, progress=False)
    assert [row.system for row in report.rows] == ["transformers", "labkit float32", "labkit int8"]
    assert [row.equal for row in report.rows[:2]] == [1, 1]
    assert report.rows[0].gain == 1
    assert report.same_tokens.startswith("All 2 systems")
    assert "labkit int8" in str(report)
    json.dumps(report.to_json())
