"""Exercises of notebook 01: a greedy loop that keeps its cache, and how to catch one that loses it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from labkit import notebook
from labkit.analysis.reference import reference_model
from labkit.analysis.workload import prose
from labkit.config import EngineConfig
from labkit.core.attention import Span, build_metadata
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.kernels.gathered_sdpa import SDPA
from labkit.models.load import LoadedModel, load_model
from labkit.sampling_params import SamplingParams

Decoder = Callable[[list[int], int], list[int]]  # prompt and length of the answer -> answer

ROOM = 512  # tokens, prompt and answer together
PAGE = 16


# -- a model with a cache --------------------------------------------------------------------------


class CachedModel:
    """A model, and room for the keys and values of one text.

    Args:
        loaded: a model of the Llama shape.
        room: tokens that the cache holds.

    Attributes:
        passes: (start, tokens) of each pass through the model so far.
    """

    def __init__(self, loaded: LoadedModel, room: int = ROOM) -> None:
        self.module = loaded.module
        self.table = list(range(-(-room // PAGE)))
        self.cache = self.module.kv_shape.new_cache(len(self.table), PAGE)
        self.passes: list[tuple[int, int]] = []

    @property
    def computed(self) -> int:
        """Tokens that went through the model so far."""
        return sum(tokens for _, tokens in self.passes)

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        """Compute these tokens, the first of them at position `start`, and keep their keys and values.

        Each token sees itself and everything before it: what was kept, and what comes along.

        Returns:
            Logits (vocab_size,) for the token that follows the last one.

        Raises:
            ValueError: for no tokens at all, or tokens that find no room.
        """
        return self.compute(tokens, range(start, start + len(tokens)), self.row(start, len(tokens)))

    def row(self, start: int, count: int) -> Span:
        """Where `count` tokens from `start` on lie in the cache, and whom they see: all before them."""
        room = len(self.table) * PAGE
        if count < 1 or start < 0 or start + count > room:
            raise ValueError(f"{count} tokens from position {start} on: there is room for 0 to {room - 1}")
        return Span(start, count, self.table)

    def compute(self, tokens: Sequence[int], positions: Sequence[int], row: Span) -> Tensor:
        """One pass: tokens at these positions, as a row that says where they lie and whom they see."""
        module = self.module
        self.passes.append((positions[0], len(tokens)))
        layout = build_metadata([row], self.cache, SDPA, windows=module.windows)
        token_ids, places = (torch.tensor(list(x), device=module.device) for x in (tokens, positions))
        hidden = module(token_ids, places, self.cache, layout)
        return module.logits(hidden[-1:])[0]


# -- the same with a fault in it -------------------------------------------------------------------


class SeesOnlyItself(CachedModel):
    """Throws its cache away after the prompt: each new token sees nothing but itself."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(0 if start else start, len(tokens))
        return self.compute(tokens, range(start, start + len(tokens)), row)


class ForgetsThePrompt(CachedModel):
    """Loses the pages of the prompt: each new token sees the answer so far, and nothing of the question."""

    prompt = 0

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(start, len(tokens))
        if start == 0:
            self.prompt = len(tokens)
        else:
            row = Span(start - self.prompt, len(tokens), self.table[-(-self.prompt // PAGE) :])
        return self.compute(tokens, range(start, start + len(tokens)), row)


class OnePositionOff(CachedModel):
    """Counts each new token's position from one instead of zero; the cache itself is sound."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        off = 1 if start else 0
        return self.compute(
            tokens, range(start + off, start + off + len(tokens)), self.row(start, len(tokens))
        )


class DropsOldPages(CachedModel):
    """Keeps the latest two pages only, to save memory."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(start, len(tokens))
        dropped = max(0, start // PAGE - 1)
        row = Span(start - dropped * PAGE, len(tokens), self.table[dropped:])
        return self.compute(tokens, range(start, start + len(tokens)), row)


class LosesPageStarts(CachedModel):
    """Takes each new page of the answer one token too late: the first token in it is lost."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(start, len(tokens))
        if start and start % PAGE == 0:
            table = list(self.table)
            table[start // PAGE] = self.cache.null_block
            row = Span(start, len(tokens), table)
        return self.compute(tokens, range(start, start + len(tokens)), row)


class SharesWithoutComparing(CachedModel):
    """Takes the first page of any prompt for the first page of the prompt before it."""

    filled = False

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        if start == 0 and self.filled and len(tokens) > PAGE:
            return super().forward(tokens[PAGE:], PAGE)
        self.filled = self.filled or start + len(tokens) >= PAGE
        return super().forward(tokens, start)


# -- 01.1 ------------------------------------------------------------------------------------------


def generate(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """The `max_tokens` likeliest tokens, one after the other, each position computed once."""
    answer: list[int] = []
    tokens, start = list(prompt), 0
    while True:
        answer.append(int(model.forward(tokens, start).argmax()))
        if len(answer) == max_tokens:
            return answer
        start += len(tokens)
        tokens = answer[-1:]


def without_cache(model: CachedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The same tokens, with the whole text computed anew for each of them."""
    answer: list[int] = []
    while len(answer) < max_tokens:
        answer.append(int(model.forward([*prompt, *answer], 0).argmax()))
    return answer


def reference_for(loaded: LoadedModel) -> Decoder:
    """What `transformers` answers, greedily, with the same weights: a function of prompt and length.

    Args:
        loaded: a model with a short name or a Hub id.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of loading the weights
    try:
        model = reference_model(loaded, loaded.name)
    finally:
        if shown:
            logging.enable_progress_bar()

    @functools.cache
    def answer(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        return tuple(out[0, len(prompt) :].tolist())

    def reference(prompt: Sequence[int], max_tokens: int) -> list[int]:
        _check_question(prompt, max_tokens)
        return list(answer(tuple(prompt), max_tokens))

    return reference


def _check_question(prompt: Sequence[int], max_tokens: int) -> None:
    if not prompt or max_tokens < 1 or len(prompt) + max_tokens > ROOM:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_tokens} to answer: at least one of each is needed, "
            f"and {ROOM} is the most of both together"
        )


@functools.cache
def _tiny() -> LoadedModel:
    return load_model("tiny-random", device="cpu", say=None)


@functools.cache
def _tiny_reference() -> Decoder:
    return reference_for(_tiny())


def _ids(first: int, count: int) -> list[int]:
    return [300 + (37 * first + 11 * place) % 500 for place in range(count)]


def _examine_loop(function: Callable[..., Any]) -> None:
    for prompt, max_tokens in ((_ids(1, 3), 1), (_ids(2, 3), 2), (_ids(3, 1), 5), (_ids(4, 15), 24)):
        model = CachedModel(_tiny())
        given = list(prompt)
        answer = function(model, given, max_tokens)
        asked = f"prompt of {len(prompt)} tokens, max_tokens={max_tokens}"
        expect(given == prompt, "the prompt is the caller's: work on a copy of it", asked)
        expect(
            isinstance(answer, list) and all(type(token) is int for token in answer),
            "return a list of token ids, whole numbers: int(logits.argmax())",
            f"{asked}: {answer!r}",
        )
        expect(
            len(answer) == max_tokens,
            "the answer has max_tokens tokens, and none of the prompt",
            f"{asked}: {len(answer)} tokens",
        )
        _explain_passes(answer, _tiny_reference()(prompt, max_tokens), len(prompt), model, asked)


def _explain_passes(answer: list[int], right: list[int], prompt: int, model: CachedModel, asked: str) -> None:
    """Whether the tokens are right, and each position was computed once; if not, what to look at."""
    asked += "\npasses (start, tokens): " + ", ".join(map(str, model.passes[:6]))
    asked += ", ..." if len(model.passes) > 6 else ""
    times = Counter(place for start, count in model.passes for place in range(start, start + count))
    last = prompt + len(answer) - 2  # the last token is not computed: nothing follows it
    missing = [place for place in range(last + 1) if place not in times]
    beyond = [place for place in times if place > last]
    tokens = f"{asked}\nyours: {_few(answer)}\nright: {_few(right)}"
    if missing:
        tokens += f"\nposition {missing[0]} was never computed"
        expect(
            missing[0] >= prompt,
            "the whole prompt must go through the model: later tokens look at its keys and values",
            tokens,
        )
        raise Wrong("a token's position is its place in the text, counted from 0: leave none out", tokens)
    if answer != right:
        place = next(i for i, pair in enumerate(zip(answer, right, strict=True)) if pair[0] != pair[1])
        raise Wrong(
            "the tokens must be those of transformers' greedy generate",
            f"{tokens}\nthe first that differs is token {place}",
        )
    twice = [place for place, count in times.items() if count > 1]
    enough = f"{asked}\ncomputed {model.computed} tokens, {last + 1} are enough"
    if twice:
        raise Wrong(
            "the tokens are right, but the cache is not used: compute each position once",
            f"{enough}; position {twice[0]} was computed {times[twice[0]]} times",
        )
    expect(
        not beyond,
        "the tokens are right, but nothing follows the last one: it need not be computed",
        enough,
    )


def _few(tokens: list[int]) -> str:
    return ", ".join(map(str, tokens[:8])) + (", ..." if len(tokens) > 8 else "")


def _questions() -> list[tuple[list[int], int]]:
    """Prompts cut out of the text in the package, with the lengths of their answers."""
    ids = _tiny().tokenizer.encode(prose()[:2000], add_special_tokens=False)
    return [(ids[start : start + length], answer) for start, length, answer in _CUTS]


_CUTS = ((0, 12, 24), (40, 30, 16), (90, 48, 40))


def _engine_answers(scheduler: str) -> tuple[list[list[int]], int]:
    """What the engine answers to the questions, and the tokens that it computed for it."""
    engine = Engine(
        EngineConfig(model=_tiny(), num_blocks=64, scheduler=scheduler, enable_prefix_caching=False)
    )
    ids = [
        engine.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
        for prompt, count in _questions()
    ]
    while engine.has_unfinished:
        engine.step()
    return [engine.outputs[i].token_ids for i in ids], sum(record.total_tokens for record in engine.trace)


def _run_loop(function: Callable[..., Any]) -> Run:
    answers, computed = [], 0
    for prompt, count in _questions():
        model = CachedModel(_tiny())
        answers.append(function(model, list(prompt), count))
        computed += model.computed
    (kept, with_cache), (_, uncached) = _engine_answers("naive"), _engine_answers("uncached")
    expect(answers == kept, "the tokens must be those of the engine")
    values = {"your loop": computed, "the engine": with_cache, "the engine without a cache": uncached}
    return Run(
        f"It answered {len(answers)} prompts with {sum(map(len, answers))} tokens, those of the engine, and "
        f"computed {computed:,} tokens; the engine computes {with_cache:,}, "
        f"and {uncached:,} without a cache.",
        [
            (
                "What it took for the same answers",
                notebook.bars(values, "Tokens that went through the model", unit="tokens"),
            )
        ],
    )


# -- 01.2 ------------------------------------------------------------------------------------------


def is_faulty(decoder: Decoder, reference: Decoder) -> bool:
    """Whether a decoder's tokens are not those of the reference."""
    questions = (
        (list(range(300, 303)), 8),  # short: the prompt, the first tokens
        (list(range(320, 360)), 40),  # long, and longer than some pages: what lies far back
        (list(range(400, 440)), 8),  # and another one after it: what was left behind
    )
    return any(decoder(prompt, count) != reference(prompt, count) for prompt, count in questions)


@dataclass(frozen=True)
class Suspect:
    """A decoder to be judged.

    Attributes:
        name: what it is called in a picture.
        what: what it does, after "it".
        fault: whether that is a fault.
        make: builds a fresh one on a model.
        advice: what shows the fault.
    """

    name: str
    what: str
    fault: bool
    make: Callable[[LoadedModel], Decoder]
    advice: str = ""


def decoder_of(
    kind: type[CachedModel] = CachedModel, loop: Callable[..., list[int]] = generate
) -> Callable[[LoadedModel], Decoder]:
    """What builds a decoder: a loop over one cache, which serves one prompt after the other."""

    def make(loaded: LoadedModel) -> Decoder:
        model = kind(loaded)

        def decode(prompt: Sequence[int], max_tokens: int) -> list[int]:
            _check_question(prompt, max_tokens)
            return loop(model, list(prompt), max_tokens)

        return decode

    return make


def _in_chunks(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """A sound loop that computes the prompt in chunks of 7, as an engine with a small token budget does."""
    *starts, last = range(0, len(prompt), 7)
    for start in starts:
        model.forward(prompt[start : start + 7], start)
    answer = [int(model.forward(prompt[last:], last).argmax())]
    while len(answer) < max_tokens:
        answer.append(int(model.forward(answer[-1:], len(prompt) + len(answer) - 1).argmax()))
    return answer


def _without_last(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """A loop that loses the last token of the prompt."""
    return generate(model, prompt[:-1] or prompt, max_tokens)


def _engine_decoder(loaded: LoadedModel) -> Decoder:
    engine = Engine(EngineConfig(model=loaded, num_blocks=2 * ROOM // 8, block_size=8))

    def decode(prompt: Sequence[int], max_tokens: int) -> list[int]:
        _check_question(prompt, max_tokens)
        name = engine.add_request(list(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        while engine.has_unfinished:
            engine.step()
        return engine.outputs.pop(name).token_ids

    return decode


SUSPECTS = (
    Suspect("plain loop", "keeps its cache, and nothing else", False, decoder_of()),
    Suspect(
        "no cache",
        "computes the whole text for each token: slow, and right",
        False,
        decoder_of(loop=without_cache),
    ),
    Suspect(
        "sees only itself",
        "throws its cache away after the prompt",
        True,
        decoder_of(SeesOnlyItself),
        "its first token is right: compare more than the first",
    ),
    Suspect(
        "loses the last prompt token",
        "leaves out the last token of the prompt",
        True,
        decoder_of(loop=_without_last),
        "a prompt of more than one token shows it at once",
    ),
    Suspect(
        "prompt in chunks", "computes the prompt in chunks of 7 tokens", False, decoder_of(loop=_in_chunks)
    ),
    Suspect(
        "forgets the prompt",
        "sees its answer so far, and nothing of the question",
        True,
        decoder_of(ForgetsThePrompt),
        "its first token is right: compare more than the first",
    ),
    Suspect(
        "one position off",
        "counts positions from one instead of zero after the prompt",
        True,
        decoder_of(OnePositionOff),
        "it may be right for many tokens: ask for longer answers, and more of them",
    ),
    Suspect("labkit's engine", "is labkit's engine, with its prefix cache", False, _engine_decoder),
    Suspect(
        "loses page starts",
        f"loses the first token of each page of {PAGE} that its answer begins",
        True,
        decoder_of(LosesPageStarts),
        "an answer must go on past the end of a page before it shows",
    ),
    Suspect(
        "drops old pages",
        f"sees its latest two pages of {PAGE} tokens only",
        True,
        decoder_of(DropsOldPages),
        f"short texts have nothing to lose: prompt and answer must be longer than {2 * PAGE} tokens",
    ),
    Suspect(
        "shares without comparing",
        f"takes the first {PAGE} tokens of a prompt for those of the prompt before it",
        True,
        decoder_of(SharesWithoutComparing),
        f"the first answer is right: ask twice, with prompts that differ and have more than {PAGE} tokens",
    ),
)


def two_engines(loaded: LoadedModel) -> dict[str, Decoder]:
    """The two that notebook 01 begins with. One of them is wrong; which one, its reader finds out."""
    return {
        "A": decoder_of(loop=without_cache)(loaded),
        "B": decoder_of(OnePositionOff)(loaded),
    }


class _Watched:
    """A decoder that notes what it is asked."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.asked: list[tuple[int, int]] = []

    def __call__(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        answer = self._decoder(list(prompt), max_tokens)
        self.asked.append((len(prompt), max_tokens))
        return answer

    def __str__(self) -> str:
        questions = [f"{prompt} tokens in, {answer} out" for prompt, answer in self.asked[:4]]
        questions += [f"{len(self.asked) - 4} more"] if len(self.asked) > 4 else []
        return "it was asked: " + ("; ".join(questions) or "nothing")


def _verdicts(
    function: Callable[..., Any], suspects: Iterable[Suspect]
) -> Iterator[tuple[Suspect, _Watched, Any]]:
    """What the function makes of each suspect."""
    for suspect in suspects:
        watched = _Watched(suspect.make(_tiny()))
        yield suspect, watched, function(watched, _tiny_reference())


def _examine_detector(function: Callable[..., Any]) -> None:
    for suspect, watched, verdict in _verdicts(function, SUSPECTS):
        expect(
            isinstance(verdict, bool),
            "say True for a faulty decoder and False for a sound one",
            f"it returned {verdict!r}",
        )
        if suspect.fault:
            expect(
                verdict,
                f"a faulty decoder passed: it {suspect.what}",
                f"{suspect.advice}\n{watched}",
            )
        else:
            expect(
                not verdict,
                f"a sound decoder was flagged: it {suspect.what}",
                f"its tokens are those of the reference\n{watched}",
            )


def _tokens_asked(function: Callable[..., Any]) -> dict[str, int]:
    """Tokens of answers that were needed to catch each of the faulty."""
    faulty = [suspect for suspect in SUSPECTS if suspect.fault]
    return {
        suspect.name: sum(count for _, count in watched.asked)
        for suspect, watched, _ in _verdicts(function, faulty)
    }


@functools.cache
def _tokens_of_reference() -> dict[str, int]:
    return _tokens_asked(is_faulty)


def _run_detector(function: Callable[..., Any]) -> Run:
    yours, own = _tokens_asked(function), _tokens_of_reference()
    sound = sum(not suspect.fault for suspect in SUSPECTS)
    return Run(
        f"It caught all {len(yours)} faulty decoders and let all {sound} sound ones pass, labkit's engine "
        f"among them. To catch the faults it asked for {sum(yours.values()):,} tokens; the reference asks "
        f"for {sum(own.values()):,}.",
        [
            ("Your function", notebook.bars(yours, "Answer tokens asked for until caught", unit="tokens")),
            ("The reference", notebook.bars(own, "Answer tokens asked for until caught", unit="tokens")),
        ],
    )


EXERCISES = (
    Exercise("01.1", "A loop that keeps its cache", generate, _examine_loop, _run_loop),
    Exercise("01.2", "Catch the decoder that is wrong", is_faulty, _examine_detector, _run_detector),
)
