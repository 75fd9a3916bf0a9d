"""The host of a lab: what the key opens, what it locks, and what everybody sees of it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator

import pytest

from labkit.config import EngineConfig
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.hosting import LOCKS, Hosting, closed_reason
from labkit.page.session import Lab
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from labkit.trace.trace import Trace
from tests.visiting import Visitor
from tests.waiting import wait_for

pytest_plugins = ["tests.visiting_fixtures"]

FOUR = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def class_(model: LoadedModel) -> Iterator[Lab]:
    """A lab whose visitors may do nothing but inject and race."""
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=96))) as live:
        lab = Lab(live, knobs=False, clock=False, grace=3600)
        yield lab
        lab.close()


def arrive(lab: Lab, tab: str, name: str = "") -> str:
    visitor = lab.visitors.arrive(tab)
    lab.visitors.hear(visitor)
    lab.visitors.rename(visitor, name)
    return visitor


def test_only_the_key_makes_a_host(class_: Lab) -> None:
    hosting = Hosting(class_)
    ada, bob = arrive(class_, "1", "Ada"), arrive(class_, "2", "Bob")
    for key in ("", "é", class_.host_key[:-1], ada):
        assert not hosting.claim(bob, key)
    assert not hosting.claim("a stranger", class_.host_key)
    assert hosting.claim(ada, class_.host_key) and class_.hosts == {ada}
    for action in ("look", "lock", "end", "reset", "export"):
        with pytest.raises(ValueError, match="Only the host"):
            hosting.act(bob, action, "clock")
    assert class_.host_key not in json.dumps([class_.status(), hosting.act(ada, "look")])


def test_locks_bind_visitors_and_not_the_host(class_: Lab) -> None:
    hosting = Hosting(class_)
    ada, bob = arrive(class_, "1", "Ada"), arrive(class_, "2", "Bob")
    hosting.claim(ada, class_.host_key)
    assert hosting.act(ada, "look")["locked"] == ["clock", "knobs"]
    for _ in range(2):
        with pytest.raises(ValueError, match="clock of this lab is its host's"):
            class_.control(bob, "pause")
        with pytest.raises(ValueError, match="settings of this lab are its host's"):
            class_.change({"max_num_seqs": 2}, visitor=bob)
        assert class_.control(ada, "pause")["by"] == "Ada"
        class_.control(ada, "resume")
        assert class_.change({"max_num_seqs": 3}, visitor=ada) == {"done": True}
        for name in ("clock", "knobs"):
            hosting.act(ada, "unlock", name)
        assert class_.control(bob, "pause") == class_.session.submissions.clock()
        assert class_.control(bob, "resume")["by"] == ""
        assert class_.change({"max_num_seqs": 2}, visitor=bob) == {"done": True}
        for name in LOCKS:
            hosting.act(ada, "lock", name)
    assert closed_reason(class_)() == "The host of this lab has locked races."
    assert hosting.act(ada, "unlock", "races")["locked"] == ["clock", "knobs"] and not closed_reason(class_)()
    with pytest.raises(ValueError, match="locks are clock, knobs, races"):
        hosting.act(ada, "lock", "doors")
    assert hosting.act(ada, "reset") and class_.settings == class_.base


def test_who_is_here_and_the_end_of_all(class_: Lab) -> None:
    hosting, live = Hosting(class_), class_.session.live
    ada, bob = arrive(class_, "1", "Ada"), arrive(class_, "2")
    hosting.claim(ada, class_.host_key)
    live.pause()
    for visitor in (ada, bob, bob, ""):  # the last one is the API's
        class_.session.submissions.inject(visitor, "hello", FOUR)
    class_.play("somebody", "long")
    assert hosting.act(ada, "look")["here"] == [["somebody", 2], ["Ada", 1]]
    hosting.act(ada, "end")
    wait_for(lambda: not live.num_unfinished)
    assert {card.finish_reason for card in class_.session.now().cards} == {"abort"}
    assert not class_.session.player._pending
    class_._gone(ada)
    assert not class_.hosts


def test_the_session_is_one_file_that_can_be_replayed(class_: Lab) -> None:
    hosting, live = Hosting(class_), class_.session.live
    ada = arrive(class_, "1", "Ada")
    hosting.claim(ada, class_.host_key)
    class_.session.submissions.inject(ada, "hëllo", FOUR, name="Ada")
    wait_for(lambda: not live.busy)
    file = hosting.act(ada, "export")["file"]
    with zipfile.ZipFile(io.BytesIO(bytes.fromhex(file))) as archive:
        trace = Trace.from_lines(archive.read("trace.jsonl").decode().splitlines())
        (card,) = json.loads(archive.read("requests.json"))
    assert trace.records == live.engine.trace.records
    assert (card["prompt"], card["name"], card["num_tokens"], card["owner"]) == ("hëllo", "Ada", 4, "")


def test_a_preset_says_what_it_lacks(class_: Lab) -> None:
    answer = class_.play("me", "small")
    assert answer["done"] and "made for num_blocks 24" in answer["note"]
    assert class_.play("me", "system") == {"done": True}  # the lab has what it needs


def test_the_host_in_a_browser(come: Callable[..., Visitor], house: tuple[Lab, str], lab: Lab) -> None:
    host, pupil = come(f"?host={lab.host_key}"), come("?host=made-up")
    host.page.wait_for_selector(".lk-host >> visible=true")
    assert "host" not in host.page.url and pupil.page.locator(".lk-host").is_hidden()
    try:
        host.page.fill(".lk-who-name", "Chi")
        host.page.press(".lk-who-name", "Enter")
        host.page.click(".lk-host >> text=Clock")
        wait_for(lambda: not lab.open_to("clock"))
        host.page.wait_for_selector('[data-lock="clock"][aria-pressed="true"]')
        host.page.click(".lk-pause")
        pupil.page.wait_for_selector(".lk-paused-by >> text=by Chi")
        pupil.inject("hello", max_tokens=300)
        host.page.wait_for_selector(".lk-host-here >> text=somebody: 1 request")
        host.page.click("text=End all requests")
        wait_for(lambda: not lab.session.submissions.under_way(pupil.look("lab.visitor()")))
        with host.page.expect_download() as download:
            host.page.click("text=Save the session")
        assert download.value.suggested_filename == "labkit.session.zip"
        host.page.reload()
        host.page.wait_for_selector(".lk-host >> visible=true")
    finally:
        lab.set_open("clock", True)
        lab.session.live.resume()
