"""OpenAI's API on the live engine: `python -m labkit.server`, or beside the page that `app.py` serves.

Routes and errors. What happens to a call is in `calls.py`, and how it is written in `protocol.py`. A client
that goes away is noticed at once, and its requests are aborted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labkit.models.chat import as_chat
from labkit.sampling_params import SamplingParams
from labkit.serving import cli
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.handler import Job, Options, Server
from labkit.serving.schema import (
    Asked,
    ChatAsked,
    ChatFormat,
    CompletionAsked,
    CompletionFormat,
    ErrorAnswer,
    MakeFormat,
    RequestError,
    Vocabulary,
    error_object,
)

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; chat goes on until the model ends
_STATUSES = (400, 401, 404, 413, 422, 429, 500, 503, 504)
_FLUSH_SECONDS = 5  # to send what is written, once the answers have ended


def create_app(
    engine: AsyncEngine | Callable[[], AsyncEngine],
    options: Options | None = None,
    *,
    file: Callable[[str, str, SamplingParams], None] | None = None,
) -> FastAPI:
    """The API as an ASGI app. Its `state.server` is the `Server` behind it.

    Args:
        engine: to serve, or what gives the one that runs now.
        options: what is allowed.
        file: see `Server`.
    """
    options = options or Options()
    server = Server((lambda: engine) if isinstance(engine, AsyncEngine) else engine, options, file)
    server.metrics.follow(server.engine())
    app = FastAPI(title="labkit", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    app.state.server = server
    if options.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(options.cors), allow_headers=["*"])
    app.add_middleware(_Bounded, limit=options.body_bytes)
    _answer_errors(app)
    guard = [Depends(_key_check(options.api_key))] if options.api_key else []
    error = {"description": "An error in OpenAI's shape.", "model": ErrorAnswer}
    calls = dict.fromkeys(_STATUSES, error) | {
        200: {"description": "The answer.", "content": {"text/event-stream": {}}}
    }

    @app.post("/v1/completions", dependencies=guard, responses=calls)
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        """Continue a prompt."""
        live = server.engine()
        prompts = asked.prompts()
        if asked.echo and asked.logprobs is not None:
            raise RequestError(400, "echo with logprobs is not supported here", param="echo")
        tokenizer = live.engine.model.tokenizer
        keep = asked.echo or options.log_prompts or file is not None
        shown = [_shown(prompt, tokenizer) if keep else "" for prompt in prompts]
        job = _job(server, request, asked, prompts, shown, CompletionFormat, asked.logprobs, bool(asked.echo))
        usual = min(_COMPLETION_TOKENS, options.limits.answer_tokens or _COMPLETION_TOKENS)
        max_tokens = usual if asked.max_tokens is None else asked.max_tokens
        return await _respond(server, request, job, max_tokens, asked.logprobs)

    @app.post("/v1/chat/completions", dependencies=guard, responses=calls)
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """Answer a talk, in the model's own chat format."""
        asked.refuse_unknown()
        talk, logprobs = asked.talk(), asked.num_logprobs()
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise RequestError(
                400, "max_tokens and max_completion_tokens say the same: give one of them", param="max_tokens"
            )
        try:
            prompt = await asyncio.to_thread(as_chat, server.engine().engine.model.tokenizer, talk)
        except Exception as error:  # the template of some models refuses some talks, in words of its own
            raise RequestError(400, f"messages: the chat template says: {error}", param="messages") from None
        job = _job(server, request, asked, [prompt], [talk[-1]["content"]], ChatFormat, logprobs, False)
        max_tokens = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        return await _respond(server, request, job, max_tokens, logprobs)

    @app.get("/v1/models", dependencies=guard, responses={401: error})
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(server)]}

    @app.get("/v1/models/{name:path}", dependencies=guard, responses={401: error, 404: error})
    async def model(name: str) -> dict[str, Any]:
        """The model of that name."""
        if name != server.model_name:
            raise RequestError(
                404, f"model {name!r} is not served here; {server.model_name!r} is",
                param="model", code="model_not_found",
            )  # fmt: skip
        return _model(server)

    @app.get("/health", responses={503: {"description": "Requests are not taken in."}})
    async def health() -> Response:
        """Whether requests are taken in."""
        live = server.engine()
        state = "draining" if server.draining else "failed" if live.failure else "ok"
        body = {"status": state, "model": server.model_name, "requests": live.num_unfinished}
        return JSONResponse(body, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        server.metrics.follow(server.engine())
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def beside(api: ASGIApp, app: ASGIApp) -> ASGIApp:
    """An ASGI app that serves the API's paths, and leaves everything else to another app."""

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and (path.startswith("/v1/") or path in ("/health", "/metrics")):
            await api({**scope, "path": path, "root_path": ""}, receive, send)
        else:
            await app(scope, receive, send)

    return front


def _job(
    server: Server,
    request: Request,
    asked: Asked,
    prompts: list[Any],
    shown: list[str],
    make: MakeFormat,
    logprobs: int | None,
    echo: bool,
) -> Job:
    words = None if logprobs is None else Vocabulary(server.engine().engine.model.tokenizer)
    answer_id = f"{make.prefix}-{uuid.uuid4().hex}"  # type: ignore[attr-defined]
    written = make(answer_id, server.model_name, int(time.time()), words)
    client = request.client.host if request.client else ""
    return Job(client, asked, prompts, shown, written, echo, time.perf_counter())


async def _respond(
    server: Server, request: Request, job: Job, max_tokens: int | None, logprobs: int | None
) -> Response:
    live = await server.take(job, max_tokens=max_tokens, logprobs=logprobs)
    headers = {"X-Request-Id": ",".join(job.names)}
    if job.asked.stream:
        return _EventStream(server.events(live, job), headers, lambda: server.let_go(live, job))
    try:
        answer = await _unless_gone(request.receive, server.whole(live, job))
    finally:
        server.let_go(live, job)
    return JSONResponse(answer, headers=headers)


def _model(server: Server) -> dict[str, Any]:
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.created,
        "owned_by": "labkit",
        "max_model_len": server.engine().engine.max_model_len,
    }


def _shown(prompt: str | list[int], tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    except (OverflowError, IndexError, TypeError):  # no tokens of ours: the engine will say so
        return ""


# -- clients that go away -------------------------------------------------------------------------


class ClientGone(Exception):
    """Whoever asked does not listen any more."""


async def _unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client goes away. Raises `ClientGone` then."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        with contextlib.suppress(BaseException):
            await doing


class _EventStream(StreamingResponse):
    """Server-sent events that end when the client goes away, even while nothing is sent."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], headers: dict[str, str], done: Callable[[], None]
    ) -> None:
        # Proxies shall hand on each piece as it comes.
        super().__init__(events, headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._done = done  # called whatever happens, even if nothing was ever sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self.stream_response(send))
        except (ClientGone, OSError):
            pass
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            self._done()


# -- what is refused ------------------------------------------------------------------------------


class _Bounded:
    """Refuses bodies over a size, before they are read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, f"the body is too large: the limit is {self.limit:,} bytes")
            return message

        await self.app(scope, bounded, send)


def _key_check(key: str) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        good = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())  # in constant time
        if scheme.lower() != "bearer" or not good:
            raise RequestError(
                401, "a valid API key is needed: Authorization: Bearer ...", code="invalid_api_key"
            )

    return check


def _answer_errors(app: FastAPI) -> None:
    """Have all errors answered in OpenAI's shape."""

    def respond(error: RequestError) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_object(error), error.status, headers)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return respond(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = respond(RequestError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})  # with 405, what is allowed
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return respond(RequestError(400, f"the body is no JSON: {first['ctx']['error']}"))
        if first["type"] == "string_unicode" and not place:
            return respond(
                RequestError(422, "the name of a field holds half a surrogate pair: it is no text")
            )
        if not place:
            return respond(RequestError(422, "the body must be a JSON object, sent as application/json"))
        message = f"{'.'.join(place)}: {first['msg'][0].lower()}{first['msg'][1:]}"
        return respond(RequestError(422, message, param=place[0]))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(RequestError(500, "the server failed; its log says how", code="internal_error"))


# -- the program ----------------------------------------------------------------------------------


class _Draining(uvicorn.Server):
    """Stops in three stages: new calls are refused; those under way may end; after a while they are aborted.

    A second signal ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server, drain_seconds: float) -> None:
        super().__init__(config)
        self._server, self._drain_seconds = server, drain_seconds

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop. Uvicorn's own would raise the signal again in the end, as if it had failed."""
        self.should_exit = True
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.SIG_DFL)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        address = f"http://{self.config.host}:{self.config.port}/v1"
        print(f"Ready: model {self._server.model_name!r} at {address}", flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        self._server.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        while self._server.busy and loop.time() < end:  # the port stays open: whoever comes is told
            await asyncio.sleep(0.05)
        # On a thread of its own, for it waits for the step that runs.
        await loop.run_in_executor(None, self._server.engine().close)
        await super().shutdown(sockets)


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The options. Ends the program with status 2 and one line on stderr for one that cannot be."""
    parser = cli.Parser(prog="labkit.server", description="OpenAI's API on an engine of our own.")
    cli.add_engine(parser, num_blocks=None)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=cli.port, default=8000, help="default: %(default)s")
    add("--served-model-name", help="that clients must name (default: that of --model)")
    add("--api-key", default=os.environ.get("LABKIT_API_KEY"), help="that clients must bring (default: none)")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="whose pages may call; may be repeated")
    add("--log-prompts", action="store_true", help="write prompts into the log")
    cli.add_limits(parser.add_argument_group("limits"), requests=1024, queue=1024, whose="client")
    add("--request-seconds", type=cli.seconds, default=600.0, help="of an answer (default: %(default)s)")
    add(
        "--drain-seconds",
        type=cli.seconds,
        default=30.0,
        help="that answers under way have to end when the server stops (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def options_of(given: argparse.Namespace) -> Options:
    """What the command line allows."""
    return Options(
        limits=cli.limits_of(given),
        api_key=given.api_key,
        model_name=given.served_model_name,
        request_seconds=given.request_seconds,
        cors=given.cors,
        log_prompts=given.log_prompts,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        cli.check_address(given.host, given.port)
        print(f"Loading {given.model} ...", flush=True)
        live = cli.load(given, trace_steps=1)
    except cli.StartError as error:
        print(f"labkit.server: {error}", file=sys.stderr)
        return 2
    with live:
        app = create_app(live, options_of(given))
        config = uvicorn.Config(
            app,
            host=given.host,
            port=given.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        _Draining(config, app.state.server, given.drain_seconds).run()
    return 0
