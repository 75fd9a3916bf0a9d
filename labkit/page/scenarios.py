"""Scenarios to play with one click: which requests, when, on which settings, and what to look for.

The page calls them presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from labkit.disaggregated import DisaggregatedEngine
from labkit.engine import Engine
from labkit.page.knobs import SIZES


@dataclass(frozen=True)
class ScenarioRequest:
    """One request of a scenario.

    Args:
        prompt: the user's message.
        max_tokens: the length of the answer, which does not end before, so that each run goes the same way.
        after: the number of steps after the beginning of the scenario.
        system: a system message before the prompt.
    """

    prompt: str
    max_tokens: int
    after: int = 0
    system: str = ""


@dataclass(frozen=True)
class Scenario:
    """Requests that come in by themselves, and show one thing.

    Args:
        name: the name in links.
        title: the words on its button.
        look: one sentence on what to look for.
        requests: the requests, in order.
        settings: fields of `EngineConfig` that it needs; other sizes are those that the lab started with.
        talk: whether each request is a turn that waits for the answer before it, and sends the whole talk.
    """

    name: str
    title: str
    look: str
    requests: tuple[ScenarioRequest, ...]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    talk: bool = False

    def needed(self, base: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to play it on: those `asked` for, its own, and the sizes that the lab started with."""
        fresh = {knob: base[knob] for knob in (*SIZES, "speculative")} | {"max_step_seconds": None}
        wanted = {**fresh, **self.settings, **asked}
        if "max_num_seqs" not in asked:
            wanted["max_num_seqs"] = min(wanted["max_num_seqs"], wanted["max_num_batched_tokens"])
        return wanted

    def lacks(self, settings: Mapping[str, Any]) -> str:
        """What it would need and `settings` do not have, in a sentence; "" if it has all."""
        needs = [f"{name} {value}" for name, value in self.settings.items() if settings[name] != value]
        return f"This preset is made for {', '.join(needs)}: it may not show what it says." if needs else ""


_QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Explain what a cache is.",
    "Write a short poem about rain.",
    "How do I make pancakes?",
    "What is a tuple in Python?",
    "Why do cats purr?",
    "Tell me a story about a robot.",
)
_SYSTEM = (
    "You are a patient teacher in a class about how computers run language models. Answer in plain words "
    "and short sentences. Use one example from daily life in each answer. Never use a formula where a "
    "picture in words will do. If a question is not clear, say what is unclear before you answer. If you do "
    "not know the answer, say so, and say how one could find out. Be kind, be brief, and end with a question "
    "that makes the reader think one step further."
)
_LONG = (
    "Summarise this report. The lighthouse on the northern cape was built of grey stone by forty people in "
    "three summers. Its lamp burned oil, then gas, and now runs on electricity from a cable under the bay. "
    "The keeper writes down the weather every morning: wind, clouds, the height of the waves and the ships "
    "that pass. In winter the path is closed by ice, and food comes by boat when the sea allows it. "
) * 6
_PASSAGE = (
    "The ferry leaves the old harbour at a quarter past seven. It carries letters, milk, two bicycles and a "
    "dog that belongs to nobody. Halfway across, the captain blows the horn three times, because his sister "
    "lives on the small island, and she waves from the kitchen window. At eight the ferry arrives, and the "
    "dog is the first to go ashore."
)
_ANOTHER = (
    "Every evening the librarian walks through all the rooms and turns off the lamps. She puts the books "
    "back on their shelves, closes the windows, and feeds the grey cat that sleeps under the stairs. Then "
    "she locks the heavy door, looks up at the stars, and goes home along the river."
)
_LENGTHS = (8, 96, 16, 24, 8, 64, 12, 32, 8, 48, 16, 8)

SCENARIOS = (
    Scenario(
        "uneven",
        "Uneven lengths",
        "Four seats, twelve answers of 8 to 96 tokens: a free seat is taken in the very next step; then set "
        "the scheduler to static, under Engine, and play it again: seats of finished rows stay idle (two "
        "thin lines) until the longest of the batch is done.",
        tuple(ScenarioRequest(_QUESTIONS[i % 8], tokens) for i, tokens in enumerate(_LENGTHS)),
        {"max_num_seqs": 4},
    ),
    Scenario(
        "long",
        "One more request",
        "Six answers are being written when a short request joins, and later one with a prompt of hundreds "
        "of tokens: that is read in hatched chunks, from what the others leave of the token budget of 64. No "
        "bar has a gap; what each newcomer cost the others is said above the rows.",
        (
            *(ScenarioRequest(question, 80) for question in _QUESTIONS[:6]),
            ScenarioRequest(_QUESTIONS[6], 24, after=15),
            ScenarioRequest(_LONG, 24, after=45),
        ),
        {"max_num_batched_tokens": 64, "scheduler": "continuous", "enable_chunked_prefill": True},
    ),
    Scenario(
        "system",
        "A shared system prompt",
        "The first request computes the system prompt; the seven that follow find its pages (framed, with "
        "several owners), so their prefill is short and the prefix hit rate rises.",
        tuple(
            ScenarioRequest(question, 40, after=3 * min(i, 1), system=_SYSTEM)
            for i, question in enumerate(_QUESTIONS)
        ),
        {"enable_prefix_caching": True},
    ),
    Scenario(
        "small",
        "A pool too small",
        "Six answers grow in 24 pages: when none is left, the newest request is preempted (a cross), gives "
        "all its pages back, waits, and computes them again.",
        tuple(ScenarioRequest(question, 100) for question in _QUESTIONS[:6]),
        {"num_blocks": 24, "block_size": 16, "kv_policy": "paged", "scheduler": "continuous"},
    ),
    Scenario(
        "burst",
        "A burst of 32",
        "32 requests at once on 16 seats: tokens/s climbs with every seat that fills, and those in the queue "
        "pay for it with their time to first token.",
        tuple(ScenarioRequest(_QUESTIONS[i % 8], 16 + 8 * (i % 4)) for i in range(32)),
        {"max_num_seqs": 16},
    ),
    Scenario(
        "chat",
        "A chat",
        "Each turn sends the whole talk again, but its pages are still cached: only the new words are "
        "prefilled, however long the talk has become.",
        (
            ScenarioRequest("I want to learn how computers remember things. Where do I begin?", 48),
            ScenarioRequest("What is the difference between memory and a disk?", 48),
            ScenarioRequest("And what is a cache, then?", 48),
            ScenarioRequest("Give me an example from a kitchen.", 48),
        ),
        {"enable_prefix_caching": True},
        talk=True,
    ),
    Scenario(
        "copy",
        "A text that copies itself",
        "Two answers repeat what they were given, and speculation guesses what comes next from the text so "
        "far: solid stripes along a bar are guesses that a step kept, pale ones were wrong; then set "
        "speculation to off, under Engine, and play it again: the same answers, token by token.",
        tuple(
            ScenarioRequest(f"Repeat the following text word for word:\n\n{text}", tokens)
            for text, tokens in ((_PASSAGE, 72), (_ANOTHER, 44))
        ),
        {"speculative": "ngram", "scheduler": "continuous", "max_num_seqs": 1},
    ),
)
APART = Scenario(  # offered where another process computes prompts
    "apart",
    "Prefill apart from decode",
    "Six answers are being written while two long prompts are computed by the prefill engine, on the left; "
    "then their pages fly into the pool on the right, where the answers begin, and no step of this engine "
    "computes more than the end of a prompt. Each card says where its request is.",
    (
        *(ScenarioRequest(question, 100) for question in _QUESTIONS[:6]),
        ScenarioRequest(_LONG, 24, after=15),
        ScenarioRequest("Say what is missing from this report. " + _LONG, 24, after=20),
    ),
    {"scheduler": "continuous", "enable_prefix_caching": True},
)


def offered(engine: Engine) -> dict[str, Scenario]:
    """Return the scenarios for an engine, by name: one more where another process computes prompts."""
    apart = isinstance(engine, DisaggregatedEngine)
    return {scenario.name: scenario for scenario in (*SCENARIOS, *([APART] if apart else []))}


def find(scenarios: Mapping[str, Scenario], name: object) -> Scenario:
    """Return the scenario of a name, which may be anything. Raises ValueError if there is none."""
    if not isinstance(name, str) or name not in scenarios:
        raise ValueError(f"There is no preset {str(name)[:40]!r}: known are {', '.join(scenarios)}.")
    return scenarios[name]
