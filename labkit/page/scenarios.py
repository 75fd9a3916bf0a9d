"""Scenes to play with one click: which requests, when, on which settings, and what to look for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Line:
    """One request of a scene.

    Args:
        prompt: a user's message.
        max_tokens: how long the answer is: it does not end before, so that a scene goes the same way again.
        after: steps after the beginning of the scene.
        system: a system message before the prompt.
    """

    prompt: str
    max_tokens: int
    after: int = 0
    system: str = ""


@dataclass(frozen=True)
class Preset:
    """A scene.

    Args:
        name: in links.
        title: on its button.
        look: one sentence on what to look for.
        lines: its requests.
        settings: fields of `EngineConfig` that it needs; other sizes are those that the lab started with.
        talk: each line is a turn that waits for the answer to the one before, and sends the whole talk.
    """

    name: str
    title: str
    look: str
    lines: tuple[Line, ...]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    talk: bool = False


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

PRESETS = (
    Preset(
        "uneven",
        "Uneven lengths",
        "Four seats, twelve answers of 8 to 96 tokens: a free seat is taken in the very next step; then set "
        "the scheduler to static, under Engine, and play it again: seats of finished rows stay idle (two "
        "thin lines) until the longest of the batch is done.",
        tuple(Line(_QUESTIONS[i % 8], tokens) for i, tokens in enumerate(_LENGTHS)),
        {"max_num_seqs": 4},
    ),
    Preset(
        "long",
        "One more request",
        "Six answers are being written when a short request joins, and later one with a prompt of hundreds "
        "of tokens: that is read in hatched chunks, from what the others leave of the token budget of 64. No "
        "bar has a gap; what each newcomer cost the others is said above the rows.",
        (
            *(Line(question, 80) for question in _QUESTIONS[:6]),
            Line(_QUESTIONS[6], 24, after=15),
            Line(_LONG, 24, after=45),
        ),
        {"max_num_batched_tokens": 64},
    ),
    Preset(
        "system",
        "A shared system prompt",
        "The first request computes the system prompt; the seven that follow find its pages (framed, with "
        "several owners), so their prefill is short and the prefix hit rate rises.",
        tuple(
            Line(question, 40, after=3 * min(i, 1), system=_SYSTEM) for i, question in enumerate(_QUESTIONS)
        ),
        {"enable_prefix_caching": True},
    ),
    Preset(
        "small",
        "A pool too small",
        "Six answers grow in 24 pages: when none is left, the newest request is preempted (a cross), gives "
        "all its pages back, waits, and computes them again.",
        tuple(Line(question, 100) for question in _QUESTIONS[:6]),
        {"num_blocks": 24, "block_size": 16, "kv_policy": "paged", "scheduler": "continuous"},
    ),
    Preset(
        "burst",
        "A burst of 32",
        "32 requests at once on 16 seats: tokens/s climbs with every seat that fills, and those in the queue "
        "pay for it with their time to first token.",
        tuple(Line(_QUESTIONS[i % 8], 16 + 8 * (i % 4)) for i in range(32)),
        {"max_num_seqs": 16},
    ),
    Preset(
        "chat",
        "A chat",
        "Each turn sends the whole talk again, but its pages are still cached: only the new words are "
        "prefilled, however long the talk has become.",
        (
            Line("I want to learn how computers remember things. Where do I begin?", 48),
            Line("What is the difference between memory and a disk?", 48),
            Line("And what is a cache, then?", 48),
            Line("Give me an example from a kitchen.", 48),
        ),
        {"enable_prefix_caching": True},
        talk=True,
    ),
    Preset(
        "copy",
        "A text that copies itself",
        "Two answers repeat what they were given, and speculation guesses what comes next from the text so "
        "far: solid stripes along a bar are guesses that a step kept, pale ones were wrong; then set "
        "speculation to off, under Engine, and play it again: the same answers, token by token.",
        tuple(
            Line(f"Repeat the following text word for word:\n\n{text}", tokens)
            for text, tokens in ((_PASSAGE, 72), (_ANOTHER, 44))
        ),
        {"speculative": "ngram", "scheduler": "continuous", "max_num_seqs": 1},
    ),
)
BY_NAME = {preset.name: preset for preset in PRESETS}
