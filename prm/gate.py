"""What stands around the routes of `prm serve`: token, size limit, meters, and who still waits."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)
from prometheus_client import generate_latest as prometheus_text
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from prm.batching import BatchReport

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTES = ("/score", "/health", "/metrics")
_OPEN = ("/health",)
"""Routes that need no token, so that a load balancer can ask."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)


class Meters:
    """What one server counts, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # processor time, memory, open files
        self._requests = Counter(
            "prm_requests", "Requests answered", ["route", "status"], registry=self._registry
        )
        self._request_seconds = Histogram(
            "prm_request_seconds",
            "Time from request to answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._trajectories = Counter(
            "prm_trajectories", "Trajectories scored", registry=self._registry
        )
        self._tokens = Counter(
            "prm_tokens", "Tokens scored, without padding", registry=self._registry
        )
        self._busy_seconds = Counter(
            "prm_scoring_seconds", "Time spent in scoring", registry=self._registry
        )
        self._batch_tokens = Histogram(
            "prm_batch_tokens",
            "Tokens scored together",
            buckets=_TOKENS,
            registry=self._registry,
        )
        self._dropped = Counter(
            "prm_dropped_trajectories",
            "Trajectories not scored because their client had left",
            registry=self._registry,
        )
        self._waiting = Gauge(
            "prm_waiting_trajectories", "Trajectories that wait", registry=self._registry
        )

    def watch(self, waiting: Callable[[], int]) -> None:
        """Say where the number of waiting trajectories is read."""
        self._waiting.set_function(waiting)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def batch(self, report: BatchReport) -> None:
        """Count a scored batch."""
        self._trajectories.inc(report.trajectories)
        self._tokens.inc(report.tokens)
        self._busy_seconds.inc(report.seconds)
        self._batch_tokens.observe(report.tokens)

    def dropped(self, trajectories: int) -> None:
        """Count trajectories that nobody waits for any more."""
        self._dropped.inc(trajectories)

    def text(self) -> bytes:
        """Return everything in the text format of Prometheus."""
        return prometheus_text(self._registry)


async def client_left(request: Request) -> None:
    """Wait until the client has closed its connection; to be called once the body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Middleware: refuses before anything is read or parsed, and times what passes.

    Parameters
    ----------
    app : ASGI application
        What stands behind.
    meters : Meters
        Where requests are counted.
    token : str or None
        What requests must carry, except those of `_OPEN`.
    max_bytes : int
        Largest body.
    """

    def __init__(self, app: ASGIApp, *, meters: Meters, token: str | None, max_bytes: int) -> None:
        self._app, self._meters, self._max_bytes = app, meters, max_bytes
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, noting)
            else:
                await self._app(scope, self._bounded(receive), noting)
        finally:
            route = scope["path"] if scope["path"] in _ROUTES else "other"
            self._meters.request(route, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        """Refuse by what the header says."""
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in _OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self._token)
            if not right or scheme.lower() != b"bearer":
                return JSONResponse(
                    {"detail": "the bearer token is missing or wrong"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return JSONResponse({"detail": self._too_large()}, 413)
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """Count what arrives of a body whose length nobody announced."""
        arrived = 0

        async def counting() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counting

    def _too_large(self) -> str:
        """Say what the limit is."""
        return f"the body is larger than {self._max_bytes:,} bytes: send it in several requests"
