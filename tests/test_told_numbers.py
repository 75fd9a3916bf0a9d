"""Numbers that a notebook tells in folded answers, and that no cell shows: it would give them away.

Each test computes them anew, with the notebook's own cells where it can, and then asks for the sentence.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import labkit
from labkit.analysis.capacity import GPUS, MODELS, Roofline, Settings, draw_demands, replay
from labkit.analysis.devices import Gpu
from labkit.exercises import e05
from labkit.exercises.common import Job, serve
from labkit.exercises.e00 import small_engine
from labkit.exercises.e01_model import reference_for
from labkit.exercises.e01_suspects import SUSPECTS
from labkit.exercises.e07_cost import shape_of, step_cost
from labkit.exercises.e07_turning_point import T4_BANDWIDTH, T4_PEAK, turning_point
from labkit.kernels.int8 import hadamard
from labkit.models.load import load_model
from labkit.trace.trace import Trace
from notebooks import make
from tests.exercising import notebook


def tells(number: str, sentence: str) -> bool:
    """Whether a notebook's prose holds this sentence, however its lines are broken."""
    prose = " ".join(cell.source for cell in notebook(number).cells if cell.cell_type == "markdown")
    return sentence in " ".join(prose.split())


def run_cells(
    number: str, *names: str, space: dict[str, Any] | None = None, swap: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """Run cells of a notebook, with one piece of their code changed; returns what they name, and `said`."""
    space = {"labkit": labkit} if space is None else space
    codes = [cell.source for name in names for cell in notebook(number).cells if cell.id == name]
    assert len(codes) == len(names) and swap[0] in "".join(codes)
    with contextlib.redirect_stdout(said := io.StringIO()):
        for code in codes:
            exec(code.replace(*swap) if swap[0] else code, space)
    return space | {"said": said.getvalue()}


def preemptions(trace: Trace) -> int:
    return sum(len(record.preempted) for record in trace)


def test_00_fewer_pages_and_fewer_seats() -> None:
    six = run_cells("00", "c03")["SIX"]
    few, fewer = (serve(small_engine(num_blocks=pages), six).trace for pages in (14, 12))
    assert (preemptions(few), preemptions(fewer)) == (0, 1)
    three, two = (len(serve(small_engine(max_num_seqs=seats), six).trace) for seats in (3, 2))
    assert tells(
        "00", "With 14 pages and four seats, requests 3 to 5 wait for pages; with 12, one is preempted."
    )
    assert tells("00", f"three seats the run takes {three} steps, with two {two}.")


def test_01_how_small_a_question_finds_the_quiet_faults() -> None:
    tiny = load_model("tiny-random", device="cpu", say=None)
    reference, suspects = reference_for(tiny), {suspect.name: suspect for suspect in SUSPECTS}

    def first_wrong(name: str, tokens_in: int, tokens_out: int, first: int = 300) -> float:
        question = list(range(first, first + tokens_in))
        answer, truth = suspects[name].make(tiny)(question, tokens_out), reference(question, tokens_out)
        return next((place for place in range(tokens_out) if answer[place] != truth[place]), math.inf)

    assert [first_wrong("drops old pages", 6, count) for count in (27, 28)] == [math.inf, 27]
    assert tells("01", "needs prompt and answer of 34 tokens together: 6 in and 28 out are just enough.")
    shown = {
        n: min(first_wrong("loses page starts", n, 6, first) for first in (300, 500)) for n in range(13, 18)
    }
    assert min(shown, key=lambda count: shown[count]) == 16
    assert tells("01", "`loses page starts` shows earliest with a prompt of 16")
    sound = [suspect.name for suspect in SUSPECTS if not suspect.fault]
    assert tells(
        "01", f"given {len(suspects)} decoders, {len(sound)} of them sound, labkit's engine among them."
    )
    assert tells("01", f"The other {len(suspects) - len(sound)} have faults")


def test_02_answers_that_leave_no_seat_idle() -> None:
    answers = "[9, 9, 9, 9, 3, 3, 3, 3]"
    space = run_cells("02", "c03", "c17", "c32", swap=("[40, 2, 2, 2, 2, 2, 2, 40]", answers))
    assert "0.0% of the seats idle" in space["said"]
    assert tells("02", f"`{answers}` leaves none idle")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ('"reserved", 16, 1\n', "the two are alike: {share} empty, {most} requests at once."),
        ('"paged", 16, 1\n', "the two are alike: {share} empty, {most} requests at once."),
        ('"paged", 128, 112\n', 'does little better than `"reserved"`: {share} empty, {most} at once.'),
    ],
)
def test_03_pages_and_answers_of_other_lengths(changed: str, words: str) -> None:
    space = run_cells("03", "c03", "c06", "c33", swap=('"reserved", 16, 16\n', changed))
    share, most = re.findall(r"(\d+%) of the owned slots empty, (\d+) requests", space["said"])[0]
    assert tells("03", words.format(share=share, most=most))


def test_03_reserving_owns_more_than_three_times_as_much() -> None:
    said = run_cells("03", "c03", "c06")["said"]
    reserved, paged = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) owned", said))
    assert 3.4 < reserved / paged < 3.6
    assert tells("03", "owned three and a half times as many slots")


def test_04_more_pages_and_a_shorter_prompt() -> None:
    def steps(pages: int, prompt: int = 40) -> Trace:
        jobs = [Job(6, 20), Job(6, 14), Job(prompt, 6, step=4), Job(5, 8, step=6), Job(5, 3, step=7)]
        sizes = {"num_blocks": pages, "block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 8}
        return space["run_jobs"](jobs, space["schedule"], **sizes)[0]

    space = run_cells("04", "c03", "c22")
    more, few = len(steps(40)), len(steps(16))
    assert tells(
        "04", f"With 40 pages it starts when it comes, and the run takes {more} steps in place of {few}."
    )
    assert [lost.request_id for record in steps(10, prompt=12) for lost in record.preempted] == ["2"]
    assert tells("04", "With a prompt of 12 in its place, and 10 pages, request 2 is preempted")


def test_05_chunks_that_shrink_and_a_budget_that_breaks_the_promise() -> None:
    chosen, loose = e05.run_chunks(e05.chunk_size), e05.run_chunks(budget=40)
    chunks = [row.num_tokens for record in chosen.trace for row in record.rows if row.request_id == "long"]
    whole = [count for count in chunks if count > 1][:-1]  # the last one is what was left
    assert tells("05", f"The chunks shrink from {whole[0]} tokens to {whole[-1]}")
    assert 2.5 < e05.longest_step(loose) / e05.PROMISE < 3.5
    first = f"{e05.first_token_of(loose, 'long') / 1000:.0f}"
    assert tells(
        "05", f"A fixed budget of 40 takes {first}, and its longest step is three times as long as promised"
    )


def test_06_from_how_many_pages_on() -> None:
    space = run_cells("06", "c03", "c09", "c11", "c13")
    run, other = space["run"], space["other_answers"]
    assert [preemptions(run(num_blocks=pages).trace) > 0 for pages in (66, 67)] == [True, False]
    assert tells("06", "From 67 pages on nobody loses any.")
    assert max(space["pages"]) == 15 and not other(run(num_blocks=15)) and other(run(num_blocks=14))
    assert tells("06", "Below 15, the longest request would not fit even alone")
    with pytest.raises(ValueError, match="prompt has 13 tokens"):
        run(num_blocks=3)
    assert tells("06", "With 3, some prompt does not fit, and the engine refuses it.")


def test_07_what_a_t4_holds_and_where_computing_takes_over() -> None:
    half = shape_of("SmolLM2-135M", value_bytes=2)
    weights, _ = step_cost([0], [0], half, 2)
    token = step_cost([0], [1], half, 2)[0] - weights
    assert round((16e9 - weights) / (1024 * token), -1) == pytest.approx(660, abs=10)
    assert tells("07", f"{weights / 1e6:.0f} MB at {T4_BANDWIDTH / 1e9:.0f} GB/s.")
    assert tells("07", "A T4's 16 GB hold the keys and values of some 660 such rows.")

    def found(context: int) -> int | None:
        return turning_point(context, lambda new, kept: step_cost(new, kept, half, 2), T4_BANDWIDTH, T4_PEAK)

    assert found(0) == 211 and found(50) is not None and found(65) is None
    assert tells("07", "it gives 211 rows for SmolLM2 with empty caches, and none at all from some 60 tokens")


def test_07_ratios_of_the_page_of_measurements() -> None:
    page = (make.HERE.parent / "labkit/benchmark/README.md").read_text(encoding="utf-8")

    def of(row: str) -> float:
        (rate,) = re.findall(rf"^\| {re.escape(row)} \| ([\d.]+) \|", page, re.MULTILINE)
        return float(rate)

    top, none, kept = of("int8"), of("no cache (first 4 requests)"), of("KV cache (first 4 requests)")
    assert tells(
        "07", f"the top rung (int8) gives {top:.0f} tokens per second, against {none} without a cache"
    )
    assert tells("07", f"without a cache: {top / none:.0f} times.")
    assert tells("07", f"one request at a time *with* a cache: {top / kept:.1f} times.")
    assert "5.5x; 8.3x |" in page and tells(
        "07", "int8 gives 8.3 times what the plain loop of `transformers` gives"
    )
    assert of("fused projections") < of("prefill and decode in one step") and tells("07", "has it as a loss")


def test_08_where_half_precision_ends() -> None:
    largest = torch.finfo(torch.float16).max
    assert tells("08", f"half precision ends at {largest:,.0f}")
    assert math.exp(11) < largest < math.exp(12) and tells("08", "holds powers up to a score of 11")


def test_09_where_the_turn_pays() -> None:
    def errors(outlier: float, levels: int) -> list[float]:
        space = {"torch": torch, "hadamard": hadamard}
        said = run_cells("09", "c33", space=space, swap=("50.0, 127", f"{outlier}, {levels}"))["said"]
        return [float(share) for share in re.findall(r"([\d.]+)%", said)]

    assert tells(
        "09", "It pays from somewhere between 5 and 10 on; without an outlier it does a little harm."
    )
    assert [plain > turned for plain, turned in (errors(n, 127) for n in (1.0, 5.0, 10.0, 50.0))] == [
        0,
        0,
        1,
        1,
    ]
    plain, turned = errors(50.0, 7)
    assert plain < turned and tells("09", "With 7 levels it harms at 50 too.")


def test_09_the_width_of_a_token_and_how_far_one_number_stands_out() -> None:
    assert tells("09", f"({shape_of('SmolLM2-135M').hidden} in SmolLM2)")
    token = torch.sin(torch.arange(16, dtype=torch.float64) * 1.3)
    token[5] += 16
    before, after = (
        float(x.abs().max() / x.square().mean().sqrt()) for x in (token, token @ hadamard(16).double())
    )
    assert tells("09", f"In the example above that was about {before:.0f}, and {after:.1f} after the turn.")


def test_10_single_tokens_and_a_temperature() -> None:
    def run(numbers: str) -> tuple[int, int, int]:
        trace = run_cells("10", "c33", space=space, swap=("4, 2, 0.0", numbers))["engine"].trace
        return len(trace), sum(r.total_drafted for r in trace), sum(r.total_accepted for r in trace)

    space = run_cells("10", "c03", "c15")
    steps, drafted, right = run("4, 2, 0.0")
    fewer, more, single = run("1, 1, 0.0")
    assert fewer < steps and more > drafted and single / more < right / drafted
    assert tells(
        "10",
        "there are more drafts, and a smaller part of them is right. Here the steps become a little fewer",
    )
    most, some, warm = run("4, 2, 0.9")
    assert warm / some < right / drafted / 2 and 48 - most < (48 - steps) / 2
    assert tells("10", "few drafts are right, and most of the steps come back.")


def test_12_what_a_step_cost_on_the_machine_whose_output_is_kept() -> None:
    (cell,) = (cell for cell in notebook("12").cells if cell.id == "c07")
    kept = "".join(output.get("text", "") for output in cell.outputs)
    step, token = map(float, re.findall(r"([\d.]+) ms a (?:step|token)", kept))
    assert 25 < step / token < 35, "the prose speaks of some thirty tokens: tell what is kept now"
    assert tells("12", "A step costs as much as many tokens do: as some thirty on the two cores")


def test_12_how_much_larger_and_later_machines_are() -> None:
    t4, l4, a100 = (GPUS[name] for name in ("T4", "L4", "A100"))
    times = [round(getattr(a100, x) / getattr(t4, x)) for x in ("memory", "bandwidth", "flops")]
    assert times == [5, 7, 5]
    assert tells("12", "five times the memory, seven times the bandwidth and five times the arithmetic")

    def clock(gpu: Gpu, size: int = 1) -> Roofline:
        return Roofline(gpu, replace(MODELS["llama-3.1-8b"], weight_bytes=size), overhead=0.005)

    with pytest.raises(ValueError, match="no block of the KV cache fits"):
        clock(t4, 2).num_blocks()
    asked = draw_demands(200, rate=1.5, prompt_tokens=(512, 4096), answer_tokens=(16, 64))
    late, soon = (
        replay(asked, clock(g), Settings(clock(g).num_blocks(), max_num_seqs=256)) for g in (t4, l4)
    )
    assert all(2.5 < late.percentile("ttft", p) / soon.percentile("ttft", p) < 3.5 for p in (50, 95))
    assert 1.8 < l4.flops / t4.flops < 2.1
    assert tells("12", "the first token comes about three times as late on a T4 as on an L4")
