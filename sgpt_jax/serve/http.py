"""What every route does around its work: the key, the body within its limits, errors, counting, callers who leave."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sgpt_jax.serve.errors import ApiError, where
from sgpt_jax.serve.metrics import Metrics

logger = logging.getLogger(__name__)

# Escapes of lone surrogates, and as group 1 what only looks like them: a pair, a backslash that is escaped itself.
_SURROGATES = re.compile(
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\[^u])|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
# What is read of a body that is too large, so that its sender comes to read the answer.
_DISCARD_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        api_key: what callers have to send, or None.
        body_bytes: the largest body.
        body_seconds: how long a body may take to come.
    """

    api_key: str | None = None
    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0


def dumps(value: Any) -> bytes:
    """JSON, also of numpy arrays; float32 keep their shortest decimals."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with JSON."""
    return Response(dumps(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's wrapper."""
    return json_response(error.body(), error.status, error.headers)


class Door:
    """Wraps the work of routes."""

    def __init__(self, limits: Limits, metrics: Metrics, ready: Callable[[], bool]) -> None:
        self._limits, self._metrics, self._ready = limits, metrics, ready

    def post(
        self, route: str, work: Callable[[Any, str], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint: reads the JSON body and passes it, and who calls, to the work."""

        async def answer(request: Request) -> Response:
            self._check_key(request)
            if not self._ready():
                raise ApiError(503, "the server is not ready", code="not_ready", retry_after=2)
            body = await self._read_json(request)
            caller = request.client.host if request.client else ""
            return await _while_there(request, work(body, caller))

        return self._guarded(route, answer)

    def get(
        self, route: str, work: Callable[[Request], Response], needs_ready: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint without a body."""

        async def answer(request: Request) -> Response:
            self._check_key(request)
            if needs_ready and not self._ready():
                raise ApiError(503, "the server is not ready", code="not_ready", retry_after=2)
            return work(request)

        return self._guarded(route, answer)

    def _guarded(
        self, route: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            begin, number = time.perf_counter(), uuid.uuid4().hex
            try:
                response = await answer(request)
            except ApiError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except asyncio.CancelledError:  # by uvicorn alone, when the time to drain is over
                response = error_response(
                    ApiError(503, "the server has stopped", code="stopping", retry_after=1)
                )
            except Exception as error:
                logger.error("request %s to %s failed: %s", number, route, where(error))
                response = error_response(ApiError(500, "the server failed", retry=False))
            response.headers["x-request-id"] = number
            self._metrics.requests.labels(route, response.status_code).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)
            return response

        return endpoint

    def _check_key(self, request: Request) -> None:
        key = self._limits.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Browsers send Latin-1, as which the header was read; other clients send UTF-8.
        sent = [given.strip(" \t").encode(code) for code in ("utf-8", "latin-1")]
        wanted = key.encode("utf-8", "surrogateescape")
        same = [hmac.compare_digest(one, wanted) for one in sent]
        if scheme.lower() != "bearer" or not any(same):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _read_json(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Other kinds can be sent by any web page that its visitor opens, without asking this server first.
            raise ApiError(415, "the content type is to be application/json", code="unsupported_media_type")
        body, size, begin = bytearray(), 0, time.perf_counter()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= self._limits.body_bytes:
                        body += piece
                    elif time.perf_counter() - begin > _DISCARD_SECONDS:
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._limits.body_seconds:g} seconds", code="too_slow"
            ) from None
        if size > self._limits.body_bytes:
            raise ApiError(
                413, f"the body has more than {self._limits.body_bytes} bytes", code="request_too_large"
            )
        try:
            return _loads(body)
        except orjson.JSONDecodeError as error:
            # Its message names the place and the kind of error, nothing of the body.
            raise ApiError(400, f"the body is not JSON: {error.msg}", code="invalid_json") from None


def _loads(body: bytearray) -> Any:
    """JSON with lone surrogates, which orjson refuses, as U+FFFD: where a caller cut an emoji in two, for one."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "surrogate" not in error.msg:
            raise
        return orjson.loads(_SURROGATES.sub(lambda found: found[1] or rb"\ufffd", body))


async def _while_there(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Does the work for as long as the caller waits for it.

    Raises:
        ClientDisconnect: the caller has left; the work was cancelled.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
