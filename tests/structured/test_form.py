"""A form of one answer: masks ahead, forced tokens, where it may end, and faults that stay where they are."""

from __future__ import annotations

import os
import random
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.core.request import Request
from labkit.sampling_params import SamplingParams, Structured
from labkit.structured.compiler import FormCompiler
from labkit.structured.form import AnswerForm
from tests.structured.forms import tiny, tokens_of, vocabulary
from tests.structured.schemas import SCHEMAS

END = next(iter(tiny().eos_token_ids))
ASKED = [
    {"choice": ["yes", "no", "no, thank you"]},
    {"regex": "[a-c]{1,4}(, the end)?"},
    *({"json": SCHEMAS[name]} for name in ("weather", "long_keys", "shape", "digit", "quoted")),
]
compiler = FormCompiler(tiny())


def new(asked: Any, max_tokens: int = 200) -> AnswerForm:
    return compiler.start(Structured.of(asked), frozenset({END}), max_tokens)


def request_of(form: AnswerForm, tokens: list[int]) -> Request:
    request = Request("a", [5], SamplingParams(), form=form)
    request.token_ids += tokens
    return request


@given(st.sampled_from(ASKED), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_masks_after_drafts_are_those_that_would_come_without(asked: Any, rng: random.Random) -> None:
    slow, answer = new(asked), []
    masks = [slow.allowed_next(request_of(slow, []))]
    while len(answer) < 20:
        answer.append(rng.choice(sorted(tokens_of(masks[-1]))))
        if slow.push(answer[-1]):
            break
        slow.start()
        masks.append(slow.allowed_next(request_of(slow, answer)))
    quick, place = new(asked), 0
    while place < len(answer):
        drafts = answer[place : place + rng.randint(0, 4)]
        if rng.random() < 0.3 and drafts:
            drafts[rng.randrange(len(drafts))] = rng.randrange(
                len(vocabulary().tokens)
            )  # it may break the form
        quick.start(drafts)
        for count in range(len(drafts) + 1):
            if place + count < len(masks) and drafts[:count] == answer[place : place + count]:
                ahead = request_of(quick, answer[:place]).ahead(drafts[:count])
                assert torch.equal(quick.allowed_next(ahead), masks[place + count])
        right = next((i for i, d in enumerate(drafts) if d != answer[place + i]), len(drafts))
        came = answer[place : place + right + 1]
        for token in came:
            quick.push(token)
        assert quick.allowed == tuple(int(mask.sum()) for mask in masks[place : place + len(came)])
        place += len(came)


def test_a_form_may_end_where_it_is_complete_and_ends_where_nothing_may_follow() -> None:
    form = new({"regex": "a(bc)?"})
    a, b, c = vocabulary().encode(b"abc")
    assert tokens_of(form.allowed_next(request_of(form, []))) == {a}
    assert not form.push(a)
    form.start()
    assert tokens_of(form.allowed_next(request_of(form, [a]))) == {b, END}
    assert not form.push(b)
    assert form.forced == (c,)
    form.start()
    assert form.push(c)


def test_a_stop_token_with_a_text_of_its_own_is_allowed_where_its_text_is() -> None:
    full, a = vocabulary().encode(b".a")
    form = compiler.start(Structured.of({"regex": r"a+(\.a)?"}), frozenset({END, full}), 9)
    assert tokens_of(form.allowed_next(request_of(form, []))) == {a}
    form.push(a)
    form.start()
    assert tokens_of(form.allowed_next(request_of(form, [a]))) == {a, full, END}


class _Broken:
    """A matcher that fails in its third mask."""

    may_end = is_over = False

    def __init__(self) -> None:
        self.masks = 0
        self.taken = 0

    def mask(self) -> np.ndarray:
        self.masks += 1
        if self.masks == 3:
            raise ValueError("made up")
        return np.ones(9, bool)

    def advance(self, token: int) -> bool:
        self.taken += 1
        return True

    def rollback(self, count: int) -> None:
        self.taken -= count

    def forced(self) -> list[int]:
        return []


def test_a_mask_that_cannot_be_made_is_empty_and_has_a_reason() -> None:
    matcher = _Broken()
    form = AnswerForm(matcher, 9, frozenset())
    assert form.allowed_next(request_of(form, [])).all()
    form.start([1, 2])
    assert form.allowed_next(request_of(form, [])).all()
    assert not form.allowed_next(request_of(form, [1])).any()
    assert form.error == "ValueError: made up"
    assert matcher.taken == 0  # what was tried is taken back all the same


def test_threads_share_what_one_of_them_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Structured] = []
    usual = FormCompiler._compile

    def counted(self: FormCompiler, asked: Structured) -> Any:
        compiled.append(asked)
        return usual(self, asked)

    monkeypatch.setattr(FormCompiler, "_compile", counted)
    own = FormCompiler(tiny())
    asked = [Structured.of({"regex": "[a-f]{1,20}x"}), Structured.of({"json": SCHEMAS["book"]})]
    gate, found = threading.Barrier(8), []

    def start(number: int) -> None:
        gate.wait()
        found.append(own.start(asked[number % 2], frozenset({END}), 99).forced)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(compiled) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_makes_masks_of_its_own() -> None:
    new({"choice": ["yes", "no"]}).allowed_next(
        request_of(new({"choice": ["yes", "no"]}), [])
    )  # a thread runs
    child = os.fork()
    if not child:
        form = new({"choice": ["yes", "no"]})
        os._exit(0 if form.allowed_next(request_of(form, [])).any() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("asked", "max_tokens", "words"),
    [
        ({"regex": "x{0}"}, 9, "structured: regex: only the empty answer has this form"),
        ({"grammar": "start: "}, 9, "structured: grammar: only the empty answer has this form"),
        ({"regex": "x{400}"}, 5, "max_tokens must be at least [0-9]+ for this form: .* 5 is the limit"),
        ({"json": SCHEMAS["long_keys"]}, 5, "max_tokens must be at least [0-9]+ for this form"),
        ({"choice": ["\ud800"]}, 9, "no answer that this model can write has this form"),
    ],
)
def test_a_form_that_no_answer_can_have_is_refused(asked: Any, max_tokens: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        new(asked, max_tokens)


@given(st.integers(1, 12), st.sampled_from(["yes and no", "a", "together with the others"]))
def test_a_form_that_an_answer_can_have_is_never_refused(max_tokens: int, text: str) -> None:
    tokens = vocabulary().encode(text.encode())
    if len(tokens) <= max_tokens:
        assert new({"regex": re.escape(text)}, max_tokens)
        assert new({"choice": [text, text * 9]}, max_tokens)
