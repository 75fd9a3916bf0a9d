"""Tabs, the visitors behind them, and when a visitor is gone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from labkit.page import visitors as visitors_module
from labkit.page.visitors import MAX_NAME, Visitors

PATIENCE = 30  # seconds until a test gives up; nothing is decided by it


class Watched(Visitors):
    def __init__(self, grace: float, unheard: float = 3600) -> None:
        self.left: list[str] = []
        self.lines = contextlib.ExitStack()  # of all pages that were opened
        super().__init__(self.left.append, grace=grace, unheard=unheard)

    def come(self, tab: str, known_as: str = "") -> str:
        """A page is opened: it has a line, and arrives."""
        self.lines.enter_context(self.line(tab))
        return self.arrive(tab, known_as)

    def until_gone(self, *visitors: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while set(self.left) != set(visitors):
            assert time.monotonic() < deadline and set(self.left) <= set(visitors)
            time.sleep(0.01)


@pytest.fixture
def visitors() -> Iterator[Watched]:
    visitors = Watched(grace=0.05)
    yield visitors
    visitors.lines.close()
    visitors.close()


def test_a_visitor_who_closes_the_page_is_gone_after_a_while(visitors: Watched) -> None:
    me, you = visitors.come("tab 1"), visitors.come("tab 2")
    assert me != you and len(visitors) == 2 and visitors.of("tab 1") == me and me in visitors
    visitors.grace = 0.05
    visitors.leave("tab 1")
    assert len(visitors) == 1
    visitors.until_gone(me)
    assert me not in visitors and you in visitors
    assert visitors.arrive("tab 3", me) != me, "given up: a visitor who comes back is new"


def test_a_page_is_closed_with_its_line(visitors: Watched) -> None:
    with visitors.line("tab"):
        me = visitors.arrive("tab")
        with visitors.line("tab"):
            pass  # one of two lines of the tab: it opened another before the first one ended
        assert len(visitors) == 1
    visitors.until_gone(me)
    assert not visitors._lines


def test_a_line_may_come_before_or_after_the_arrival(visitors: Watched) -> None:
    me = visitors.arrive("late")
    assert me not in visitors
    with visitors.line("late"), visitors.line("early"):
        you = visitors.arrive("early")
        assert me in visitors and you in visitors and len(visitors) == 2 and not visitors._ends


def test_who_arrives_and_is_never_heard_from_counts_for_nothing_and_is_forgotten() -> None:
    visitors = Watched(grace=3600, unheard=0.3)
    me = visitors.come("a page")
    forged = {visitors.arrive(f"forged {i}") for i in range(30)}
    assert len(visitors) == 1 and not any(secret in visitors for secret in forged)
    assert {visitors.of(f"forged {i}", "1.2.3.4") for i in range(30)} == {"@1.2.3.4"}
    visitors.until_gone(*forged)
    assert visitors._tabs.keys() == {me} and visitors._visitor_of.keys() == {"a page"}


def test_a_page_without_a_line_is_here_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors_module, "ASKING", 3600)
    visitors = Watched(grace=3600)
    me = visitors.arrive("mounted elsewhere")
    assert me not in visitors and visitors.num_asking == 0
    visitors.hear(me)
    assert me in visitors and visitors.num_asking == len(visitors) == 1
    monkeypatch.setattr(visitors_module, "SILENCE", 0.05)
    visitors.hear(me)
    visitors.until_gone(me)
    visitors.hear(me)
    visitors.hear("made up")
    assert len(visitors) == visitors.num_asking == 0 and not visitors._heard


def test_one_tab_is_one_visitor(visitors: Watched) -> None:
    """A line can be had for one tab, and the tab can arrive again and again."""
    visitors.grace = 3600
    secrets = [visitors.come("tab"), *(visitors.arrive("tab") for _ in range(9))]
    visitors.until_gone(*secrets[:-1])
    assert [secret in visitors for secret in secrets] == [False] * 9 + [True]


def test_a_second_tab_without_a_line_keeps_nobody_here(
    visitors: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors_module, "SILENCE", 0.05)
    visitors.unheard = 0.05
    with visitors.line("first"):
        me = visitors.arrive("first")
        assert visitors.arrive("second", me) == me and not visitors._ends
    visitors.until_gone(me)
    assert not visitors._visitor_of


def test_a_reload_is_no_farewell(visitors: Watched) -> None:
    visitors.grace = 3600
    me = visitors.come("before")
    visitors.leave("before")
    assert me in visitors and visitors.come("after", me) == me
    visitors.leave("before")
    visitors.leave("nobody")
    assert visitors.left == [] and not visitors._ends and len(visitors) == 1


def test_the_new_page_may_come_before_the_old_one_has_gone(visitors: Watched) -> None:
    me = visitors.come("before")
    assert visitors.come("after", me) == me
    visitors.leave("before")
    assert not visitors._ends and visitors.of("after") == me


def test_a_secret_that_nobody_was_told_is_no_way_in(visitors: Watched) -> None:
    me = visitors.come("tab 1")
    assert visitors.come("tab 2", "made up") not in (me, "made up")
    assert visitors.of(None) == "@" and visitors.of("a client without a page", "::1") == "@::1"
    assert "@::1" not in visitors and visitors.arrive("tab 3", "@::1") != "@::1"


def test_names_are_short_plain_text(visitors: Watched) -> None:
    me = visitors.come("tab")
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
        visitors.rename(visitors.come(str(i)), f"name {i}")
    before = threading.active_count()
    visitors.lines.close()
    assert threading.active_count() <= before + 1, "one timer is enough for all"
    deadline = time.monotonic() + PATIENCE
    while len(visitors.left) < 50:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (visitors._names or visitors._tabs or visitors._visitor_of or visitors._ends)
    assert not (visitors._lines or visitors._heard)
