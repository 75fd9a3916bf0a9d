"""Sliders that ask "what if", without a notebook."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ipywidgets
import pytest

from labkit import notebook
from labkit.notebook import live_view
from labkit.notebook.live_view import what_if
from tests.notebook.threads import from_another_thread

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def drawn(pages: int) -> notebook.Picture:
    return notebook.bars({"pages": pages, "more": 2 * pages}, f"{pages} pages")


def test_what_if_without_a_page_is_the_first_result() -> None:
    shown = what_if(drawn, pages=(3, 9))
    assert repr(shown) == repr(drawn(3))
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == repr(drawn(3)) and WIDGET_VIEW not in bundle
    assert bundle["application/vnd.plotly.v1+json"]["layout"]["title"]["text"].startswith("3 pages")
    assert repr(what_if(lambda words: f"so {words}", words=["one", "two"])) == "so one"
    assert repr(what_if(lambda words: print("printed", words), words=["one", "two"])) == "printed one"


def test_what_if_begins_with_the_defaults() -> None:
    def told(seats: int = 4, share: float = 0.5, kind: str = "b", far: int = 99) -> str:
        return f"{seats} {share} {kind} {far}"

    shown = what_if(told, seats=(1, 8), share=(0.0, 1.0), kind=["a", "b"], far=(0, 10, 5))
    assert repr(shown) == "4 0.5 b 0"


@pytest.mark.parametrize(
    "choices", [(), (1,), (1, 2, 3, 4), ("a", "b"), (True, False), [], "ab", 5, (3, 3), (5, 1), (1, 5, 0)]
)
def test_what_if_ranges_that_are_none(choices: Any) -> None:
    with pytest.raises(ValueError, match=r"pages must (be a tuple|go up)"):
        what_if(drawn, pages=choices)


def test_sliders_and_lists(kernel: None) -> None:
    shown = what_if(
        lambda seats, share, kind: f"{seats} {share} {kind}",
        seats=(2, 8, 2),
        share=(0.0, 1.0, 0.25),
        kind=["a", "b"],
    )
    assert shown._repr_mimebundle_()["text/plain"] == "2 0.0 a"
    seats, share, kind = shown._controls.values()
    assert isinstance(seats, ipywidgets.IntSlider) and (seats.min, seats.max, seats.step) == (2, 8, 2)
    assert isinstance(share, ipywidgets.FloatSlider) and isinstance(kind, ipywidgets.Dropdown)
    assert not seats.continuous_update and not share.continuous_update
    assert [control.description for control in (seats, share, kind)] == ["seats", "share", "kind"]
    kind.value = "b"
    assert shown._below.outputs[0]["text"] == "2 0.0 b"


def test_a_slider_that_is_let_go_calls_the_function_once(kernel: None) -> None:
    calls: list[int] = []

    def counted(pages: int) -> notebook.Picture:
        calls.append(pages)
        print("counting", pages)
        return drawn(pages)

    shown = what_if(counted, pages=(3, 9))
    assert shown.widget and calls == [3]
    slider = shown._controls["pages"]
    slider.value = 5
    slider.value = 5
    assert calls == [3, 5]
    words, picture = shown._below.outputs
    assert words["text"] == "counting 5\n"
    assert picture["data"]["text/plain"] == repr(drawn(5))
    json.dumps(shown._below.outputs)
    assert shown._below.layout.min_height.endswith("px")


def test_what_changes_while_a_cell_runs_is_answered_with_one_call(kernel: None) -> None:
    async def cell() -> None:
        calls: list[tuple[int, int]] = []
        shown = what_if(lambda a, b: calls.append((a, b)), a=(1, 9), b=(1, 9))
        assert shown.widget

        def others() -> None:
            for value in (2, 3, 4):
                shown._controls["a"].value = shown._controls["b"].value = value

        from_another_thread(others)
        assert calls == [(1, 1)]
        await asyncio.sleep(0)
        assert calls == [(1, 1), (4, 4)]

    asyncio.run(cell())


def test_a_function_that_fails_says_so_beneath_its_slider(kernel: None) -> None:
    def fails(pages: int) -> str:
        if pages == 5:
            raise RuntimeError("five is one too many")
        return "fine"

    shown = what_if(fails, pages=(3, 9))
    assert shown.widget
    shown._controls["pages"].value = 5
    (error,) = shown._below.outputs
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "five is one too many")
    assert "in fails" in error["traceback"][1]
    assert not any("labkit/notebook/live_view.py" in line for line in error["traceback"])
    shown._controls["pages"].value = 6
    assert shown._below.outputs[0]["text"] == "fine"


def test_colab_gets_html_that_waits_for_plotly(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(live_view, "in_colab", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda thing, raw=False: shown.append(thing))
    monkeypatch.setattr("IPython.display.clear_output", lambda wait: shown.append("clear"))
    view = what_if(lambda n: notebook.bars({"</script><b>": n}, "A title"), n=(1, 3))
    view._ipython_display_()
    assert shown[0] is view.widget and shown[1] == "clear"
    html = shown[2]["text/html"]
    assert "https://cdn.plot.ly/plotly-" in html and html.count("</script") == 1
    view._controls["n"].value = 2
    assert [thing if isinstance(thing, str) else list(thing) for thing in shown[3:]] == [
        "clear",
        ["text/html", "text/plain"],
    ]
    assert shown[4]["text/html"] != html  # a place of its own
