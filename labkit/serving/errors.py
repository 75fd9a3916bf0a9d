"""What the API answers when it refuses or fails: errors in OpenAI's shape, with their HTTP statuses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from labkit.serving.asgi import ClientGone

STATUSES: tuple[int | str, ...] = (400, 401, 404, 413, 422, 429, 500, 503, 504)  # of calls
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
        message = f"{'.'.join(place)}: {first['msg'][0].lower()}{first['msg'][1:]}"
        return respond(RequestError(422, message, param=place[0]))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(RequestError(500, "the server failed; its log says how", code="internal_error"))
