"""Pools of tens of thousands of pages in a real browser: not drawn page by page, and nothing is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from labkit.trace.records import TraceMeta
from labkit.views import style
from labkit.views.assets import asset, script
from labkit.views.live_feed import Feed, pack_bits

pytest_plugins = ["tests.visiting_fixtures"]

# Both ways to know who owns what: brought up to date step by step, and from the last step alone.
BOTH = """
(story) => {
  const state = labkit.createState(), fresh = labkit.createState();
  const kinds = { free: 0, cached: 0, owned: 0, shared: 0 };
  const known = ({ owners }) => Object.fromEntries([...owners].map(([block, list]) =>
    [block, list.map(({ request, position, filled }) => `${request} ${position} ${filled}`).sort()]));
  for (const pictures of story) {
    labkit.apply(state, pictures);
    labkit.apply(fresh, { ...story[0], ...pictures, full: true });
    const [mine, theirs] = [known(state), known(fresh)];
    if (JSON.stringify(mine) !== JSON.stringify(theirs)) return [mine, theirs, `step ${pictures.step}`];
  }
  for (let block = 0; block < state.meta.num_blocks; block++) kinds[labkit.blockKind(state, block)] += 1;
  return [labkit.kinds(state), kinds, labkit.summary(state)];
}
"""
# Draws the pool 900 wide, and counts what is drawn. `at` says where the pointer is.
DRAW = """
([pictures, at, plan]) => {
  const state = labkit.createState(), canvas = document.querySelector("canvas");
  const drawn = { rects: 0, frames: 0 };
  labkit.apply(state, pictures);
  if (plan) labkit.lookAhead(state, 1, plan);
  canvas.style.height = `${labkit.blocksHeight(state, 900, 280)}px`;
  const { ctx, width, height } = labkit.context(canvas), theme = labkit.themeOf(canvas, state);
  const block = at && labkit.blockAt(state, width, height, ...at);
  state.hover = { block };
  const { fillRect, strokeRect } = ctx;
  ctx.fillRect = (x, y, w, h) => { drawn.rects += 1; fillRect.call(ctx, x, y, w, h); };
  ctx.strokeRect = (...all) => { drawn.frames += 1; strokeRect.call(ctx, ...all); };
  labkit.drawBlocks(ctx, state, theme, width, height);
  const per = labkit.perCell(state);
  const words = block == null ? [] : labkit.regionWords(state, block, per);
  return { ...drawn, per, block, words, height, square: labkit.squareWords(state) };
}
"""


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Any]]:
    page = browser.new_page(viewport={"width": 960, "height": 400})
    styles = f"<style>{asset('live_feed.css')} canvas {{ width: 900px; display: block; }}</style>"
    page.set_content(f"{styles}<div class='lk'><canvas></canvas></div>")
    page.add_script_tag(
        content=script("live_feed.js", "regions.js", "two_pools.js", "words.js") + "window.labkit = labkit;"
    )
    yield lambda code, argument: page.evaluate(code, json.loads(json.dumps(argument)))
    page.close()


def pictures(num_blocks: int, tables: list[list[Any]], cached: set[int], step: int = 0) -> dict[str, Any]:
    """What a browser is sent for this pool, in full for step 0."""
    feed = Feed(TraceMeta(num_blocks, 4, 32, 512)).pictures()
    lanes = [[name, name, i % len(style.PALETTE), 0, 5, -1, "", []] for i, (name, _, _) in enumerate(tables)]
    used = len({block for _, _, blocks in tables for block in blocks})
    feed |= {"step": step, "tables": [[*table[:2], list(table[2])] for table in tables], "lanes": lanes}
    feed |= {
        "steps": [[step, 0.02, 1, 1, used, len(tables), 0, None, 0]],
        "events": [],
        "queue": [],
        "held": [],
    }
    feed |= {"cached": pack_bits(cached, num_blocks), "numbers": {}, "full": step == 0}
    return feed


@pytest.mark.parametrize("seed", range(3))
def test_owners_brought_up_to_date_are_those_of_a_fresh_look(look: Callable[..., Any], seed: int) -> None:
    """Requests come, grow, share, copy on write, give drafts back, are preempted, come back and end."""
    rng, blocks, story = random.Random(seed), 300, []
    tables: list[list[Any]] = []
    for step in range(150):
        owned = {block for _, _, table in tables for block in table}
        free = [block for block in range(blocks) if block not in owned]
        rng.shuffle(free)
        kind = rng.choice(["new", "grow", "grow", "grow", "share", "copy", "return", "end", "again"])
        some = rng.choice(tables) if tables else None
        if kind == "new" or some is None:
            size = rng.randrange(1, 9)
            tables.append([f"r{step}", rng.randrange(4 * size + 1), [free.pop() for _ in range(size)]])
        elif kind == "grow":
            some[2] += [free.pop() for _ in range(rng.randrange(3))]
            some[1] = min(4 * len(some[2]), some[1] + rng.randrange(9))
        elif kind == "share":
            shared = some[2][: rng.randrange(1, 4)]
            tables.append([f"r{step}", 4 * len(shared), [*shared, free.pop()]])
        elif kind == "copy":
            some[2][-1] = free.pop()
        elif kind == "return":
            del some[2][max(1, len(some[2]) - 2) :]
            some[1] = min(some[1], 4 * len(some[2]))
        elif kind == "end":
            tables.remove(some)
        else:  # preempted, and admitted again within what one update tells
            some[1], some[2] = 3, [free.pop() for _ in range(2)]
            rng.shuffle(tables)
        story.append(pictures(blocks, tables, set(rng.sample(range(blocks), 90)), step))
    counted, kinds, summary = look(BOTH, story)
    assert counted == kinds, summary
    assert sum(kinds.values()) == blocks and kinds["cached"] and kinds["owned"]
    assert f"{kinds['owned'] + kinds['shared']} of {blocks} pages in use" in summary


@pytest.mark.parametrize("num_blocks", [300, 4096, 4097, 16_000, 57_000])
def test_a_picture_has_at_most_some_thousand_cells(look: Callable[..., Any], num_blocks: int) -> None:
    half = num_blocks // 2
    tables = [["a", 4 * half, list(range(0, half))], ["b", 8, [half, half + 1]]]
    seen = look(DRAW, [pictures(num_blocks, tables, set(range(half + 2, half + 40))), [60, 3], None])
    assert seen["per"] == {300: 1, 4096: 1, 4097: 2, 16_000: 4, 57_000: 16}[num_blocks]
    assert seen["rects"] < 13_000 and seen["frames"] >= 1
    assert 100 < seen["height"] <= 284 or num_blocks == 300
    assert seen["square"].startswith(
        f"Each square is {seen['per']} pages" if seen["per"] > 1 else "Each square is a page."
    )
    if seen["per"] > 1:
        first = seen["block"]
        assert seen["words"] == [f"Pages {first} to {first + seen['per'] - 1}", f"{seen['per']} in use",
                                 f"request a has {seen['per']}"]  # fmt: skip


def test_a_region_says_what_is_in_it_and_stands_for_one_of_its_pages(look: Callable[..., Any]) -> None:
    tables = [["a", 4, [5]], ["b", 8, [5, 6, 40]]]  # of 16,000 pages, four in a cell
    sent = pictures(16_000, tables, {5, 7, 9})
    seen = look(DRAW, [sent, [46 + 1.5 * look(DRAW, [sent, None, None])["height"] / 30, 3], None])
    assert seen["block"] in (5, 9, 0), "the owned, the cached, or the first"
    known = {
        5: ["Pages 4 to 7", "2 in use, 1 only cached, 1 free", "request a has 1", "request b has 2"],
        9: ["Pages 8 to 11", "1 only cached, 3 free"],
        0: ["Pages 0 to 3", "4 free"],
    }
    assert seen["words"] == known[seen["block"]]


def test_what_the_next_step_takes_is_framed_in_its_region(look: Callable[..., Any]) -> None:
    row = ["a", "a", 0, "d", 4, 1, [2, 3, 9000]]
    plan = {"step": 1, "rows": [row], "shared": [], "admitted": [], "preempted": [], "ended": [], "queue": []}
    sent = pictures(57_000, [["a", 4, [1]]], set())
    before, after = (look(DRAW, [sent, None, coming])["frames"] for coming in (None, plan))
    assert after - before == 2, "one cell for pages 2 and 3, and one for page 9000"
