"""Tabs, the visitors behind them, and when a visitor is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from labkit.page.visitors import MAX_NAME, Visitors, mark

PATIENCE = 30  # seconds until a test gives up; nothing is decided by it


class Watched(Visitors):
    def __init__(self, grace: float) -> None:
        self.left: list[str] = []
        self.gone = threading.Event()
        super().__init__(self._note, grace=grace)

    def _note(self, visitor: str) -> None:
        self.left.append(visitor)
        self.gone.set()


@pytest.fixture
def visitors() -> Iterator[Watched]:
    visitors = Watched(grace=0.05)
    yield visitors
    visitors.close()


def test_a_visitor_who_closes_the_page_is_gone_after_a_while(visitors: Watched) -> None:
    me, you = visitors.arrive("tab 1"), visitors.arrive("tab 2")
    assert me != you and len(visitors) == 2 and visitors.of("tab 1") == me and me in visitors
    visitors.leave("tab 1")
    assert visitors.left == [] and me in visitors and len(visitors) == 1
    assert visitors.gone.wait(PATIENCE)
    assert visitors.left == [me] and me not in visitors and you in visitors
    assert not visitors.has("tab 1") and visitors.has("tab 2")
    assert visitors.arrive("tab 1", me) == me and visitors.of("tab 1") == me, "back after a gap"


def test_a_reload_is_no_farewell(visitors: Watched) -> None:
    visitors.grace = 3600
    me = visitors.arrive("before")
    visitors.leave("before")
    assert visitors.arrive("after", me) == me
    visitors.leave("before")
    visitors.leave("nobody")
    assert visitors.left == [] and not visitors._timers and len(visitors) == 1


def test_a_tab_may_arrive_again_and_again(visitors: Watched) -> None:
    visitors.grace = 3600
    me = visitors.arrive("tab")
    assert [visitors.arrive("tab", me) for _ in range(3)] == [me] * 3 and len(visitors) == 1
    you = visitors.arrive("tab")  # it has lost its secret
    assert you != me and visitors.of("tab") == you and len(visitors) == 1
    visitors.leave("tab")
    assert len(visitors) == 0 and visitors._timers.keys() == {me, you}


def test_the_new_page_may_come_before_the_old_one_has_gone(visitors: Watched) -> None:
    me = visitors.arrive("before")
    assert visitors.arrive("after", me) == me
    visitors.leave("before")
    time.sleep(0.1)
    assert visitors.left == [] and visitors.of("after") == me


def test_a_secret_that_nobody_was_told_is_no_way_in(visitors: Watched) -> None:
    me = visitors.arrive("tab 1")
    for made_up in ("made up", me[:-1] + "?", "x" + me[1:], me[:-16] + "é" * 16, "\ud800" * 32, mark(me)):
        assert visitors.arrive(f"tab of {made_up!r}", made_up) not in (me, made_up)
    assert visitors.of(None) == "" and visitors.of("a client without a page") == "a client without a page"


def test_names_are_short_plain_text(visitors: Watched) -> None:
    me = visitors.arrive("tab")
    for typed, shown in (
        ("  Ada  ", "Ada"),
        ("A\nB\x00\u202ec", "ABc"),
        ("x" * 1000, "x" * MAX_NAME),
        ("", ""),
    ):
        assert visitors.rename(me, typed) == shown == visitors.name(me)
    visitors.rename("nobody", "Eve")
    assert visitors.name("nobody") == "" and visitors._names.keys() == {me}


def test_what_is_kept_of_visitors_is_dropped_when_they_are_gone(visitors: Watched) -> None:
    for i in range(50):
        visitors.rename(visitors.arrive(str(i)), f"name {i}")
    for i in range(50):
        visitors.leave(str(i))
    deadline = time.monotonic() + PATIENCE
    while len(visitors.left) < 50:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (visitors._names or visitors._tabs or visitors._visitor_of or visitors._timers)
