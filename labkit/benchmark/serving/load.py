"""A client that puts a server under load and measures its answers. The server must speak OpenAI's API.

    measures = load.run(url, arrivals.poisson(tokenizer, rate=2, seconds=20))
    print(client_measures.summary(measures))

An open loop sends each request at its time, whether or not others are answered. Independent people do the
same, and a server that is too slow gets a queue. A closed loop has a number of clients, each of which sends
the next request once the last is answered: it slows down with the server, and so hides what waiting costs.
Times count from when a request was due, and not from when a busy client came to send it.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

import httpx

from labkit.analysis.client_measures import Measure
from labkit.benchmark.serving.arrivals import Arrival
from labkit.sampling_params import check_number
from labkit.serving.aside import aside

EXTRAS: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_KEEP_ALIVE = 1.0  # seconds: far below the 5 after which uvicorn closes a connection that we might just take
_GONE = "not sent: the server could not be reached any more"


class ServerError(RuntimeError):
    """There is no server to put under load. The message says what was asked, and what came back."""


def run(
    url: str,
    arrivals: Iterable[Arrival],
    *,
    clients: int | None = None,
    seconds: float | None = None,
    model: str | None = None,
    extras: Mapping[str, Any] = EXTRAS,
    patience: float = 600.0,
    tell: Callable[[Measure], None] = lambda measure: None,
) -> list[Measure]:
    """Send requests to a server and measure its answers. Works in a notebook, where an event loop runs.

    If a request goes wrong, its measure says so. Once the server cannot be reached at all, nothing more is
    sent.

    Args:
        url: The address of the server, without `/v1`.
        arrivals: The requests. In an open loop (`clients` is None) each is sent at its time.
        clients: The number of clients in a closed loop, which ignores the times of the arrivals.
        seconds: The time after which a closed loop sends nothing more (None: everything is sent).
        model: The name of the model; None is the first that the server names.
        extras: Fields that not every server knows. If `ignore_eos` is among them, an answer must have as many
            tokens as were asked for, or that is an error.
        patience: The seconds that a client waits for the next piece of its answer.
        tell: A function that is called with each measure once it is complete.

    Returns:
        The measures, in the order in which the requests were due.

    Raises:
        ValueError: If an argument makes no sense.
        ServerError: If there is no server, or it names no model.
    """
    check_number("patience", patience, 1e-3, math.inf)
    if clients is not None:
        check_number("clients", clients, 1, 100_000, whole=True)
    if seconds is not None:
        check_number("seconds", seconds, 0, math.inf)
        if clients is None:
            raise ValueError("seconds goes with clients: an open loop ends with its last arrival")

    async def load() -> list[Measure]:
        async with _connect(patience) as client:
            crowd = _Crowd(client, url, model or await _first_model(client, url), extras, tell)
            if clients is None:
                await crowd.open(arrivals)
            else:
                await crowd.closed(iter(arrivals), clients, math.inf if seconds is None else seconds)
            return crowd.measures

    return _outside(load())


class _Crowd:
    """All clients of one run."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        model: str,
        extras: Mapping[str, Any],
        tell: Callable[[Measure], None],
    ) -> None:
        self.measures: list[Measure] = []
        self._client, self._url, self._tell = client, f"{url.rstrip('/')}/v1/completions", tell
        self._body = {"model": model, "temperature": 0, "stream": True, **extras}
        self._gone = False
        begin = time.perf_counter()
        self._clock = lambda: time.perf_counter() - begin

    async def open(self, arrivals: Iterable[Arrival]) -> None:
        """Send each request at its time."""
        asking = []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, arrival.at - self._clock()))
            measure = Measure(arrival.at, arrival.max_tokens)
            self.measures.append(measure)
            if self._gone:
                measure.error, measure.end = _GONE, self._clock()
                self._tell(measure)
            else:
                asking.append(asyncio.create_task(self._ask(arrival, measure)))
        await asyncio.gather(*asking)

    async def closed(self, arrivals: Iterator[Arrival], clients: int, seconds: float) -> None:
        """Let each client send the next request once its last one is answered."""

        async def one() -> None:
            while not self._gone and self._clock() < seconds and (arrival := next(arrivals, None)):
                self.measures.append(Measure(self._clock(), arrival.max_tokens))
                await self._ask(arrival, self.measures[-1])

        await asyncio.gather(*(one() for _ in range(clients)))

    async def _ask(self, arrival: Arrival, measure: Measure) -> None:
        """Send one request and follow its answer."""
        body = self._body | {"prompt": arrival.prompt, "max_tokens": arrival.max_tokens}
        measure.sent = self._clock()
        try:
            async with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code == 200:
                    await follow(response.aiter_lines(), measure, self._clock)
                else:
                    measure.error = f"HTTP {response.status_code}: {_reason(await response.aread())}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._gone = self._gone or isinstance(error, httpx.ConnectError)
            measure.error = f"{type(error).__name__}: {error}".removesuffix(": ")
        exact = measure.counted and "ignore_eos" in self._body
        if exact and not measure.error and measure.tokens != measure.asked:
            measure.error = f"{measure.tokens} tokens came, and {measure.asked} were asked for"
        if math.isnan(measure.end) or measure.error:
            measure.end = self._clock()
        self._tell(measure)


async def follow(lines: AsyncIterator[str], measure: Measure, clock: Callable[[], float]) -> None:
    """Read a stream of server-sent events to its end, and note in a measure what came when.

    The stream need not say how many tokens it brought. It must end with [DONE] or a finish reason, or the
    answer is an error.
    """
    pieces: list[str] = []
    done = False
    try:
        async for line in lines:
            if not line.startswith("data:"):
                continue
            now, data = clock(), line[5:].strip()
            if data == "[DONE]":
                done = True
                continue
            try:
                part = json.loads(data)
                if "error" in part:
                    measure.error = _message(part["error"])
                    continue
                for choice in part.get("choices") or ():
                    if choice.get("text"):
                        pieces.append(choice["text"])
                        measure.times.append(now)
                    done = done or bool(choice.get("finish_reason"))
                if usage := part.get("usage"):
                    measure.tokens, measure.counted = usage["completion_tokens"], True
            except (ValueError, LookupError, TypeError, AttributeError):
                measure.error = f"the stream holds what is no completion: {data[:80]}"
                continue
            measure.end = now
    finally:
        measure.text = "".join(pieces)
        if not measure.counted:
            measure.tokens = len(pieces)
    if not done:
        measure.error = measure.error or "the stream ended before the answer did"
    elif not measure.tokens:
        measure.error = measure.error or "the answer has no token"
    elif not measure.times:
        measure.times.append(measure.end)  # nothing but special tokens, which have no text


def _message(error: object) -> str:
    """The words of an error, in OpenAI's format or any other."""
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


def _reason(body: bytes) -> str:
    """The words of an error that came instead of an answer."""
    try:
        answer = json.loads(body)
        return _message(answer.get("error") or answer.get("detail") or answer)[:200]
    except (ValueError, AttributeError):
        return body[:200].decode(errors="replace").strip()


# -- what a server knows -----------------------------------------------------------------------------


def supported(url: str, model: str | None = None) -> tuple[str, dict[str, Any]]:
    """The model that a server names first, if none is given, and those of `EXTRAS` that it takes.

    Raises:
        ServerError: If it answers no completion.
    """
    named = model or _outside(_named(url))
    for extras in (EXTRAS, {"stream_options": EXTRAS["stream_options"]}, {}):
        (measure,) = run(url, [Arrival(0.0, "The sea is", 4)], model=named, extras=extras)
        if not measure.error:
            return named, dict(extras)
    raise ServerError(f"{url} answers no completion of model {named!r}: {measure.error}")


async def _named(url: str) -> str:
    async with _connect(60.0) as client:
        return await _first_model(client, url)


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    where = f"{url.rstrip('/')}/v1/models"
    try:
        response = await client.get(where)
        return response.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{where} does not answer: {str(error) or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"{where} names no model: {response.text[:80]!r}") from None


def _connect(patience: float) -> httpx.AsyncClient:
    """A client with as many connections as there are streams, and no proxy."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE)
    timeout = httpx.Timeout(None, connect=60, read=patience)
    return httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)


def _outside(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, on a thread of its own where an event loop already runs on this one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def begin() -> Any:
        begun.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await work

    def stop() -> None:
        for loop, task in begun:
            loop.call_soon_threadsafe(task.cancel)

    return aside(lambda: asyncio.run(begin()), stop)
