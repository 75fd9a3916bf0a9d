"""Other engines beside this one, played by small programs that speak as they do."""

from __future__ import annotations

import contextlib
import json
import stat
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from labkit.analysis.reference import DifferentTokens, Run
from labkit.analysis.workload import Job
from labkit.benchmark.peer_engines import compare as comparing
from labkit.benchmark.peer_engines import worker as workers
from labkit.benchmark.peer_engines.compare import compare, read_peers
from labkit.benchmark.peer_engines.processes import Sizes, busy_core, llama_server, worker
from labkit.benchmark.peer_engines.table import Row, ratios

PATIENCE = 120  # seconds until a test gives up; nothing is decided by it
SIZES = Sizes("tiny-random", "", threads=1, seats=3, budget=64, longest=60)
JOBS = [Job([number + 1] * (number + 2), 3 + number % 4) for number in range(8)]


def answer_of(job: Job) -> list[int]:
    return [sum(job.prompt) + place for place in range(job.max_tokens)]


def program(path: Path, text: str) -> str:
    """A program in Python that can be called by its path."""
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def ended(pids: Sequence[int]) -> bool:
    """Whether they end, now or soon: the kernel takes its time with what is killed."""
    until = time.monotonic() + PATIENCE
    left = set(pids)
    while left and time.monotonic() < until:
        time.sleep(0.01)
        left = {pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"}
    return not left


# -- what is asked for ----------------------------------------------------------------------------


def test_peers_are_read() -> None:
    given = ["transformers", "vllm=/a/python", "llamacpp=/b/server,/c.gguf"]
    found = {"transformers": [], "vllm": ["/a/python"], "llamacpp": ["/b/server", "/c.gguf"]}
    assert read_peers(given) == found


@pytest.mark.parametrize(
    "wrong", ["vllm", "vllm=", "llamacpp=/b", "llamacpp=/b,", "transformers=/x", "tgi=/x"]
)
def test_peers_that_cannot_be(wrong: str) -> None:
    with pytest.raises(ValueError, match="--peer"):
        read_peers([wrong])


# -- a worker -------------------------------------------------------------------------------------

ECHO = """
    import json, subprocess, sys
    assert sys.argv[2] == "vllm" and json.loads(sys.argv[3])["precision"] == "float32"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(json.dumps({"versions": {"vllm": "9", "child": str(child.pid)}}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["seats"] == 7:
            sys.exit("no seat 7 here")
        tokens = [[sum(prompt) + place for place in range(most)] for prompt, most in asked["jobs"]]
        answer = {"seconds": 2.0, "tokens": tokens, "times": []}
        if asked["seats"] == 5:
            answer = {"error": "KeyError: 5"}
        print(json.dumps(answer), flush=True)
"""


def test_a_worker_answers_says_what_fails_and_ends_with_its_children(tmp_path: Path) -> None:
    python = program(tmp_path / "python", ECHO)
    with worker("vllm", python, SIZES, "float32") as started:
        run = started.answer(JOBS, seats=2, adaptive=True)
        assert run.tokens == [answer_of(job) for job in JOBS] and run.seconds == 2.0
        with pytest.raises(RuntimeError, match="KeyError: 5"):
            started.answer(JOBS, seats=5, adaptive=True)
        assert started.versions["vllm"] == "9"
        pids = [started.process.pid, int(started.versions["child"])]
    assert ended(pids)


def test_a_worker_that_ends_says_its_last_words(tmp_path: Path) -> None:
    with (
        worker("vllm", program(tmp_path / "python", ECHO), SIZES, "float32") as started,
        pytest.raises(RuntimeError, match="no seat 7 here"),
    ):
        started.answer(JOBS, seats=7, adaptive=True)
    with (
        pytest.raises(RuntimeError, match="no such engine"),
        worker("vllm", program(tmp_path / "broken", "raise SystemExit('no such engine')"), SIZES, "float32"),
    ):
        pass


def test_no_more_requests_than_seats_are_given_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    running: dict[str, tuple[Job, list[int]]] = {}
    most = 0

    def add_request(name: str, prompt: dict[str, list[int]], params: SimpleNamespace) -> None:
        nonlocal most
        running[name] = Job(prompt["prompt_token_ids"], params.max_tokens), []
        most = max(most, len(running))

    def step() -> list[Any]:
        outputs = []
        for name, (job, tokens) in list(running.items()):
            tokens.append(answer_of(job)[len(tokens)])
            finished = len(tokens) == job.max_tokens
            outputs.append(
                SimpleNamespace(
                    request_id=name, finished=finished, outputs=[SimpleNamespace(token_ids=tuple(tokens))]
                )
            )
            if finished:
                del running[name]
        return outputs

    fake = ModuleType("vllm")
    fake.__version__ = "9"
    fake.SamplingParams = SimpleNamespace
    fake.LLM = lambda **kwargs: SimpleNamespace(
        llm_engine=SimpleNamespace(add_request=add_request, step=step), kwargs=kwargs
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    versions, answer = workers.vllm_engine(vars(SIZES) | {"precision": "float32"})
    assert versions["vllm"] == "9"
    for seats in (1, 3, 20):
        most = 0
        jobs = [(job.prompt, job.max_tokens) for job in JOBS]
        answered = answer({"jobs": jobs, "seats": seats, "adaptive": True})
        assert answered["tokens"] == [answer_of(job) for job in JOBS]
        assert [len(times) for times in answered["times"]] == [job.max_tokens for job in JOBS]
        assert most == min(seats, len(JOBS))


def test_the_worker_of_this_engine_prints_answers_alone(tmp_path: Path) -> None:
    """What loading says goes to the log; tokens are those of the engine."""
    with worker("labkit", sys.executable, SIZES, "float32") as started:
        one = started.answer(JOBS, seats=1, adaptive=True)
        three = started.answer(JOBS, seats=3, adaptive=False)
    assert one.tokens == three.tokens and [len(tokens) for tokens in one.tokens] == [
        j.max_tokens for j in JOBS
    ]


# -- a server of llama.cpp ------------------------------------------------------------------------

SERVER = """
    import json, sys, threading, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    if sys.argv[1:] == ["--version"]:
        sys.exit("version: 6.0 (build 1)")
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    assert options["--parallel"] == "3" and options["--ctx-size"] == "180" and options["--threads"] == "1"
    lock, now, most = threading.Lock(), 0, 0

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def answer(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def do_GET(self):
            self.answer({"status": "ok", "most": most})
        def do_POST(self):
            global now, most
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.02)
            with lock:
                now -= 1
            count = asked["n_predict"] if asked["prompt"] != [99] else 0
            self.answer({"tokens": [sum(asked["prompt"]) + place for place in range(count)]})

    ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


def test_a_server_gets_no_more_requests_than_it_has_slots(tmp_path: Path) -> None:
    import httpx

    with llama_server(program(tmp_path / "llama-server", SERVER), "model.gguf", SIZES) as server:
        assert server.versions == {"llama.cpp": "6.0 (build 1)"}
        assert server.answer(JOBS, seats=3, adaptive=True).tokens == [answer_of(job) for job in JOBS]
        assert httpx.get(f"{server._server.url}/health", trust_env=False).json()["most"] == 3
        with pytest.raises(RuntimeError, match="an answer has 0 tokens, not 4"):
            server.answer([Job([99], 4)], seats=3, adaptive=True)
        pid = server.process.pid
    assert ended([pid])


# -- all of them ----------------------------------------------------------------------------------


class Played:
    """An engine whose runs take as long as they are told, and three times as long beside a busy core."""

    def __init__(self, seconds: float, shift: int) -> None:
        self.seconds, self.shift = seconds, shift
        self.versions = {"played": "1"}
        self.process = psutil.Process()

    def answer(self, jobs: Sequence[Job], *, seats: int, adaptive: bool) -> Run:
        children = [child for child in self.process.children() if "while True" in " ".join(child.cmdline())]
        slow = 3 if children and not adaptive else 1
        tokens = [[token + self.shift for token in answer_of(job)] for job in jobs]
        return Run("", slow * self.seconds / seats, tokens, [])


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> dict[str, Played]:
    engines = {
        "transformers": Played(8.0, 0),
        "labkit": Played(2.0, 0),
        "vllm": Played(4.0, 0),
        "int8": Played(1.0, 1),
    }

    @contextlib.contextmanager
    def start(name: str, python: str, sizes: Sizes, precision: str) -> Iterator[Played]:
        if python == "/nowhere":
            raise FileNotFoundError("No such file: '/nowhere'")
        yield engines.get(precision, engines[name])

    monkeypatch.setattr(comparing, "worker", start)
    return engines


def run(peers: dict[str, list[str]], **more: Any) -> Any:
    settings = {"seats": (1, 3), "precisions": ("float32", "int8"), "repeats": 2, "progress": False}
    return compare(JOBS, peers, SIZES, **settings | more)


def test_a_table_of_all(played: dict[str, Played]) -> None:
    report = run({"transformers": [], "vllm": ["python"], "llamacpp": ["/nowhere", "x.gguf"]}, busy=True)
    rows = {row.name: row for row in report.rows}
    assert rows["labkit float32, 3 seats"].equal == 8 and rows["labkit int8, 3 seats"].equal == 0
    assert rows["labkit float32, 1 seat"].gain == pytest.approx(4.0)
    assert rows["labkit float32, 1 seat"].requests == comparing.FEW
    fixed, free = rows["labkit float32, 3 seats, fixed threads"], rows["labkit float32, 3 seats"]
    assert fixed.busy == pytest.approx(fixed.tokens_per_second / 3)
    assert free.busy == pytest.approx(free.tokens_per_second)
    assert "No such file" in report.failed["llamacpp gguf"]
    text = str(report)
    assert "All 5 systems gave the same" in text and "llamacpp gguf: not here: " in text
    assert (
        "labkit float32 over vllm float32, by seats: 2.00x at 1 (busy 2.00x), 2.00x at 3 (busy 2.00x)" in text
    )
    json.dumps(report.to_json())


def test_different_tokens_in_fp32_are_an_error_for_us_and_a_number_for_others(
    played: dict[str, Played],
) -> None:
    played["vllm"].shift = 1
    assert [row.equal for row in run({"vllm": ["python"]}).rows if row.engine == "vllm"] == [0, 0]
    played["transformers"].shift = 1
    with pytest.raises(DifferentTokens):
        run({"transformers": []})


def test_there_are_no_ratios_without_a_peer() -> None:
    row = Row("labkit", "float32", 8, "labkit float32, 8 seats", True, requests=8, tokens_per_second=5.0)
    assert list(ratios([row])) == []


def test_a_busy_core_ends_with_its_context() -> None:
    with busy_core():
        children = [
            child for child in psutil.Process().children() if "while True" in " ".join(child.cmdline())
        ]
        assert len(children) == 1
    assert ended([children[0].pid])
