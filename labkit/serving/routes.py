"""OpenAI's API as an ASGI app: each route parses, calls the handler and responds."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.background import BackgroundTask

from labkit.serving.asgi import EVENT_HEADERS, BodyLimit, EventStream, unless_gone
from labkit.serving.async_engine import AsyncEngine
from labkit.serving.errors import STATUSES, ErrorAnswer, RequestError, answer_errors
from labkit.serving.handler import Handler, OnRequest, Options
from labkit.serving.schema import Body, ChatBody, CompletionBody
from labkit.serving.stream import ChatFormat, CompletionFormat, Format


def create_app(
    engine: AsyncEngine | Callable[[], AsyncEngine],
    options: Options | None = None,
    *,
    on_request: OnRequest | None = None,
) -> FastAPI:
    """The API as an ASGI app. Its `state.handler` is the `Handler` behind it.

    Args:
        engine: the engine to serve, or a function that returns the one that runs now.
        options: what is allowed.
        on_request: see `Handler`.
    """
    options = options or Options()
    handler = Handler((lambda: engine) if isinstance(engine, AsyncEngine) else engine, options, on_request)
    handler.metrics.follow(handler.engine())
    app = FastAPI(title="labkit", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    app.state.handler = handler
    if options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],  # a page reads no other of ours
            max_age=600,
        )
    app.add_middleware(BodyLimit, limit=options.body_bytes)
    answer_errors(app)
    guard = [Depends(_key_check(options.api_key))] if options.api_key else []
    error: dict[str, Any] = {"description": "An error in OpenAI's shape.", "model": ErrorAnswer}
    calls: dict[int | str, dict[str, Any]] = dict.fromkeys(STATUSES, error) | {
        200: {"description": "The answer.", "content": {"text/event-stream": {}}}
    }

    @app.post("/v1/completions", dependencies=guard, responses=calls)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a prompt."""
        return await _respond(handler, request, body, CompletionFormat)

    @app.post("/v1/chat/completions", dependencies=guard, responses=calls)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, in the model's own chat format."""
        return await _respond(handler, request, body, ChatFormat)

    @app.head("/v1/models", dependencies=guard, include_in_schema=False)
    @app.get("/v1/models", dependencies=guard, responses={401: error})
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(handler)]}

    @app.head("/v1/models/{name:path}", dependencies=guard, include_in_schema=False)
    @app.get("/v1/models/{name:path}", dependencies=guard, responses={401: error, 404: error})
    async def model(name: str) -> dict[str, Any]:
        """The model of that name."""
        if name != handler.model_name:
            raise handler.not_served(name)
        return _model(handler)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "Requests are not taken in."}})
    async def health() -> Response:
        """Whether requests are taken in."""
        live = handler.engine()
        state = "draining" if handler.draining else "failed" if live.failure else "ok"
        body = {"status": state, "model": handler.model_name, "requests": live.num_unfinished}
        return JSONResponse(body, 200 if state == "ok" else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        handler.metrics.follow(handler.engine())
        return Response(handler.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _respond(handler: Handler, request: Request, body: Body, write: type[Format]) -> Response:
    call = await handler.start(body, request.client.host if request.client else "", write)
    headers = {"X-Request-Id": ",".join(call.request_ids)}
    if body.stream:
        end = BackgroundTask(handler.finish, call)
        return EventStream(handler.events(call), headers=headers | EVENT_HEADERS, background=end)
    try:
        answer = await unless_gone(request.receive, handler.whole(call))
    finally:
        await handler.finish(call)
    return JSONResponse(answer, headers=headers)


def _model(handler: Handler) -> dict[str, Any]:
    return {
        "id": handler.model_name,
        "object": "model",
        "created": handler.created,
        "owned_by": "labkit",
        "max_model_len": handler.engine().engine.max_model_len,
    }


def _key_check(key: str) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        good = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())  # in constant time
        if scheme.lower() != "bearer" or not good:
            raise RequestError(
                401, "a valid API key is needed: Authorization: Bearer ...", code="invalid_api_key"
            )

    return check
