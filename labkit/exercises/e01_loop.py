"""Exercise 01.1: a greedy loop that keeps its cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from labkit import notebook
from labkit.analysis.workload import prose
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import answers, exactly, few, prompt_of, tiny_engine, tiny_model, whole
from labkit.exercises.e01_model import CachedModel, tiny_reference
from labkit.views.style import plural


def generate(model: CachedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """The `max_tokens` likeliest tokens, one after the other; computes each position once."""
    answer: list[int] = []
    tokens, start = list(prompt), 0
    while True:
        answer.append(int(model.forward(tokens, start).argmax()))
        if len(answer) == max_tokens:
            return answer
        start += len(tokens)
        tokens = answer[-1:]


def without_cache(model: CachedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The same tokens; computes the whole text anew for each of them."""
    answer: list[int] = []
    while len(answer) < max_tokens:
        answer.append(int(model.forward([*prompt, *answer], 0).argmax()))
    return answer


def _examine_loop(function: Callable[..., Any]) -> None:
    cases = [*enumerate(((3, 1), (3, 2), (1, 5), (15, 24), (37, 3)), start=1)]
    cases += [cases[3], cases[1]]  # again: an answer that is remembered computes nothing
    for number, (length, max_tokens) in cases:
        prompt = prompt_of(number, length)
        model = CachedModel(tiny_model())
        given = list(prompt)
        answer = function(model, given, max_tokens)
        asked = f"prompt of {plural(length, 'token')}, max_tokens={max_tokens}"
        expect(given == prompt, "the prompt is the caller's: leave it as it is, and work on a copy", asked)
        expect(
            isinstance(answer, list) and all(whole(token) is not None for token in answer),
            "return a list of token ids, each a whole number: int(logits.argmax())",
            f"{asked}: it returned {answer!r}",
        )
        expect(
            len(answer) == max_tokens,
            "the answer has max_tokens tokens, and none of the prompt",
            f"{asked}: it returned {plural(len(answer), 'token')}",
        )
        answer = [int(token) for token in answer]
        _judge(answer, tiny_reference()(prompt, max_tokens), length, model, asked)


def _judge(answer: list[int], right: list[int], prompt: int, model: CachedModel, asked: str) -> None:
    """Raise `Wrong` unless the tokens are right and each position was computed once."""
    asked += "\npasses (start, tokens): " + ", ".join(map(str, model.passes[:6]))
    asked += ", ..." if len(model.passes) > 6 else ""
    times = Counter(place for start, count in model.passes for place in range(start, start + count))
    last = prompt + len(answer) - 2  # the last token is not computed: nothing follows it
    missing = [place for place in range(last + 1) if place not in times]
    beyond = [place for place in times if place > last]
    tokens = f"{asked}\nyours: {few(answer)}\nright: {few(right)}"
    if missing:
        tokens += f"\nposition {missing[0]} was never computed"
        expect(
            missing[0] >= prompt,
            "the whole prompt must go through the model: later tokens need its keys and values",
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
    enough = f"{asked}\nit computed {model.computed} tokens, and {last + 1} are enough"
    if twice:
        raise Wrong(
            "the tokens are right, but the cache is not used: compute each position once",
            f"{enough}; position {twice[0]} was computed {times[twice[0]]} times",
        )
    expect(
        not beyond,
        "the tokens are right, but the last one need not be computed: nothing follows it",
        enough,
    )


_CUTS = ((0, 12, 24), (40, 30, 16), (90, 48, 40))  # start and length of a prompt, length of its answer


def _questions() -> list[tuple[list[int], int]]:
    """Prompts from the text in the package, with the lengths of their answers."""
    ids = tiny_model().tokenizer.encode(prose()[:2000], add_special_tokens=False)
    return [(ids[start : start + length], answer) for start, length, answer in _CUTS]


def _ask_engine(scheduler: str) -> tuple[list[list[int]], int]:
    """The engine's answers to the questions, and how many tokens it computed for them."""
    engine = tiny_engine(num_blocks=64, scheduler=scheduler, enable_prefix_caching=False)
    for prompt, count in _questions():
        engine.add_request(prompt, exactly(count))
    trace = engine.run()
    return list(answers(engine).values()), sum(record.total_tokens for record in trace)


def _run_loop(function: Callable[..., Any]) -> Run:
    found, computed = [], 0
    for prompt, count in _questions():
        model = CachedModel(tiny_model())
        found.append([int(token) for token in function(model, list(prompt), count)])
        computed += model.computed
    (kept, with_cache), (_, uncached) = _ask_engine("naive"), _ask_engine("uncached")
    rule = "the tokens must be those of the engine"
    for number, (yours, right) in enumerate(zip(found, kept, strict=True)):
        expect(yours == right, rule, f"prompt {number}\nyours: {few(yours)}\nright: {few(right)}")
    values = {"your loop": computed, "the engine": with_cache, "the engine without a cache": uncached}
    return Run(
        f"It answered {len(found)} prompts with {sum(map(len, found))} tokens, those of the engine, and "
        f"computed {computed:,} tokens; the engine computes {with_cache:,}, "
        f"and {uncached:,} without a cache.",
        [
            (
                "What it took for the same answers",
                notebook.bars(values, "Tokens that went through the model", unit="tokens"),
            )
        ],
    )


LOOP = Exercise("01.1", "A loop that keeps its cache", generate, _examine_loop, _run_loop)
