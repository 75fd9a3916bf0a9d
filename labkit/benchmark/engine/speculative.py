"""Speculative decoding compared with plain decoding, in turn, on text that copies and on chat."""

from __future__ import annotations

import functools
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.analysis.reference import Run, compare_tokens
from labkit.analysis.workload import Job, prose
from labkit.benchmark.engine.runs import System, describe, run_engine, short_jobs, take_turns
from labkit.benchmark.report import Report
from labkit.config import EngineConfig
from labkit.models.chat import as_chat
from labkit.models.load import LoadedModel
from labkit.speculative.speculator import acceptance

SEATS = (1, 8, 32)
_PASSAGE = 700  # characters
_CODE = '''\
def moving_average(values, width):
    """Mean of each window of so many values."""
    if width < 1:
        raise ValueError("width must be at least 1")
    total = sum(values[:width])
    means = [total / width]
    for i in range(width, len(values)):
        total = total + values[i] - values[i - width]
        means.append(total / width)
    return means
'''
_QUESTIONS = (
    "Why is the sky blue?",
    "How do I make a good cup of tea?",
    "What is the capital of France, and what is it known for?",
    "Explain what a compiler does.",
    "Tell me a short story about a fox.",
    "What should I see in Rome in two days?",
    "How does a bicycle stay upright?",
    "Give me three ideas for dinner.",
)


@dataclass
class SpeculationRow:
    """One workload at one number of seats: medians over the repeats."""

    workload: str
    seats: int
    plain: float  # tokens per second
    drafting: float  # likewise
    gain: float
    steps: int
    plain_steps: int
    drafted: int
    accepted: int
    by_place: list[tuple[int, int]]  # drafts verified at each place, and accepted
    held_back: str  # why there were not more drafts, as the trace says most often


@dataclass
class SpeculationReport(Report):
    """What `speculate` found."""

    same_tokens: str
    rows: list[SpeculationRow]

    def __str__(self) -> str:
        lines = [self.settings_line, self.same_tokens]
        lines.append(
            f"{'':10}{'seats':>6}{'tokens/s':>10}{'drafting':>10}{'gain':>7}{'steps':>7}{'were':>6}"
            f"{'drafted':>9}{'accepted':>10}  accepted by place"
        )
        for row in self.rows:
            accepted = f"{row.accepted / row.drafted:.0%}" if row.drafted else "-"
            places = " ".join(f"{right / checked:.0%}" for checked, right in row.by_place if checked)
            lines.append(
                f"{row.workload:10}{row.seats:6}{row.plain:10.1f}{row.drafting:10.1f}{row.gain:6.2f}x"
                f"{row.steps:7}{row.plain_steps:6}{row.drafted:9}{accepted:>10}  {places}"
            )
        lines += [f"{row.workload}, {row.seats} seats: {row.held_back}" for row in self.rows if row.held_back]
        return "\n".join(lines)


def copy_jobs(loaded: LoadedModel) -> list[Job]:
    """Requests whose answers copy from their prompts: repeat, edit, and repeat code."""
    text = prose()
    text = textwrap.shorten(text[text.index("Alice was beginning") :], _PASSAGE, placeholder="")
    begun = (  # with the beginnings of the answers, because so small a model hardly follows orders
        f"{text}\n\nOnce more, word for word:\n\n{text[:60]}",
        f"{text}\n\nThe same text, with Anna in place of Alice:\n\n{text[:120].replace('Alice', 'Anna')}",
        f"{_CODE}\n\n# The same function, as above:\n\n{_CODE[:80]}",
    )
    return [Job(loaded.tokenizer.encode(text), 96) for text in begun]


def chat_jobs(loaded: LoadedModel, count: int) -> list[Job]:
    """Questions as people ask them, in turn."""
    asked = [as_chat(loaded.tokenizer, _QUESTIONS[i % len(_QUESTIONS)]) for i in range(count)]
    return [Job(loaded.tokenizer.encode(p) if isinstance(p, str) else p, 96) for p in asked]


def speculate(
    loaded: LoadedModel,
    *,
    seats: Sequence[int] = SEATS,
    budget: int = 512,
    repeats: int = 3,
    progress: bool = True,
    **config: Any,
) -> SpeculationReport:
    """Time each workload with drafts and without; `config` has more switches of the engine.

    Raises:
        DifferentTokens: If, in fp32, drafts changed any token.
    """
    workloads = [("copy", 1, copy_jobs(loaded))]
    workloads += [("chat", count, chat_jobs(loaded, max(count, 2))) for count in seats]
    todo = []
    for name, count, jobs in workloads:
        for speculative in (None, "ngram"):
            run = functools.partial(
                _run, loaded, speculative, max_num_seqs=count, max_num_batched_tokens=budget, **config
            )
            todo.append(System(f"{name} {count} {speculative}", run, jobs))
    for system in todo[:2]:
        system.run(short_jobs(system.jobs), None)

    def check(runs: dict[str, Run]) -> str:
        pairs = [[runs[f"{name} {count} {way}"] for way in (None, "ngram")] for name, count, _ in workloads]
        return " ".join(dict.fromkeys(compare_tokens(pair, loaded.dtype) for pair in pairs))

    runs, _, same = take_turns(todo, repeats, check=check, progress=progress)
    rows = [_row(name, count, runs) for name, count, _ in workloads]
    jobs = [job for *_, jobs in workloads for job in jobs]
    settings = describe(loaded, jobs, {"token budget": budget, "medians of": repeats})
    return SpeculationReport(settings, same, rows)


def _run(loaded: LoadedModel, speculative: Any, jobs: Sequence[Job], bar: Any, **config: Any) -> Run:
    return run_engine(EngineConfig(model=loaded, speculative=speculative, **config), jobs, bar)


def _row(name: str, count: int, runs: dict[str, list[Run]]) -> SpeculationRow:
    plain, drafting = runs[f"{name} {count} None"], runs[f"{name} {count} ngram"]
    rates = [statistics.median(run.rate for run in some) for some in (plain, drafting)]
    gain = statistics.median(b.rate / a.rate for a, b in zip(plain, drafting, strict=True))
    last = drafting[-1]
    held_back = [record.held_back for record in last.records if record.held_back]
    return SpeculationRow(
        name,
        count,
        *rates,
        gain,
        last.steps or 0,
        plain[-1].steps or 0,
        sum(record.total_drafted for record in last.records),
        sum(record.total_accepted for record in last.records),
        acceptance(last.records),
        statistics.mode(held_back) if held_back else "",
    )
