"""The exercises of notebook 01: loops and detectors that are wrong are refused for their own reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from labkit.exercises import e01_suspects
from labkit.exercises.common import tiny_model
from labkit.exercises.e01_detector import is_faulty
from labkit.exercises.e01_loop import generate, without_cache
from labkit.exercises.e01_model import CachedModel, Decoder, tiny_reference
from labkit.exercises.e01_suspects import SUSPECTS, Suspect, two_engines
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution

# -- 01.1 ------------------------------------------------------------------------------------------


def loop(
    model: CachedModel,
    prompt: list[int],
    max_tokens: int,
    *,
    off: int = 0,
    first: int = 0,
    upto: int | None = None,
) -> list[int]:
    """A loop with a cache; `off` shifts positions after the prompt, of which `[first:upto]` is computed."""
    answer = [int(model.forward(prompt[first:upto] or prompt, first if prompt[first:upto] else 0).argmax())]
    while len(answer) < max_tokens:
        position = len(prompt) + len(answer) - 1 + off
        answer.append(int(model.forward(answer[-1:], position).argmax()))
    return answer


def computes_the_last(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    answer, tokens, start = [], prompt, 0
    for _ in range(max_tokens):
        answer.append(int(model.forward(tokens, start).argmax()))
        start += len(tokens)
        tokens = answer[-1:]
    model.forward(tokens, start)
    return answer


def eats_the_prompt(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    answer: list[int] = []
    start = 0
    while len(answer) < max_tokens:
        answer.append(int(model.forward(prompt[start:], start).argmax()))
        start = len(prompt)
        prompt.append(answer[-1])
    return answer


def one_token_again(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Computes the prompt's last token a second time."""
    model.forward(prompt, 0)
    answer, token, position = [], prompt[-1], len(prompt) - 1
    while len(answer) < max_tokens:
        token = int(model.forward([token], position).argmax())
        answer.append(token)
        position += 1
    return answer


WRONG_LOOPS = {
    "no cache": (without_cache, "compute each position once"),
    "the last prompt token twice": (one_token_again, "compute each position once"),
    "the last answer token as well": (computes_the_last, "the last one need not be computed"),
    "prompt and answer": (lambda m, p, n: p + generate(m, p, n), "none of the prompt"),
    "one too few": (lambda m, p, n: generate(m, p, n)[:-1], "the answer has max_tokens tokens"),
    "a tensor": (lambda m, p, n: torch.tensor(generate(m, p, n)), "return a list of token ids"),
    "the caller's prompt": (eats_the_prompt, "the prompt is the caller's"),
    "position one too far": (lambda m, p, n: loop(m, p, n, off=1), "counted from 0: leave none out"),
    "position one too low": (lambda m, p, n: loop(m, p, n, off=-1), "counted from 0: leave none out"),
    "only the last prompt token": (
        lambda m, p, n: loop(m, p, n, first=len(p) - 1),
        "the whole prompt must go through",
    ),
    "without the last prompt token": (
        lambda m, p, n: loop(m, p, n, upto=-1),
        "the whole prompt must go through",
    ),
    "the unlikeliest": (
        lambda m, p, n: [int(m.forward(p, 0).argmin()), *generate(CachedModel(tiny_model()), p, n)[1:]],
        "those of transformers' greedy generate",
    ),
}


@pytest.mark.parametrize("name", WRONG_LOOPS)
def test_a_wrong_loop_is_refused_for_its_own_reason(name: str) -> None:
    assert_refused("01.1", *WRONG_LOOPS[name])


def in_chunks(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Computes the prompt token by token: slow, but each position once."""
    text = list(prompt)
    for position in range(len(prompt) + max_tokens - 1):
        best = int(model.forward([text[position]], position).argmax())
        if position >= len(prompt) - 1:
            text.append(best)
    return text[len(prompt) :]


@pytest.mark.parametrize("right", [loop, in_chunks, e01_suspects._in_chunks])
def test_right_loops_are_accepted_with_the_least_to_compute(right: Callable[..., list[int]]) -> None:
    verdict = assert_accepted("01.1", right)
    assert "computed 167 tokens; the engine computes 167, and 3,864 without a cache" in verdict.text
    assert len(verdict.pictures) == 1


@pytest.mark.parametrize(("exercise_id", "name"), [("01.1", "generate"), ("01.2", "is_faulty")])
def test_the_folded_solutions_are_right(exercise_id: str, name: str) -> None:
    assert_accepted(exercise_id, function_from(solution("01", exercise_id), name))


def test_the_stubs_are_open() -> None:
    def stub(*_: Any) -> Any:
        raise NotImplementedError

    assert_open("01.1", stub)
    assert_open("01.2", stub)


def test_a_model_without_room_or_tokens_says_so() -> None:
    model = CachedModel(tiny_model(), room=32)
    with pytest.raises(ValueError, match="0 tokens from position 3 on: there is room for 0 to 31"):
        model.forward([], 3)
    with pytest.raises(ValueError, match="2 tokens from position 31 on"):
        model.forward([300, 301], 31)
    assert model.computed == 0
    model.forward([300, 301], 30)
    assert model.computed == 2 and model.passes == [(30, 2)]


# -- 01.2 ------------------------------------------------------------------------------------------

LONG, SHORT = list(range(320, 360)), list(range(300, 303))


def asking(*questions: tuple[list[int], int]) -> Callable[[Decoder, Decoder], bool]:
    """A detector that compares the answers to these questions."""
    return lambda decoder, reference: any(decoder(p, n) != reference(p, n) for p, n in questions)


def first_token_only(decoder: Decoder, reference: Decoder) -> bool:
    return decoder(LONG, 40)[0] != reference(LONG, 40)[0]


def as_sets(decoder: Decoder, reference: Decoder) -> bool:
    return not set(decoder(SHORT, 1)) & set(reference(SHORT, 40))


def looks_broken(decoder: Decoder, reference: Decoder) -> bool:
    """Judges by the look of a text: it is wrong if it repeats itself."""
    answer = decoder(LONG, 40)
    return len(set(answer)) < len(answer) // 2


WRONG_DETECTORS = {
    "all are sound": (lambda decoder, reference: False, "it throws its cache away after the prompt"),
    "all are faulty": (lambda decoder, reference: True, "a sound decoder was flagged: it keeps its cache"),
    "backwards": (
        lambda decoder, reference: not is_faulty(decoder, reference),
        "a sound decoder was flagged: it keeps its cache",
    ),
    "no verdict": (lambda decoder, reference: None, "return True for a faulty decoder"),
    "a place": (lambda decoder, reference: 0, "return True for a faulty decoder"),
    "only lengths": (
        lambda decoder, reference: len(decoder(LONG, 40)) != len(reference(LONG, 40)),
        "it throws its cache away after the prompt",
    ),
    "only the first token": (first_token_only, "compare more than the first"),
    "tokens in any order": (as_sets, "compare more than the first"),
    "the look of it": (looks_broken, "a faulty decoder passed"),
    "short answers": (asking((LONG, 2), (SHORT, 2)), "the end of a page"),
    "short texts": (asking((SHORT, 20), (list(range(400, 420)), 8)), "longer than 32 tokens"),
    "one question": (asking((LONG, 40)), "ask twice"),
    "the same question twice": (asking((LONG, 40), (LONG, 40)), "ask twice"),
    "short second questions": (asking((LONG, 40), (SHORT, 40)), "ask twice"),
}


@pytest.mark.parametrize("name", WRONG_DETECTORS)
def test_a_detector_that_misses_or_imagines_is_refused_for_its_own_reason(name: str) -> None:
    assert_refused("01.2", *WRONG_DETECTORS[name])


def places(decoder: Decoder, reference: Decoder) -> bool:
    """Another right one: long questions only, all of them asked."""
    differ = 0
    for first in (300, 450, 600):
        prompt = list(range(first, first + 50))
        pairs = zip(decoder(prompt, 30), reference(prompt, 30), strict=True)
        differ += sum(a != b for a, b in pairs)
    return differ > 0


@pytest.mark.parametrize("right", [places, asking((LONG, 20), (list(range(500, 540)), 20), (SHORT, 40))])
def test_right_detectors_are_accepted(right: Callable[..., bool]) -> None:
    verdict = assert_accepted("01.2", right)
    assert "caught all 7 faulty decoders and let all 4 sound ones pass" in verdict.text
    assert len(verdict.pictures) == 2


def test_who_misses_a_fault_is_told_what_was_asked() -> None:
    assert (
        "it was asked: 40 tokens in, 40 out" in assert_refused("01.2", asking((LONG, 40)), "ask twice").text
    )


@pytest.mark.parametrize("suspect", SUSPECTS, ids=lambda suspect: suspect.name)
def test_a_suspect_is_what_it_is_said_to_be(suspect: Suspect) -> None:
    decoder, reference = suspect.make(tiny_model()), tiny_reference()
    wrong = any(decoder(prompt, 24) != reference(prompt, 24) for prompt in (LONG, list(range(500, 540))))
    assert wrong == suspect.fault
    assert bool(suspect.advice) == suspect.fault


def test_one_of_two_engines_is_right() -> None:
    engines, reference = (
        two_engines(tiny_model()),
        tiny_reference(),
    )
    assert [engine(LONG, 24) == reference(LONG, 24) for engine in engines.values()] == [True, False]


def test_questions_have_limits() -> None:
    for decoder in (tiny_reference(), *(suspect.make(tiny_model()) for suspect in SUSPECTS)):
        for prompt, count in (([], 3), ([300], 0), ([300] * 500, 13)):
            with pytest.raises(ValueError, match="at least one of each is needed, and 512 is the most"):
                decoder(prompt, count)
