"""The page of an engine whose prompts another process computes: two pools, and pages that travel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import app
from labkit.disaggregated import DisaggregatedEngine
from labkit.page.session import Lab
from labkit.serving import cli
from tests.visiting import Visitor, free_port
from tests.visiting_fixtures import browser  # noqa: F401
from tests.waiting import wait_for

# What a visitor sees of the other engine, kept from the first picture on.
WATCH = """() => {
  window.flown = 0; window.said = new Set();
  new MutationObserver((changes) => {
    const added = changes.flatMap(({ addedNodes }) => [...addedNodes]);
    flown += added.filter(({ className }) => className === "lk-flying").length;
  }).observe(document.body, { childList: true });
  const look = () => {
    for (const status of document.querySelectorAll(".lk-card .lk-status")) said.add(status.textContent);
    requestAnimationFrame(look);
  };
  look();
}"""


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Lab, str]]:
    options = app.parse(["--model", "tiny-random", "--disaggregated", "--num-blocks", "256"])
    with cli.load(options, trace_steps=1000) as live:
        lab = app.lab_of(live, options)
        port = free_port()
        demo = app.launch(lab, share=False, server_port=port, quiet=True)
        yield lab, f"http://127.0.0.1:{port}"
        demo.close(verbose=False)
        lab.close()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_pages_travel_from_one_pool_to_the_other(
    house: tuple[Lab, str],
    browser: Any,  # noqa: F811
    motion: str,
) -> None:
    lab, address = house
    me = Visitor(browser.new_context(reduced_motion=motion, viewport={"width": 1400, "height": 900}), address)
    me.page.wait_for_selector(".lk-facts:has-text('256 pages')")
    me.page.evaluate(WATCH)
    lab.play("me", "apart", running="cancel", anew=True)
    live = lab.session.live
    live.speed = 20
    me.until("lab.state.carried.length")  # pages that have just come are marked
    wait_for(lambda: lab.session.submissions._serial == 8 and not live.num_unfinished)
    assert isinstance(live.engine, DisaggregatedEngine)
    me.page.wait_for_selector(".lk-apart canvas[data-picture=far]")
    me.page.wait_for_function("document.querySelectorAll('.lk-card[data-status=length]').length === 8")
    assert me.page.inner_text(".lk-summary").count("Prefill engine: 0 there, 0 of 256 pages in use") == 1
    assert "prefilling" in me.page.evaluate("[...said]")
    assert bool(me.page.evaluate("flown")) == (motion == "no-preference")
    first, second = (
        me.page.locator(f"canvas[data-picture={name}]").bounding_box() for name in ("far", "pages")
    )
    assert first["x"] + first["width"] <= second["x"] and first["y"] == second["y"]
    assert me.problems == []
    me.context.close()


def test_another_engine_is_of_the_same_kind(house: tuple[Lab, str]) -> None:
    lab, _ = house
    assert lab.change({"num_blocks": 128}, running="cancel") == {"done": True}
    assert isinstance(lab.session.live.engine, DisaggregatedEngine)
    assert lab.settings["num_blocks"] == 128
    with pytest.raises(ValueError, match="scheduler must be 'continuous'"):
        lab.change({"scheduler": "static"}, running="cancel")
    assert isinstance(lab.session.live.engine, DisaggregatedEngine) and not lab.session.live.failure


def test_other_labs_do_not_offer_it(own: Lab) -> None:
    assert "apart" not in own.scenarios
    with pytest.raises(ValueError, match="There is no preset 'apart'"):
        own.play("me", "apart")
