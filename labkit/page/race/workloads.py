"""Workloads and settings to race with, sized for a laptop, each with a sentence on what to look for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING

from labkit.models.chat import as_chat
from labkit.page.race.run import Entry, Setting, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 32  # the token budget of the setting with small chunks
_LETTERS = 4_000  # of the text, which all models can hold

RESERVED, WHOLE, CHUNKED = "reserved memory", "whole prompts", f"chunks of {CHUNK}"
SPECULATION = "speculation"
_REPEAT = "Repeat the following text word for word:\n\n"

# Name to what it means, in a few words, and the setting itself.
_ALL = (
    (Setting("naive", "naive"), "one request at a time"),
    (Setting("static", "static"), "a batch runs until its last member is done"),
    (Setting("continuous"), "requests join and leave at every step; pages as they are needed"),
    (Setting(RESERVED, kv_policy="reserved"), "continuous, but each takes all the pages it may need at once"),
    (
        Setting(WHOLE, enable_chunked_prefill=False),
        "continuous, but a step is for whole prompts or for answers",
    ),
    (Setting(CHUNKED, max_num_batched_tokens=CHUNK), f"continuous, at most {CHUNK} tokens in a step"),
    (
        Setting(SPECULATION, speculative="ngram"),
        "continuous, but a step also checks tokens that are guessed from the text so far",
    ),
)
SETTINGS: Mapping[str, Setting] = MappingProxyType({setting.name: setting for setting, _ in _ALL})
WORDS: Mapping[str, str] = MappingProxyType({setting.name: words for setting, words in _ALL})


@dataclass(frozen=True)
class Course:
    """A named workload: its requests as (step of arrival, prompt tokens, answer tokens), and its sizes.

    With `repeats`, each prompt asks the model to repeat that many tokens of text.
    """

    title: str
    look: str
    jobs: tuple[tuple[int, int, int], ...]
    settings: tuple[str, ...]  # those that it was made for
    num_blocks: int = 40
    max_num_seqs: int = 6
    repeats: bool = False

    def workload(self, tokenizer: PreTrainedTokenizerBase) -> Workload:
        """The requests, with prompts cut out of the text in the package."""
        ids = _prose(tokenizer)
        entries = []
        for number, (step, prompt, answer) in enumerate(self.jobs):
            start = 97 * number % (len(ids) - prompt)
            tokens = ids[start : start + prompt]
            if self.repeats:
                tokens = _asking(tokenizer, _REPEAT + tokenizer.decode(tokens).strip())
            entries.append(Entry(tuple(tokens), answer, step))
        return Workload(tuple(entries), self.num_blocks, max_num_seqs=self.max_num_seqs)


def _asking(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    prompt = as_chat(tokenizer, message)
    return list(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt


def _prose(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = files("labkit").joinpath("data/alice.txt").read_text(encoding="utf-8").split("\n", 1)[1].strip()
    return list(tokenizer.encode(text[:_LETTERS], add_special_tokens=False))


COURSES: Mapping[str, Course] = MappingProxyType(
    {
        "uneven": Course(
            "Uneven lengths",
            "Short and long answers together: look for the idle seats that static batching pads until the "
            "longest is done, and for how soon continuous batching gives them to the next in the queue.",
            tuple((0, 12, n) for n in (6, 28, 4, 12, 32, 5, 8, 24, 4, 10, 30, 6)),
            ("naive", "static", "continuous"),
        ),
        "trickle": Course(
            "A request every third step",
            "They come one by one: look for the dotted lines. Static batching makes those "
            "that come too late wait for the whole batch; continuous batching lets them in at the next step.",
            tuple((3 * i, 16, n) for i, n in enumerate((20, 8, 14, 6, 24, 8, 12, 6, 16, 10))),
            ("naive", "static", "continuous"),
        ),
        "pool": Course(
            "A pool too small",
            "Answers may grow, and memory is short. Look at the hatched part of the memory curve: reserved "
            "pages that hold nothing, while others wait for them. Paged memory seats more at once.",
            tuple((0, 20, n) for n in (44, 12, 40, 10, 36, 14, 44, 12)),
            (RESERVED, "continuous"),
            num_blocks=14,
            max_num_seqs=8,
        ),
        "long": Course(
            "A long prompt joins",
            "Four answers run when a prompt of 400 tokens arrives. Computed whole, it stops them for a long "
            "step (see the longest gap); in chunks, everybody gets a token in every step meanwhile.",
            (*((0, 12, 30) for _ in range(4)), (6, 400, 6)),
            (WHOLE, CHUNKED),
        ),
        "copy": Course(
            "A text that copies itself",
            "Each request repeats a text, one at a time. Look for the solid stripes along the bars: tokens "
            "that were guessed from the text so far and are right, several in a step, where others make one. "
            "Pale ones were wrong. The answers are the same.",
            ((0, 90, 64), (0, 110, 64)),
            ("continuous", SPECULATION),
            max_num_seqs=1,
            repeats=True,
        ),
    }
)
