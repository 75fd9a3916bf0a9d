"""Two engines behind one address: the program itself, on a Ray cluster that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from labkit import LLM, Engine, EngineConfig, SamplingParams
from labkit.serving import scale
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.cli import StartError
from tests.serving.api_server import MODEL, free_port

SIZES = {"num_blocks": 1024, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
PROMPTS = [f"the {word} of these words is a word" for word in ("first", "second", "third", "last")]
LONG = 1800  # tokens: much longer than it takes to kill an engine


# Ray's own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas must be at least --replicas (3), not 2"),
        (["--gpus-per-replica", "2"], "between 0 and 1, not '2'"),
        (["--gpus-per-replica", "0.5"], "--num-blocks"),
        (["--routing", "prefix"], "--routing"),
        (["--block-size", "x"], "--block-size"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_options_that_cannot_be_are_named(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        scale.parse(options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count("\n") == 1


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert scale.main(["--model", MODEL]) == 2
    assert "pip install 'labkit[scale]'" in capsys.readouterr().err


# -- what each engine gets ------------------------------------------------------------------------


def shares(options: list[str], **there: float) -> Any:
    pytest.importorskip("ray")
    return scale.shares(*scale.parse(options), there)


def test_cores_are_shared_out_and_gpus_given_where_there_are_some() -> None:
    assert shares(["--replicas", "3"], CPU=8).threads == 2
    assert shares(["--replicas", "3", "--threads", "1"], CPU=8).threads == 1
    assert shares(["--replicas", "2"], CPU=8).gpus == 0
    assert shares(["--replicas", "2"], CPU=8, GPU=2).gpus == 1
    half = ["--replicas", "2", "--gpus-per-replica", "0.5", "--num-blocks", "9"]
    assert shares(half, CPU=8, GPU=1).gpus == 0.5
    grows = shares(["--replicas", "2", "--max-replicas", "4", "--max-num-seqs", "9"], CPU=8)
    assert (grows.fewest, grows.most, grows.threads, grows.busy, grows.ongoing) == (2, 4, 2, 9, 18)


def test_more_than_this_machine_has_is_refused_and_left_to_a_cluster() -> None:
    with pytest.raises(StartError, match="3 engines with 1 cores each need 3 cores, and 2 are here"):
        shares(["--replicas", "3"], CPU=2)
    with pytest.raises(StartError, match="2 engines with 1 GPUs each need 2 GPUs, and 1 are here"):
        shares(["--replicas", "2"], CPU=2, GPU=1)
    assert shares(["--replicas", "3", "--address", "auto"], CPU=2).threads == 1


def test_an_engine_that_failed_is_unhealthy() -> None:
    pytest.importorskip("ray")
    from labkit.serving.ray_replica import _Replica

    def fail() -> None:
        raise OSError("no memory")

    with AsyncEngine(Engine(EngineConfig(model=MODEL, **SIZES))) as live:
        replica = _Replica()
        replica.app = SimpleNamespace(state=SimpleNamespace(handler=SimpleNamespace(engine=lambda: live)))
        replica.check_health()
        live.engine.step = fail  # type: ignore[method-assign]
        *_, output = live.stream(live.submit("words", SamplingParams(max_tokens=4)))
        assert output.finish_reason == "error"
        with pytest.raises(RuntimeError, match="no memory"):
            replica.check_health()


def test_a_service_that_grows_tells_ray_its_bounds() -> None:
    serve = pytest.importorskip("ray.serve")
    from labkit.serving.ray_replica import application

    own, given = scale.parse(["--replicas", "2", "--max-replicas", "5", "--target-ongoing", "3"])
    replicas = scale.shares(own, given, {"CPU": 16, "GPU": 5})
    deployment = application(given, replicas)._bound_deployment  # Ray shows it nowhere else before it runs
    assert isinstance(deployment, serve.Deployment)
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3)
    assert deployment.ray_actor_options == {"num_cpus": 3, "num_gpus": 1}
    assert deployment.max_ongoing_requests == 2 * given.max_num_seqs


# -- a cluster ------------------------------------------------------------------------------------


@dataclass
class Scaled:
    """The program, and where it listens."""

    process: subprocess.Popen[str]
    url: str

    def replicas(self) -> set[int]:
        """The processes of the engines."""
        found = set()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.cmdline() and "ServeReplica" in child.cmdline()[0]:
                    found.add(child.pid)
        return found

    def post(self, session: str, **fields: Any) -> dict[str, Any]:
        """One answer, whole."""
        answer = httpx.post(
            f"{self.url}/v1/completions", json=body(**fields), headers={"X-Session-Id": session}, timeout=60
        )
        return answer.raise_for_status().json()

    def stream(
        self, session: str, first: Callable[[], None] = lambda: None, **fields: Any
    ) -> tuple[str, bool]:
        """The text of a streamed answer, and whether it came to its end; `first` is called once it comes."""
        text, ended = "", False
        headers = {"X-Session-Id": session}
        with httpx.stream(
            "POST",
            f"{self.url}/v1/completions",
            json=body(stream=True, **fields),
            headers=headers,
            timeout=60,
        ) as answer:
            try:
                for line in answer.iter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        return text, ended
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return text, False
                    text += event["choices"][0]["text"]
                    ended = event["choices"][0]["finish_reason"] is not None
                    first()
                    first = lambda: None  # noqa: E731
            except httpx.TransportError:
                return text, False
        return text, False

    def count(self, session: str, name: str) -> float:
        """A number of the engine that answers a session."""
        text = httpx.get(f"{self.url}/metrics", headers={"X-Session-Id": session}, timeout=60).text
        (line,) = (line for line in text.splitlines() if line.startswith(f"labkit:{name}{{"))
        return float(line.split()[-1])

    def until(self, true: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.1)


def body(**fields: Any) -> dict[str, Any]:
    fixed = {"model": MODEL, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    return fixed | fields


@pytest.fixture(scope="module")
def alone() -> Callable[[str, int], str]:
    """What one engine answers."""
    llm = LLM(MODEL, **SIZES)
    known: dict[tuple[str, int], str] = {}

    def answer(prompt: str, max_tokens: int) -> str:
        if (prompt, max_tokens) not in known:
            params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
            known[prompt, max_tokens] = llm.generate(prompt, params)[0].text
        return known[prompt, max_tokens]

    return answer


@contextlib.contextmanager
def started(folder: str, *, tries: int = 2) -> Iterator[Scaled]:
    """The program, ready. Ray's own processes have half a minute to start, so it gets a second try."""
    port = free_port()
    command = [sys.executable, "-m", "labkit.scale", "--model", MODEL, "--port", str(port)]
    command += ["--replicas", "2", "--threads", "1", "--routing", "session", "--drain-seconds", "60"]
    for name, value in SIZES.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"RAY_TMPDIR": folder}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            if any(line.startswith("Ready") for line in process.stdout or ()):
                yield Scaled(process, f"http://127.0.0.1:{port}")
                return
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
    assert tries > 1, "the program ended before it was ready"
    with started(folder, tries=tries - 1) as scaled:
        yield scaled


@pytest.fixture(scope="module")
def scaled() -> Iterator[Scaled]:
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray")  # a short path, because Ray puts sockets there
    with started(folder) as scaled:
        yield scaled
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def sessions(scaled: Scaled) -> tuple[str, str]:
    """Two sessions that different engines answer: the second has not yet seen what the first has."""
    scaled.post("0", prompt="words", max_tokens=1)
    for number in range(1, 64):
        if not scaled.count(str(number), "generation_tokens_total"):
            return "0", str(number)
    raise AssertionError("all sessions went to one engine")


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Call them all at once, and return what they return."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_engines_answer_as_one(
    scaled: Scaled, sessions: tuple[str, str], alone: Callable[[str, int], str]
) -> None:
    before = [scaled.count(session, "generation_tokens_total") for session in sessions]
    asked = [(session, prompt) for session in sessions for prompt in PROMPTS]
    whole = together(*(lambda s=s, p=p: scaled.post(s, prompt=p) for s, p in asked))
    parts = together(*(lambda s=s, p=p: scaled.stream(s, prompt=p) for s, p in asked))
    for (_, prompt), answer, (text, ended) in zip(asked, whole, parts, strict=True):
        assert answer["choices"][0]["text"] == text == alone(prompt, 40)
        assert answer["usage"]["completion_tokens"] == 40 and ended
    # Each session stayed with its engine.
    after = [scaled.count(session, "generation_tokens_total") for session in sessions]
    each = 2 * 40 * len(PROMPTS)
    assert [new - old for old, new in zip(before, after, strict=True)] == [each, each]


def test_a_client_that_goes_away_ends_its_request(scaled: Scaled, sessions: tuple[str, str]) -> None:
    session, _ = sessions
    before = scaled.count(session, "generation_tokens_total")
    with httpx.stream(
        "POST",
        f"{scaled.url}/v1/completions",
        json=body(prompt="words", max_tokens=LONG, stream=True),
        headers={"X-Session-Id": session},
        timeout=60,
    ) as answer:
        next(answer.iter_lines())
    scaled.until(lambda: not scaled.count(session, "num_requests_running"))
    assert scaled.count(session, "generation_tokens_total") - before < LONG


def test_errors_are_those_of_the_api(scaled: Scaled) -> None:
    answer = httpx.post(f"{scaled.url}/v1/completions", json=body(prompt="words", model="other"), timeout=60)
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"


def test_a_killed_engine_costs_its_own_streams_and_is_replaced(
    scaled: Scaled, sessions: tuple[str, str], alone: Callable[[str, int], str]
) -> None:
    victim = min(before := scaled.replicas())
    assert len(before) == 2
    going = threading.Barrier(5, timeout=60)
    asked = [(session, prompt) for session in sessions for prompt in PROMPTS[:2]]

    def kill() -> None:
        going.wait()  # until all four streams have begun
        os.kill(victim, signal.SIGKILL)

    *streams, _ = together(
        *(lambda s=s, p=p: scaled.stream(s, going.wait, prompt=p, max_tokens=LONG) for s, p in asked), kill
    )
    broken = {session for (session, _), (_, ended) in zip(asked, streams, strict=True) if not ended}
    assert len(broken) == 1, "the streams of one engine break, and those of the other do not"
    for (session, prompt), (text, ended) in zip(asked, streams, strict=True):
        assert ended is (session not in broken)
        assert text == alone(prompt, LONG) if ended else alone(prompt, LONG).startswith(text)
    # Both sessions are served at once, by the engine that is left, and later by two again.
    for session in sessions:
        scaled.until(lambda session=session: right(scaled, session, alone))
    scaled.until(lambda: len(scaled.replicas() - {victim}) == 2)
    assert before - {victim} < scaled.replicas()


def right(scaled: Scaled, session: str, alone: Callable[[str, int], str]) -> bool:
    """Whether an answer comes, which must be right. Ray may need a moment to see that a replica is dead."""
    try:
        answer = scaled.post(session, prompt=PROMPTS[0])
    except httpx.HTTPError:
        return False
    assert answer["choices"][0]["text"] == alone(PROMPTS[0], 40)
    return True


def test_it_drains_when_it_is_told_to_stop(
    scaled: Scaled, sessions: tuple[str, str], alone: Callable[[str, int], str]
) -> None:
    going = threading.Barrier(3, timeout=60)

    def stop() -> None:
        going.wait()
        scaled.process.send_signal(signal.SIGTERM)

    *streams, _ = together(
        *(lambda s=s: scaled.stream(s, going.wait, prompt=PROMPTS[0], max_tokens=LONG) for s in sessions),
        stop,
    )
    assert streams == [(alone(PROMPTS[0], LONG), True)] * 2
    assert scaled.process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        scaled.post("0", prompt="words")
