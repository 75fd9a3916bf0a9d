"""The exercises of notebook 14, and its runs: what they count, and that their processes end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.exercises import e14, e14_place, judge
from labkit.exercises.common import PROMPTS, answers, serve, tiny_model
from labkit.exercises.e14_layers import JOBS, engine_of, right_answers
from labkit.exercises.e14_place import Decoder, place
from labkit.exercises.e14_ring import RingSum, ring
from labkit.exercises.e14_split import split
from tests.exercising import assert_accepted, assert_open, assert_refused, function_from, solution
from tests.in_threads import in_threads  # noqa: F401

REFERENCES = {"14.1": split, "14.2": place, "14.3": ring}
NAMES = {"14.1": "split", "14.2": "place", "14.3": "ring"}

# -- 14.1 ------------------------------------------------------------------------------------------


def by_outputs(layer: Any, rank: int, world_size: int) -> Any:
    return {name: tensor.chunk(world_size)[rank] for name, tensor in layer.items()}


def twice_the_bias(layer: Any, rank: int, world_size: int) -> Any:
    part = split(layer, rank, world_size)
    return part | {name: layer[name] for name in layer if name in ("o_proj.bias", "down_proj.bias")}


def through_heads(layer: Any, rank: int, world_size: int) -> Any:
    rows = {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")}
    return {
        name: layer[name][rank::world_size] if name in rows else tensor
        for name, tensor in split(layer, rank, world_size).items()
    }


def down_from_the_other_end(layer: Any, rank: int, world_size: int) -> Any:
    part = split(layer, rank, world_size)
    return part | {"down_proj.weight": layer["down_proj.weight"].chunk(world_size, 1)[-1 - rank]}


def in_the_layer(layer: Any, rank: int, world_size: int) -> Any:
    for name, tensor in split(dict(layer), rank, world_size).items():
        layer[name] = tensor
    return layer


def in_single_precision(layer: Any, rank: int, world_size: int) -> Any:
    return {name: tensor.float() for name, tensor in split(layer, rank, world_size).items()}


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (by_outputs, "(o_proj, down_proj) are cut by their inputs"),
        (twice_the_bias, "is in the sum once"),
        (through_heads, "heads stay whole"),
        (down_from_the_other_end, "the parts of the MLP add up to the whole"),
        (in_the_layer, "leave the layer as it is"),
        (in_single_precision, "a part has the dtype of the whole"),
        (lambda layer, rank, world_size: list(layer.values()), "a dict with the names of the layer"),
        (lambda layer, rank, world_size: dict(layer), "are cut by their outputs"),
    ],
)
def test_wrong_splits_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("14.1", function, rule)


def test_parts_in_the_engine_are_the_model() -> None:
    """The comparison in the engine can fail: with parts that do not add up, the tokens are others."""
    assert right_answers() == answers(serve(engine_of(split), JOBS))
    assert right_answers() != answers(serve(engine_of(down_from_the_other_end), JOBS))


# -- 14.2 ------------------------------------------------------------------------------------------


def most_seats(prompt_tokens: int, decoders: Any, page_size: int) -> Any:
    return max(range(len(decoders)), key=lambda i: decoders[i].free_seats)


def in_turn() -> Callable[..., Any]:
    turns = itertools.count()
    return lambda prompt_tokens, decoders, page_size: next(turns) % len(decoders)


def as_they_stand(prompt_tokens: int, decoders: Any, page_size: int) -> Any:
    return place(prompt_tokens, [decoder._replace(coming=()) for decoder in decoders], page_size)


def without_the_next(prompt_tokens: int, decoders: Any, page_size: int) -> Any:
    return place(prompt_tokens - 1, decoders, page_size)


def pops(prompt_tokens: int, decoders: Any, page_size: int) -> Any:
    index = place(prompt_tokens, decoders, page_size)
    decoders.pop()
    return index


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (most_seats, "where no engine has a seat and room for it, the prompt waits"),
        (in_turn(), "the prompt waits: None"),
        (as_they_stand, "each prompt that is on its way takes one of them"),
        (without_the_next, "there must be pages for the prompt and one more token"),
        (pops, "leave the list of engines as it is"),
        (lambda *_: None, "a prompt waits only if no engine"),
        (lambda *_: True, "return the index of an engine"),
        (lambda *_: 0.5, "return the index of an engine"),
        (lambda prompt, decoders, size: len(decoders), "return the index of an engine"),
    ],
)
def test_wrong_policies_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("14.2", function, rule)


def test_what_a_message_shows_is_the_smallest_case() -> None:
    text = judge("14.2", as_they_stand).text
    assert "engine 0: 1 free seats, 9 free pages, prompts of 6 coming, 3 keys" in text
    assert "yours: 0\n  right: 1" in text


decoders_of_any_kind = st.lists(
    st.builds(
        Decoder,
        st.integers(0, 4),
        st.integers(0, 40),
        st.lists(st.integers(1, 60), max_size=3).map(tuple),
        st.integers(0, 500),
    ),
    min_size=1,
    max_size=5,
)


@given(st.integers(1, 80), decoders_of_any_kind, st.sampled_from([1, 4, 16]))
@settings(deadline=None)
def test_the_reference_chooses_an_engine_of_those_that_are_right(
    prompt: int, decoders: list[Decoder], size: int
) -> None:
    right = e14_place._right(prompt, decoders, size)
    assert place(prompt, decoders, size) in (right or [None])


def test_a_right_place_costs_less_and_no_policy_changes_an_answer() -> None:
    fleets = [e14_place.serve_apart(policy) for policy in (place, e14_place.in_turn(), e14_place.most_pages)]
    yours, turn, most = fleets
    assert all(fleet.answers == e14_place.whole_answers() for fleet in fleets)
    assert yours.again < turn.again / 3 < most.again / 3 and yours.ticks < turn.ticks < most.ticks


# -- 14.3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", range(1, 9))
def test_a_ring_sends_what_the_group_counts(world_size: int) -> None:
    add = RingSum(ring)
    tensors = [torch.randn(world_size * 3, dtype=torch.float64) for _ in range(world_size)]
    for total in add(tensors):
        assert torch.allclose(total, torch.stack(tensors).sum(0))
    assert add.sent == 2 * (world_size - 1) * tensors[0].nbytes // world_size


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda rank, size: ring(rank, size)[: size - 1], "every process has every piece"),
        (lambda rank, size: [(a, b, True) for a, b, _ in ring(rank, size)], "numbers are in a piece twice"),
        (
            lambda rank, size: [(a, (a + 1) % size, c) for a, _, c in ring(rank, size)],
            "the one before it sends",
        ),
        (lambda rank, size: [*ring(rank, size), (0, 0, False)], "2 (p - 1) rounds are enough"),
        (lambda rank, size: ring(rank, size)[rank:], "equally many rounds"),
        (lambda rank, size: [(a + size, b, c) for a, b, c in ring(rank, size)], "numbered from 0"),
        (lambda rank, size: [(a, b) for a, b, _ in ring(rank, size)], "return a list of rounds"),
        (lambda rank, size: [(a, b, 1) for a, b, _ in ring(rank, size)], "return a list of rounds"),
        (lambda rank, size: None, "return a list of rounds"),
    ],
)
def test_wrong_rings_are_refused_for_what_is_wrong(function: Callable[..., Any], rule: str) -> None:
    assert_refused("14.3", function, rule)


# -- all three -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", REFERENCES)
def test_the_reference_and_the_folded_solution_are_right(exercise: str) -> None:
    said = {
        "14.1": "the same 46 tokens",
        "14.2": "40 prompts were placed",
        "14.3": "each process sent 94,208 bytes",
    }
    verdict = assert_accepted(exercise, REFERENCES[exercise])
    assert said[exercise] in verdict.text and len(verdict.pictures) == 1
    assert_accepted(exercise, function_from(solution("14", exercise), NAMES[exercise]))


@pytest.mark.parametrize("exercise", REFERENCES)
def test_an_untouched_stub_is_open(exercise: str) -> None:
    def stub(*arguments: Any) -> Any:
        raise NotImplementedError

    assert_open(exercise, stub)


# -- the runs of the notebook ----------------------------------------------------------------------

CONFIG = EngineConfig("tiny-random", device="cpu", num_blocks=64, tensor_parallel_size=2)


def test_processes_end_with_their_run_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    with e14.together(CONFIG) as engine:
        process = psutil.Process(engine.model.module.workers.processes[0].pid)
        assert process.is_running()
    assert not process.is_running() and torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError), e14.together(CONFIG) as engine:
        process = psutil.Process(engine.model.module.workers.processes[0].pid)
        _ = 1 // 0
    assert not process.is_running()


def test_the_process_of_prompts_ends_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr(e14, "NEWCOMERS", (40, 50))
    monkeypatch.setattr(e14, "_TOKENS", 40)
    with e14.apart(e14.settings("tiny-random")) as engine:
        (process,) = [child for child in psutil.Process().children() if child.pid not in before]
        one = e14.visit(engine)
    engine.close()  # again
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    whole = e14.visit(Engine(e14.settings(tiny_model()), say=None))
    assert one.tokens == whole.tokens and len(one.gaps) == len(whole.gaps) == 4 * 39
    assert whole.cached == [0, 0] and [known >= 32 for known in one.cached] == [True, True]
    assert max(whole.beside) >= 40 > max(one.beside)
    assert engine.has_unfinished is False


@pytest.mark.usefixtures("in_threads")
def test_a_forgotten_sum_changes_tokens_and_is_there_again_afterwards() -> None:
    with e14.together(replace(CONFIG, enable_prefix_caching=False)) as engine:
        before = e14.answer(engine, PROMPTS, 12)
        with e14.forgetting(engine.model, [0]):
            lost = e14.answer(engine, PROMPTS, 12)
        after = e14.answer(engine, PROMPTS, 12)
    assert [one.token_ids for one in before] == [one.token_ids for one in after]
    common = [e14.agree(one, other) for one, other in zip(before, lost, strict=True)]
    assert min(common) < 12 and [e14.agree(one, one) for one in before] == [12] * 3
