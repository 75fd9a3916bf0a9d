"""The program that serves the page: how it starts, why it does not, and how it ends."""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import app
from labkit.page.gradio_page import Page
from labkit.page.joining import lan_address
from labkit.page.sse import PATH
from labkit.serving.asgi import beside
from tests.page.program import until_it_listens

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds until a test gives up; nothing is decided by it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "argument --port: must be a whole number between 1 and 65535"),
        (["--num-blocks", "0"], "argument --num-blocks: must be a whole number of at least 1"),
        (["--block-size", "many"], "argument --block-size: must be a whole number"),
        (["--scheduler", "magic"], "argument --scheduler: invalid choice"),
        (["--grace", "soon"], "argument --grace: must be a number of seconds between 0 and 3600"),
        (["--grace", "nan"], "argument --grace: must be a number of seconds"),
        (["--max-queue", "0"], "argument --max-queue: must be a whole number of at least 1"),
        (["--api-key", ""], "argument --api-key: must not be empty: leave it out, and LABKIT_API_KEY too"),
        (["--what"], "unrecognized arguments: --what"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1"),
        (["--model", "tiny-random", "--device", "abacus"], "abacus"),
        (["--model", "tiny-random", "--dtype", "float3"], "float3"),
        (["--model", "tiny-random", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "max_num_seqs"),
        (["--model", "tiny-random", "--num-blocks", "9" * 12], "num_blocks=999999999999"),
        (["--speculative", "magic"], "argument --speculative: invalid choice"),
        (["--model", "tiny-random", "--draft-model", "tiny-random"], "draft_model needs speculative 'draft'"),
        (["--model", "tiny-random", "--speculative", "ngram", "--scheduler", "static"], "needs scheduler"),
        (["--num-speculative-tokens", "0"], "argument --num-speculative-tokens: must be a whole number"),
        (
            ["--model", "tiny-random", "--quantization", "int8", "--speculative", "draft"],
            "draft_model must be named",
        ),
    ],
)
def test_a_start_that_cannot_be_ends_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--port" not in arguments:
        arguments = [*arguments, "--port", str(free_port())]
    try:
        status = app.main(arguments)
    except SystemExit as end:
        status = end.code
    errors = capsys.readouterr().err
    assert status == 2
    assert len(errors.splitlines()) == 1 and errors.startswith("app.py: ") and message in errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("no room"),
        RuntimeError("MPS backend out of memory (allocated 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_said_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("labkit.engine.Engine", fail)
    assert app.main(["--model", "tiny-random", "--port", str(free_port())]) == 2
    errors = capsys.readouterr().err
    assert errors == "app.py: too little memory: lower --num-blocks, or take a smaller --model\n"


def test_a_bug_is_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("labkit.engine.Engine", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        app.load(app.parse([]))


@pytest.mark.parametrize("error", [OSError("no\n port"), ValueError("no\n port")])
def test_a_page_that_cannot_be_served_is_said_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app, "launch", fail)
    assert app.main(["--model", "tiny-random", "--port", str(free_port())]) == 2
    assert capsys.readouterr().err == "app.py: no port\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "app.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_an_unknown_model() -> None:
    done = run("--port", str(free_port()), "--model", "no-such-folder/model")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "no-such-folder/model" in done.stderr


def test_a_taken_port() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        done = run("--port", str(port))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"port {port}" in done.stderr and "in use" in done.stderr


def test_start_and_ctrl_c() -> None:
    port = free_port()
    command = [sys.executable, "app.py", "--model", "tiny-random", "--port", str(port), "--no-share"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("Starting the lab with tiny-random")
        assert lines[1] == "Ready: 256 pages of 16 tokens, float32 on cpu\n"
        assert lines[2] == f"The lab is at http://127.0.0.1:{port}\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and errors == ""
    finally:
        process.kill()


def test_the_hosts_link_can_be_opened_from_elsewhere() -> None:
    port, here = free_port(), lan_address()
    command = [sys.executable, "app.py", "--model", "tiny-random", "--port", str(port), "--no-share"]
    process = subprocess.Popen(
        [*command, "--host", "0.0.0.0"], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            lines = until_it_listens(process)
        finally:
            process.kill()
    local, reached = (f"http://{host}:{port}" for host in ("127.0.0.1", here or "127.0.0.1"))
    assert f"The lab is at {local}{f', and for other machines at {reached}' if here else ''}\n" in lines
    assert any(line.startswith(f"Its host has {reached}/?host=") for line in lines)


def test_on_colab_a_public_link_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert not app.parse([]).share
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert app.parse([]).share and not app.parse(["--no-share"]).share


def test_a_space_says_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)
    options = app.parse([])
    assert (options.host, options.port) == ("127.0.0.1", 7860)
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    options = app.parse([])
    assert (options.host, options.port) == ("0.0.0.0", 7999)


def test_the_readme_is_that_of_a_space() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, front, rest = text.split("---\n", 2)
    facts = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert facts["sdk"] == "gradio" and (ROOT / facts["app_file"]).is_file()
    assert tuple(map(int, facts["sdk_version"].split("."))) >= (6, 10)
    assert rest.lstrip().startswith("# labkit")


def test_options_reach_the_lab(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    options = app.parse(
        ["--model", "tiny-random", "--max-requests", "3", "--max-queue", "9", "--max-prompt-tokens", "50",
         "--max-answer-tokens", "20", "--grace", "1.5", "--no-knobs", "--trace-file", str(path)]
    )  # fmt: skip
    with app.load(options) as live:
        lab = app.lab_of(live, options)
        limits = lab.limits
        assert (limits.requests, limits.queue, limits.prompt_tokens, limits.answer_tokens) == (3, 9, 50, 20)
        assert lab.visitors.grace == 1.5 and not lab.open_to("knobs") and path.exists()
        lab.close()


@pytest.mark.parametrize("draft", [[], ["--draft-model", "tiny-random"]])
def test_options_for_speculation_reach_every_engine_of_the_lab(draft: list[str]) -> None:
    arguments = ["--model", "tiny-random", "--speculative", "draft", "--num-speculative-tokens", "3", *draft]
    options = app.parse(arguments)
    with app.load(options) as live:
        lab = app.lab_of(live, options)
        first = live.engine.config
        assert (first.speculative, first.num_speculative_tokens) == ("draft", 3)
        lab.change({"max_num_seqs": 2})
        second = lab.session.live.engine.config
        assert second.draft_model is first.draft_model and second.num_speculative_tokens == 3
        lab.close()


def test_the_clock_may_be_the_hosts() -> None:
    options = app.parse(["--model", "tiny-random", "--num-blocks", "64", "--no-clock"])
    with app.load(options) as live:
        lab = app.lab_of(live, options)
        with pytest.raises(ValueError, match="its host's"):
            lab.control("somebody", "speed", 1.0)
        assert live.speed is None and not lab.status()["clock"]
        lab.close()


def test_openais_api_is_beside_the_page_as_soon_as_its_port_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    port, launch, early = free_port(), Page.launch, []

    def launch_and_look(page: Page, **options: Any) -> Any:
        done = launch(page, **options)
        for path in ("/health", "/v1/models", PATH):
            key = {"Authorization": "Bearer secret"}
            with httpx.stream("GET", f"http://127.0.0.1:{port}{path}", headers=key, timeout=60) as answer:
                early.append(answer.status_code)
        return done

    monkeypatch.setattr(Page, "launch", launch_and_look)
    options = app.parse(["--model", "tiny-random", "--num-blocks", "64", "--api-key", "secret"])
    with app.load(options) as live:
        lab = app.lab_of(live, options)
        beside_api = functools.partial(beside, app.api_of(lab, options.api_key))
        demo = app.launch(lab, share=False, server_port=port, quiet=True, front=beside_api)
        try:
            assert early == [200, 200, 200]
            url, key = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
            body = {"model": "tiny-random", "prompt": "from a script", "max_tokens": 5, "ignore_eos": True}
            assert httpx.post(url + "/v1/completions", json=body).status_code == 401
            answer = httpx.post(url + "/v1/completions", json=body, headers=key, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 5
            assert httpx.get(url).text.startswith("<!doctype html>")
            assert b"labkit:generation_tokens_total" in httpx.get(url + "/metrics").content
            (card,) = lab.session.now().cards
            assert (card.prompt, card.name, card.num_tokens) == ("from a script", "API", 5)
        finally:
            demo.close(verbose=False)
