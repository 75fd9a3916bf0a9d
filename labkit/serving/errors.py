"""What the API answers when it refuses or fails: errors in OpenAI's shape, with their HTTP statuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from labkit.serving.asgi import ClientGone

STATUSES: tuple[int | str, ...] = (400, 401, 404, 413, 422, 429, 500, 503, 504)  # of calls
_LONGEST_VALUE = 60  # characters of a value in a message
_LONGEST_TEXT = 1000  # characters of a message: it may repeat what was sent


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        message: a sentence for the sender that names the field and the limit.
        param: the name of the field, if the error is about one.
        code: one word for programs.
        retry_after: the number of seconds after which another try makes sense; 0 if none does.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str = "", retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code or None
        self.retry_after = retry_after


def too_long(longest: int, message: str, param: str) -> RequestError:
    """The error for a prompt that is too long, with OpenAI's code and the words that clients look for."""
    words = f"This model's maximum context length is {longest} tokens. {message}"
    return RequestError(400, words, param=param, code="context_length_exceeded")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The JSON that `error_object` writes, as the schema of the API describes it."""

    error: ErrorDetail


def error_object(error: RequestError) -> dict[str, Any]:
    """An error as the protocol writes it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    param = None if error.param is None else _sendable(error.param)
    return {"error": {"message": _sendable(error.message), "type": kind, "param": param, "code": error.code}}


def _sendable(text: str) -> str:
    """Text that UTF-8 can carry (no half surrogate pairs), and not too long."""
    cut = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()


def explain(mistakes: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str]:
    """What pydantic found wrong, as the name of the field and a sentence: where, what is allowed, what came.

    Where a field may be of several kinds, pydantic reports a mistake for each kind, under the kind's name.
    Those count that come furthest: in a list that could be text, the wrong item, and not that it is no text.
    """
    found = [(_place(mistake, body), mistake) for mistake in mistakes]
    place = max((place for place, _ in found), key=_how_far)
    here = [mistake for other, mistake in found if other == place]
    here = [mistake for mistake in here if not mistake["type"].endswith(("_type", "literal_error"))] or here
    wanted = "input should be "
    texts = list(dict.fromkeys(f"{m['msg'][0].lower()}{m['msg'][1:]}" for m in here))
    if "input should be a valid number" in texts:  # which a whole number is too
        texts = [text for text in texts if text != "input should be a valid integer"]
    said = " or ".join([texts[0], *(text.removeprefix(wanted) for text in texts[1:])])
    came = f", not {_shown(here[0]['input'])}" if said.startswith(wanted) else ""
    return str(place[0]), f"{'.'.join(map(str, place))}: {said}{came}"


def _place(mistake: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body a mistake is: the names of kinds are left out of pydantic's own path."""
    path = [part for part in mistake["loc"] if part != "body"]
    place: list[str | int] = []
    for part in path:
        held = range(len(body)) if isinstance(body, list) else body if isinstance(body, dict) else ()
        if part in held:
            body = body[part]
        elif mistake["type"] != "missing" or part != path[-1]:
            continue
        place.append(part)
    return tuple(place) or (path[0],)


def _how_far(place: tuple[str | int, ...]) -> tuple[int, list[int]]:
    return len(place), [part for part in place if isinstance(part, int)]


def _shown(value: Any) -> str:
    """A value as JSON, or what kind it is of, for one that is too long to repeat."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        value = value[:_LONGEST_VALUE] + "..."
    return json.dumps(value)


def answer_errors(app: FastAPI) -> None:
    """Have all errors of an app answered in OpenAI's shape."""

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
        return Response(status_code=499)  # nginx's number; nobody reads it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = respond(RequestError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})  # with 405, the methods that are allowed
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
        path, message = explain(error.errors(), error.body)
        return respond(RequestError(422, message, param=path))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(RequestError(500, "the server failed; its log says how", code="internal_error"))
