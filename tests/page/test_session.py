"""Other settings mean another engine, and nothing is lost unless a visitor agrees."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from labkit.config import EngineConfig
from labkit.core.kv_cache import PagedKVCache
from labkit.engine import Engine
from labkit.models.load import LoadedModel
from labkit.page.knobs import KNOBS
from labkit.page.session import ENDING, Lab
from labkit.sampling_params import SamplingParams
from labkit.serving.async_engine import AsyncEngine
from tests.waiting import PATIENCE, wait_for

FOUR = SamplingParams(max_tokens=4)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


# -- settings -------------------------------------------------------------------------------------


def test_an_idle_engine_is_swapped_at_once(own: Lab, model: LoadedModel) -> None:
    old, version = own.session, own.version
    old.live.speed = 500
    wanted = {
        "scheduler": "static", "kv_policy": "reserved", "block_size": 8, "num_blocks": 60, "max_num_seqs": 3,
        "max_num_batched_tokens": 70, "enable_prefix_caching": False, "enable_chunked_prefill": True,
        "speculative": None, "max_step_seconds": None,
    }  # fmt: skip
    assert own.change(wanted) == {"done": True}
    engine = own.session.live.engine
    assert own.settings == wanted and {name: getattr(engine.config, name) for name in KNOBS} == wanted
    assert engine.model.module is model.module, "the weights are loaded once"
    assert own.session.live.speed == 500 and own.version > version
    assert own.session.feed.name != old.feed.name and own.base["num_blocks"] == 128
    with pytest.raises(RuntimeError, match="closed"):
        old.live.submit("hello")
    assert own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=2))


def test_what_runs_is_asked_about(own: Lab) -> None:
    session = own.session
    session.live.pause()
    session.submissions.inject("me", "hello", LONG)
    assert own.change({"max_num_seqs": 2}) == {"ask": 1}
    assert own.session is session and session.live.num_unfinished == 1


def test_what_runs_may_be_cancelled(own: Lab) -> None:
    old = own.session
    old.live.pause()
    request_id = old.submissions.inject("me", "hello", LONG)
    assert own.change({"max_num_seqs": 2}, running="cancel") == {"done": True}
    assert old.live.output(request_id).finish_reason == "abort" and own.settings["max_num_seqs"] == 2


def test_what_runs_may_finish_first(own: Lab) -> None:
    old = own.session
    old.live.pause()
    request_id = old.submissions.inject("me", "hello", LONG)
    called: list[object] = []
    assert own.change({"max_num_seqs": 2}, running="finish", then=called.append) == {"waits": 1}
    assert own.status()["pending"]["max_num_seqs"] == 2
    with pytest.raises(ValueError, match="about to restart"):
        old.submissions.inject("you", "hello", LONG)
    wait_for(lambda: own.session is not old)  # it was paused: that would have taken for ever
    assert old.live.output(request_id).finish_reason == "length"
    wait_for(lambda: called)
    assert called == [own.session] and own.status()["pending"] is None
    own.session.submissions.inject("you", "hello", SamplingParams(max_tokens=1))


def test_a_change_that_waits_can_be_given_up_or_hurried(own: Lab) -> None:
    old = own.session
    old.live.speed = 5
    old.submissions.inject("me", "hello", LONG)
    own.change({"max_num_seqs": 2}, running="finish")
    assert own.change({}, running="keep") == {"done": True}
    assert own.session is old and own.status()["pending"] is None
    old.submissions.inject("me", "hello", LONG)
    own.change({"max_num_seqs": 2}, running="finish")
    assert own.change({"max_num_seqs": 3}, running="cancel") == {"done": True}
    assert own.settings["max_num_seqs"] == 3
    time.sleep(0.15)  # the one that waited notices that it is over
    assert own.settings["max_num_seqs"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be between 1 and 256, not 0"),
        ({"num_blocks": 10**9}, "num_blocks must be between 4 and 4096"),
        ({"num_blocks": 8.5}, "num_blocks must be a whole number"),
        ({"max_num_seqs": "9"}, "max_num_seqs must be a whole number"),
        ({"max_num_seqs": 200, "max_num_batched_tokens": 100}, r"max_num_seqs \(200\) must not exceed"),
        ({"scheduler": "magic"}, "scheduler must be one of continuous, static, naive"),
        ({"scheduler": []}, "scheduler must be one of"),
        ({"kv_policy": None}, "kv_policy must be one of paged, reserved"),
        ({"speculative": "draft"}, "speculative must be one of None, ngram, not 'draft'"),
        ({"speculative": "ngram", "scheduler": "static"}, "speculative needs scheduler continuous or naive"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching must be True or False"),
        ({"model": "/etc/passwd"}, "'model' is no setting"),
    ],
)
def test_settings_that_cannot_be(own: Lab, settings: dict[str, object], message: str) -> None:
    session = own.session
    with pytest.raises(ValueError, match=message):
        own.change(settings, running="cancel")
    assert own.session is session and session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))


def test_speculation_is_turned_on_and_off(own: Lab) -> None:
    assert own.settings["speculative"] is None and own.session.live.engine.speculator is None
    own.change({"speculative": "ngram"})
    assert own.session.live.engine.speculator and own.session.feed.pictures()["speculative"] == "ngram"
    own.change({"max_num_seqs": 3})
    assert own.settings["speculative"] == "ngram"
    own.play("me", "uneven")
    assert own.settings["speculative"] is None, "a scenario that does not name it begins as the lab did"
    wait_for(lambda: not own.session.live.num_unfinished)


def test_a_model_that_drafts_stays_for_those_who_come_back_to_it(model: LoadedModel) -> None:
    config = EngineConfig(model=model, num_blocks=128, speculative="draft", draft_model=model)
    with AsyncEngine(Engine(config)) as live:
        own = Lab(live)
        for settings in ({"max_num_seqs": 3}, {"speculative": "ngram"}, {"speculative": "draft"}):
            assert own.change(settings) == {"done": True}
            config = own.session.live.engine.config
            assert config.draft_model is (None if config.speculative == "ngram" else model)
        own.close()


def test_without_room_the_old_engine_goes_on(own: Lab) -> None:
    def fail(config: EngineConfig) -> Engine:
        raise RuntimeError("can't allocate memory")

    own._make = fail
    session = own.session
    with pytest.raises(ValueError, match="too little memory"):
        own.change({"num_blocks": 4000})
    assert own.session is session and session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))


def test_memory_is_said_of_memory_alone(own: Lab) -> None:
    def fail(config: EngineConfig) -> Engine:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    own._make = fail
    with pytest.raises(ValueError) as caught:
        own.change({"num_blocks": 100})
    assert str(caught.value) == (
        "No engine could be built with these settings: "
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    )


# -- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the lab asks: there one pool takes most of the memory."""
    monkeypatch.setattr(LoadedModel, "device", property(lambda model: torch.device("cuda")))


def cache_of(own: Lab) -> weakref.ref[PagedKVCache]:
    return weakref.ref(own.session.live.engine.runner.cache)


@pytest.mark.parametrize("speculative", [None, "draft"])
def test_a_pool_is_freed_when_another_takes_its_place(
    model: LoadedModel, speculative: str | None, no_collector: None
) -> None:
    draft = model if speculative else None
    config = EngineConfig(model, num_blocks=128, speculative=speculative, draft_model=draft)
    with AsyncEngine(Engine(config)) as live:
        own = Lab(live)
        for seats in (3, 4, 5):
            own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=3))
            wait_for(lambda: not own.session.live.num_unfinished)
            old, engine = cache_of(own), own.session.live.engine
            own.change({"max_num_seqs": seats})
            assert old() is None and engine.speculator is None
            assert len(engine.trace) and repr(engine), "what it did can be read"
        own.close()


def test_on_a_gpu_the_old_pool_is_freed_before_the_new_one_is_made(
    own: Lab, on_gpu: None, no_collector: None
) -> None:
    make, alive = own._make, []
    own._make = lambda config: alive.append(old()) or make(config)
    for seats in (3, 4):
        old = cache_of(own)
        assert own.change({"max_num_seqs": seats}) == {"done": True}
        assert own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))
        wait_for(lambda: not own.session.live.num_unfinished)
    assert alive == [None, None]


def test_on_a_gpu_an_engine_that_cannot_be_built_leaves_one_with_the_old_settings(
    own: Lab, on_gpu: None
) -> None:
    make, old, version = own._make, own.session, own.version

    def fail(config: EngineConfig) -> Engine:
        if config.num_blocks == 4000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(config)

    own._make, before = fail, own.settings
    with pytest.raises(ValueError, match="too little memory"):
        own.change({"num_blocks": 4000})
    assert own.session is not old and own.settings == before and own.version > version
    assert "restarts" in old.submissions.refuses
    assert own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))


def test_on_a_gpu_a_lab_without_any_engine_left_can_be_given_one(own: Lab, on_gpu: None) -> None:
    make, full = own._make, [True, True]

    def fail(config: EngineConfig) -> Engine:
        if full:
            full.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make(config)

    own._make = fail
    with pytest.raises(ValueError, match="too little memory"):
        own.change({"num_blocks": 4000})
    with pytest.raises(ValueError, match="restarts"):
        own.session.submissions.inject("me", "hello", LONG)
    assert own.change({"num_blocks": 100}) == {"done": True}
    assert own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))


def test_a_size_that_nobody_chose_is_measured_again(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model, max_num_seqs=4))) as live:
        own = Lab(live)
        base = own.base["num_blocks"]

        def chosen() -> int | None:
            return own.session.live.engine.config.num_blocks

        own.change({"max_num_seqs": 5})
        assert chosen() is None and own.settings["num_blocks"] == base * 5 // 4, "more seats, more pages"
        own.change(own.settings | {"block_size": 32})
        assert chosen() is None and own.settings["num_blocks"] == base * 5 // 8
        own.change({"num_blocks": 40})
        own.change({"block_size": 16})
        assert chosen() == own.settings["num_blocks"] == 40, "what a visitor chose is kept"
        own.change({"num_blocks": base, "max_num_seqs": 4})
        assert chosen() is None and own.settings["num_blocks"] == base, "as the lab began"
        own.close()


def test_a_host_may_keep_the_knobs(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=128))) as live:
        own = Lab(live, knobs=False)
        with pytest.raises(ValueError, match="are its host's"):
            own.change({"max_num_seqs": 2})
        assert "made for max_num_seqs 4" in own.play("me", "uneven")["note"] and own.session.live is live
        own.close()


def test_an_engine_that_failed_is_replaced(own: Lab) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    own.session.live.engine.step = fail  # type: ignore[assignment, method-assign]
    own.session.submissions.inject("me", "hello", LONG)
    wait_for(lambda: own.session.live.failure)
    assert own.change({}) == {"done": True}
    own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))


def test_the_end_closes_what_the_lab_built_and_no_more(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=64))) as live:
        own = Lab(live)
        own.close()
        live.submit("hello", SamplingParams(max_tokens=1))
        own = Lab(live)
        own.change({"num_blocks": 32}, running="cancel")
        own.close()
        with pytest.raises(RuntimeError, match="closed"):
            own.session.live.submit("hello")


def test_draining_lets_what_runs_end_and_takes_nothing_new(model: LoadedModel) -> None:
    own = Lab(AsyncEngine(Engine(EngineConfig(model=model, num_blocks=256))))
    live, submissions = own.session.live, own.session.submissions
    live.pause()
    mine = submissions.inject("me", "hello", SamplingParams(max_tokens=50, ignore_eos=True))
    live.resume()
    ending = threading.Thread(target=own.drain, args=(PATIENCE,))
    ending.start()
    wait_for(lambda: submissions.refuses)
    assert submissions.clock()["notice"] == ENDING
    for act in (
        lambda: submissions.inject("me", "hello", FOUR),
        lambda: own.change({"max_num_seqs": 2}, running="finish"),
        lambda: own.play("me", "burst"),
    ):
        with pytest.raises(ValueError, match="The lab is ending"):
            act()
    ending.join(PATIENCE)
    assert live.output(mine).finish_reason == "length"
    own.close()


@pytest.mark.parametrize("paused", [False, True])
def test_draining_has_an_end(model: LoadedModel, paused: bool) -> None:
    own = Lab(AsyncEngine(Engine(EngineConfig(model=model, num_blocks=256))))
    live, submissions = own.session.live, own.session.submissions
    live.pause()
    mine = submissions.inject("me", "hello", LONG)
    if not paused:
        live.speed = 0.01  # the next step would be in a minute
        live.resume()
    own.drain(3600 if paused else 0.01)
    assert live.output(mine).finish_reason == "abort" and submissions.now().cards[0].finish_reason == "abort"
    own.close()


def test_a_visitor_who_is_gone_takes_their_requests_along(model: LoadedModel) -> None:
    with AsyncEngine(Engine(EngineConfig(model=model, num_blocks=128, max_num_seqs=4))) as live:
        own = Lab(live, grace=0.01)
        me, you = own.visitors.arrive("tab 1"), own.visitors.arrive("tab 2")
        live.speed = 20
        mine, theirs = (
            own.session.submissions.inject(me, "hello", LONG),
            own.session.submissions.inject(you, "hello", LONG),
        )
        own.play(me, "long", {"max_num_batched_tokens": 512, "max_num_seqs": 4})
        own.visitors.leave("tab 1")
        wait_for(lambda: live.output(mine).finished)
        assert live.output(mine).finish_reason == "abort" and not live.output(theirs).finished
        assert own.session.player._pending == []
        own.close()


def test_two_changes_at_once_are_one_after_the_other(own: Lab) -> None:
    threads = [
        threading.Thread(target=own.change, args=({"max_num_seqs": 2 + i},), kwargs={"running": "cancel"})
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert own.session.submissions.inject("me", "hello", SamplingParams(max_tokens=1))
    wait_for(lambda: sum(t.name == "labkit-engine" for t in threading.enumerate()) == 1)
