"""The block heatmap shows who owns each block, and how full it is: figure and text twin against the trace."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import views
from labkit.trace.records import Admission, Arrival, Blocks
from labkit.trace.trace import Trace
from labkit.views import style, text
from tests.views.reading import cells, named
from tests.views.stories import record, run, story, trace_of, traces


@settings(max_examples=25, deadline=None)
@given(traces(), st.integers(0, 10**6))
def test_heatmap_colours_each_owned_block_and_fills_it_as_far_as_it_is_full(trace: Trace, pick: int) -> None:
    step = trace[pick % len(trace)].step
    state = trace.state(step)
    drawn = cells(figure := views.block_heatmap(trace, step))
    assert len(drawn) == trace.meta.num_blocks
    for block, (shade, facts) in enumerate(drawn):
        owners = state.owners.get(block, ())
        first_words = "free" if block not in state.cached else "cached and free"
        kind = first_words if not owners else "owned" if len(owners) == 1 else "shared"
        assert facts.startswith(f"<b>block {block}</b>: {kind}")
        assert (shade >= 2) == bool(owners)
        for owner in owners:
            assert f"request {owner}, entry {state.tables[owner].index(block)} of its block table" in facts
        if owners:
            assert f"tokens fill {state.filled[block]} of 4 slots" in facts
    kinds = Counter(facts.split(": ")[1].split("<")[0] for _, facts in drawn)
    title = figure.layout.title.text
    assert (
        f"{kinds['shared']} shared, {kinds['cached and free']} cached and free, {kinds['free']} free" in title
    )
    assert f"{len(state.owners)} of {len(drawn)} blocks owned" in title
    if state.owners:
        tokens = sum(state.filled[block] for block in state.owners)
        assert f"tokens fill {tokens} of {4 * len(state.owners)} owned slots" in title
    filled = named(figure, "filled")
    columns = len(named(figure, "blocks").z[0])
    expected = Counter(b for b, owners in state.owners.items() for _ in owners if state.filled[b])
    assert Counter(filled.customdata) == expected
    for block, left, length in zip(filled.customdata, filled.base, filled.x, strict=True):
        cell_width = 2 * (block % columns - left)
        assert length / cell_width == pytest.approx(state.filled[block] / 4, abs=1e-3)


def test_shared_blocks_are_outlined_and_striped() -> None:
    figure = views.block_heatmap(story(), 4)
    outline, filled = named(figure, "shared"), named(figure, "filled")
    assert (list(outline.y), outline.marker.line.color) == ([0], style.SHARED)
    stripes = [i for i, block in enumerate(filled.customdata) if block == 0]
    assert len({filled.marker.color[i] for i in stripes}) == len({filled.y[i] for i in stripes}) == 2
    assert sum(filled.width[i] for i in stripes) == pytest.approx(outline.width, abs=1e-3)
    assert "* 1 block (0) of AB" in text.block_heatmap(story(), 4)


def test_cached_and_free_blocks_have_a_pattern() -> None:
    figure = views.block_heatmap(story(), 5)  # b is preempted: page 2 is free; a still holds 0 and 1
    assert named(figure, "cached").y == ()
    finished = trace_of(*story().records, record(7, free_blocks=8))
    cached = named(views.block_heatmap(finished), "cached")
    assert (list(cached.y), cached.marker.pattern.shape) == ([0], "/")
    assert text.block_heatmap(finished).splitlines()[3] == "block 0  ~█" + " .." * 7


def test_what_the_step_gives_back_is_told() -> None:
    for record_ in story():
        figure = views.block_heatmap(story(), record_.step)
        owned = sum(shade >= 2 for shade, _ in cells(figure))
        given_back = re.search(r"gives back (\d+)", figure.layout.title.text)
        assert owned - int(given_back[1] if given_back else 0) == 8 - record_.free_blocks


@pytest.mark.parametrize(("requests", "more"), [(12, []), (13, ["and 2 more: point at a block"])])
def test_the_heatmap_names_as_many_owners_as_fit(requests: int, more: list[str]) -> None:
    jobs = [(0, name, 4, 2) for name in "abcdefghijklm"[:requests]]
    trace = run(jobs, seats=requests, num_blocks=64, budget=64)
    legend = [part.name for part in views.block_heatmap(trace, 0).data if part.showlegend]
    owners = [f"{name}: 1 block, 4 tokens" for name in "abcdefghijkl"[: 12 - len(more)]]
    assert legend == [*owners, *more, "free"]


@pytest.mark.parametrize("num_blocks", [1, 4, 16, 17, 700, 4096, 10_000])
def test_pools_of_any_size(num_blocks: int) -> None:
    owned = tuple(range(0, num_blocks, 3))
    step = record(
        0, [("a", "p", 0, len(owned) * 4 - 1, (1,))], arrived=(Arrival("a", 9, 9),),
        admitted=(Admission("a"),), taken=(Blocks("a", owned),), free_blocks=num_blocks - len(owned),
    )  # fmt: skip
    trace = trace_of(step, num_blocks=num_blocks)
    drawn = cells(views.block_heatmap(trace))
    assert [block for block, (shade, _) in enumerate(drawn) if shade >= 2] == list(owned)
    said = text.block_heatmap(trace)
    assert f"{len(owned)} of {num_blocks} block" in said
    assert max(map(len, said.splitlines())) <= text.COLUMNS and len(said.splitlines()) < 80
    if num_blocks == 10_000:
        assert "each character = 3 blocks" in said
