"""Exercise 01.2: find out whether a decoder is wrong."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from labkit import notebook
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import tiny_model, truth
from labkit.exercises.e01_model import Decoder, tiny_reference
from labkit.exercises.e01_suspects import SUSPECTS, Suspect


def is_faulty(decoder: Decoder, reference: Decoder) -> bool:
    """Whether a decoder's tokens are not those of the reference."""
    questions = (
        (list(range(300, 303)), 8),  # short: shows faults in the prompt and the first tokens
        (list(range(320, 360)), 40),  # longer than some pages: shows faults far back in the text
        (list(range(400, 440)), 8),  # another one after it: shows what an earlier request left behind
    )
    return any(decoder(prompt, count) != reference(prompt, count) for prompt, count in questions)


class _Watched:
    """A decoder that keeps a list of what it is asked."""

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
    """The function's verdict on each suspect."""
    for suspect in suspects:
        watched = _Watched(suspect.make(tiny_model()))
        yield suspect, watched, function(watched, tiny_reference())


def _again() -> list[Suspect]:
    """Four of the decoders, by chance and in another order: who only knows the order is found out."""
    kinds = [s for s in SUSPECTS if s.fault], [s for s in SUSPECTS if not s.fault]
    faulty, sound = (random.sample(kind, 2) for kind in kinds)
    return [faulty[0], sound[0], faulty[1], sound[1]]


def _examine_detector(function: Callable[..., Any]) -> None:
    for suspect, watched, answer in _verdicts(function, [*SUSPECTS, *_again()]):
        verdict = truth(answer)
        if verdict is None:
            rule = "return True for a faulty decoder and False for a sound one"
            raise Wrong(rule, f"it returned {answer!r}")
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
                f"all its tokens are those of the reference\n{watched}",
            )


def _tokens_asked(function: Callable[..., Any]) -> dict[str, int]:
    """How many answer tokens the function asked for to catch each of the faulty decoders."""
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


DETECTOR = Exercise("01.2", "Catch the decoder that is wrong", is_faulty, _examine_detector, _run_detector)
