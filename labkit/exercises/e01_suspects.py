"""The decoders that exercise 01.2 judges: some are sound, the others lose what they computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from labkit.config import EngineConfig
from labkit.core.attention import Span
from labkit.engine import Engine
from labkit.exercises.common import exactly
from labkit.exercises.e01_loop import generate, without_cache
from labkit.exercises.e01_model import PAGE, ROOM, CachedModel, Decoder, check_question
from labkit.models.load import LoadedModel

# -- a model with a fault in its cache -------------------------------------------------------------


class SeesOnlyItself(CachedModel):
    """Throws its cache away after the prompt: each new token sees only itself."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(0 if start else start, len(tokens))
        return self.compute(tokens, range(start, start + len(tokens)), row)


class ForgetsThePrompt(CachedModel):
    """Loses the pages of the prompt: each new token sees only the answer so far."""

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
    """Keeps only the latest two pages, to save memory."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(start, len(tokens))
        dropped = max(0, start // PAGE - 1)
        row = Span(start - dropped * PAGE, len(tokens), self.table[dropped:])
        return self.compute(tokens, range(start, start + len(tokens)), row)


class LosesPageStarts(CachedModel):
    """Takes each new page of the answer one token too late: the first token of the page is lost."""

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        row = self.row(start, len(tokens))
        if start and start % PAGE == 0:
            table = list(self.table)
            table[start // PAGE] = self.cache.null_block
            row = Span(start, len(tokens), table)
        return self.compute(tokens, range(start, start + len(tokens)), row)


class SharesWithoutComparing(CachedModel):
    """Believes that every prompt begins with the page that it already holds, and compares no tokens."""

    filled = False

    def forward(self, tokens: Sequence[int], start: int) -> Tensor:
        if start == 0 and self.filled and len(tokens) > PAGE:
            return super().forward(tokens[PAGE:], PAGE)
        self.filled = self.filled or start + len(tokens) >= PAGE
        return super().forward(tokens, start)


# -- decoders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suspect:
    """A decoder that a detector judges.

    Attributes:
        name: its name in a picture.
        what: what it does, as the end of a sentence that begins with "it".
        fault: whether that is a fault.
        make: builds a fresh decoder from a model.
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
    """A function that builds a decoder: a loop over one cache, which serves one prompt after the other."""

    def make(loaded: LoadedModel) -> Decoder:
        model = kind(loaded)

        def decode(prompt: Sequence[int], max_tokens: int) -> list[int]:
            check_question(prompt, max_tokens)
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
        check_question(prompt, max_tokens)
        name = engine.add_request(list(prompt), exactly(max_tokens))
        engine.run()
        return engine.outputs.pop(name).token_ids

    return decode


SUSPECTS = (
    Suspect("plain loop", "keeps its cache, and does nothing else", False, decoder_of()),
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
    """The two that notebook 01 begins with. One of them is wrong, and its reader finds out which one."""
    return {
        "A": decoder_of(loop=without_cache)(loaded),
        "B": decoder_of(OnePositionOff)(loaded),
    }
