"""``prm serve``: scores over HTTP.

``POST /score`` takes trajectories, as records or as one conversation in OpenAI messages, and
answers their step scores; ``GET /health`` says what is served, ``GET /metrics`` is for Prometheus.
Requests that arrive together share forward passes (`prm.batching`); who may ask and how much stands
in `prm.gate`. What a client that leaves has waiting is not scored. Everything is kept per
application, so several can live in one process.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from starlette.requests import Request

from prm.batching import QueueClosed, QueueFull, ScoringQueue
from prm.gate import Gate, Meters, client_left
from prm.metrics import Array
from prm.model import Device
from prm.remote import TOKEN_VARIABLE
from prm.rendering import Rendered
from prm.score import Scorer, aggregate
from trajectory.codec import from_json, to_json
from trajectory.errors import InputError
from trajectory.formats import from_messages
from trajectory.records import JsonValue, StepScores, Task, Trajectory

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a process reward model over HTTP."""

    prm: Path
    """Folder that `prm train` wrote."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines ask."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    token_file: Path | None = None
    """File with the bearer token that requests must carry; None reads the environment variable
    TOOLPRM_SERVER_TOKEN, and asks for no token if that is not set."""
    batch_tokens: int = 8192
    """Tokens of waiting trajectories that are scored together."""
    max_waiting: int = 512
    """Trajectories that may wait; beyond that, requests are answered 429 with Retry-After."""
    max_request_mb: float = 8.0
    """Largest request body, megabytes; larger ones are answered 413."""
    drain_s: float = 30.0
    """Seconds that running requests get to finish when the server ends."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError("--port must lie between 0 and 65535")
        for name in ("batch_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if not self.max_request_mb > 0 or not self.drain_s > 0:
            raise InputError("--max-request-mb and --drain-s must be positive")


class ScoreRequest(BaseModel):
    """Body of ``POST /score``: either ``trajectories`` or ``messages``."""

    model_config = ConfigDict(extra="forbid")

    trajectories: list[dict[str, Any]] | None = None
    """Trajectory records, as in ``trajectories.jsonl``."""
    messages: list[dict[str, Any]] | None = None
    """One conversation in OpenAI messages with ``tool_calls``; the user's text is the task."""
    trajectory_id: str = Field(default="request", min_length=1)
    """Id of the conversation in the answer."""
    calibrated: bool = True
    """Whether to apply the checkpoint's calibration."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.trajectories is None) == (self.messages is None):
            raise ValueError("give either 'trajectories' or 'messages'")
        return self


class ScoreResponse(BaseModel):
    """Answer of ``POST /score``, in the order of the request."""

    scores: list[dict[str, Any]]
    """`StepScores` records: one value per prefix 0..S, and per step one for each of its calls."""
    aggregates: list[float]
    """One number per trajectory, by ``aggregation``."""
    aggregation: str
    """The checkpoint's default."""


class _FieldError(Exception):
    """A body that is JSON of the right shape, but one of whose fields is wrong."""

    def __init__(self, place: Sequence[str | int], message: str) -> None:
        self.place = ["body", *place]
        super().__init__(message)


class _ClientLeft(Exception):
    """Nobody waits for the answer."""


class _Service:
    """What the routes need: the model, its queue, and one thread that tokenises."""

    def __init__(self, scorer: Scorer, config: ServeConfig, meters: Meters) -> None:
        self.scorer, self._meters = scorer, meters
        self.queue = ScoringQueue(
            scorer.margins,
            batch_tokens=config.batch_tokens,
            max_waiting=config.max_waiting,
            report=meters.batch,
        )
        # One thread: a fast tokenizer is not safe to use from several.
        self._tokenising = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenising")
        self._rendering = 0

    async def score(self, body: ScoreRequest, left: asyncio.Future[None]) -> ScoreResponse:
        """Answer one request, unless its client leaves (``left`` is done) before that."""
        trajectories = read_trajectories(body)
        rendered = await self._render(trajectories)
        name = "messages" if body.trajectories is None else "trajectories"
        try:
            self.scorer.check_lengths(trajectories, rendered)
        except InputError as error:
            raise _FieldError([name], str(error)) from None
        margins = await self._margins(rendered, left)
        scores = [
            self.scorer.scores_of(trajectory, row, margins_P, calibrated=body.calibrated)
            for trajectory, row, margins_P in zip(trajectories, rendered, margins, strict=True)
        ]
        aggregation = self.scorer.metadata.aggregation
        return ScoreResponse(
            scores=[dict(to_json(s)) for s in scores],
            aggregates=[aggregate(_scored_steps(s), aggregation) for s in scores],
            aggregation=aggregation,
        )

    async def _margins(
        self, rendered: Sequence[Rendered], left: asyncio.Future[None]
    ) -> list[Array]:
        """Queue the trajectories of a request and wait for their log-odds."""
        if left.done():
            self._meters.dropped(len(rendered))
            raise _ClientLeft
        future = self.queue.submit(rendered)
        scored = asyncio.wrap_future(future)
        try:
            await asyncio.wait((scored, left), return_when=asyncio.FIRST_COMPLETED)
            if not scored.done():
                raise _ClientLeft
        finally:
            if not scored.done():  # also when the server cuts the request off
                self._meters.dropped(self.queue.give_up(future))
        return scored.result()

    async def _render(self, trajectories: Sequence[Trajectory]) -> list[Rendered]:
        """Tokenise, unless the queue is full anyway."""
        count = len(trajectories)
        self.queue.check_room(count, ahead=self._rendering)
        self._rendering += count
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._tokenising, self.scorer.render, trajectories)
        finally:
            self._rendering -= count

    def close(self) -> None:
        """Score what waits and end the threads."""
        self.queue.close()
        self._tokenising.shutdown()


def _scored_steps(scores: StepScores) -> Sequence[float]:
    """Return the scores that count for the trajectory: those of its steps, or the prompt's."""
    return scores.values[1:] or scores.values


def read_trajectories(body: ScoreRequest) -> list[Trajectory]:
    """Read the trajectories of a request.

    Raises
    ------
    _FieldError
        Naming the field that is wrong.
    """
    if body.messages is not None:
        prompts = [_text(m.get("content")) for m in body.messages if m.get("role") == "user"]
        if not prompts:
            raise _FieldError(["messages"], "there is no user message, which states the task")
        task = Task(task_id=body.trajectory_id, domain="", prompt="\n".join(prompts), answer="")
        try:
            trajectory_id = body.trajectory_id
            return [from_messages(body.messages, trajectory_id=trajectory_id, task=task)]
        except ValueError as error:
            raise _FieldError(["messages"], str(error)) from None
    trajectories = []
    for number, record in enumerate(body.trajectories or []):
        try:
            trajectories.append(from_json(Trajectory, record))
        except ValueError as error:
            raise _FieldError(["trajectories", number], str(error)) from None
    return trajectories


def _text(content: JsonValue) -> str:
    """Return the text of a message's content, text or a list of text parts."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def create_app(scorer: Scorer, config: ServeConfig, *, token: str | None = None) -> FastAPI:
    """Make the application.

    Parameters
    ----------
    scorer : Scorer
        What is served.
    config : ServeConfig
        Its limits; the addresses play no part.
    token : str, optional
        What requests must carry as ``Authorization: Bearer``; None asks for nothing.

    Returns
    -------
    FastAPI
        Its threads run from now until the application's shutdown.
    """
    from fastapi import FastAPI, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    meters = Meters()
    service = _Service(scorer, config, meters)
    meters.watch(lambda: service.queue.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="prm serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate, meters=meters, token=token, max_bytes=int(config.max_request_mb * 1_000_000)
    )

    @app.post("/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        left = asyncio.create_task(client_left(request))
        try:
            return await service.score(body, left)
        finally:
            left.cancel()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return describe(scorer)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(meters.text(), media_type=meters.content_type)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: object, error: RequestValidationError) -> JSONResponse:
        found = [{"loc": list(e["loc"]), "msg": e["msg"]} for e in error.errors()]
        return JSONResponse({"detail": found}, 422)

    @app.exception_handler(_FieldError)
    async def wrong_field(_: object, error: _FieldError) -> JSONResponse:
        return JSONResponse({"detail": [{"loc": error.place, "msg": str(error)}]}, 422)

    @app.exception_handler(QueueFull)
    async def full(_: object, error: QueueFull) -> JSONResponse:
        sentence = f"{error}: try again in {error.retry_after_s} s"
        return JSONResponse({"detail": sentence}, 429, {"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(QueueClosed)
    async def closed(_: object, error: QueueClosed) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})

    @app.exception_handler(_ClientLeft)
    async def unheard(_: object, __: _ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it: for the count of requests by status

    return app


def describe(scorer: Scorer) -> dict[str, JsonValue]:
    """Say what is served."""
    metadata = scorer.metadata
    return {
        "status": "ok",
        "server": "prm serve",
        "checkpoint": scorer.checkpoint_hash,
        "head": metadata.head,
        "kind": metadata.kind,
        "position": metadata.position,
        "aggregation": metadata.aggregation,
        "max_tokens": scorer.max_length,
    }


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests are answered first.

    Raises
    ------
    InputError
        If the checkpoint is unusable, the address is taken, or the token file is empty.
    """
    import uvicorn

    token = read_token(config)
    scorer = Scorer.load(config.prm, device=config.device)
    listening = _listen(config)
    console = Console(stderr=True, highlight=False)
    host, port = listening.getsockname()[:2]
    console.print(
        f"serving {config.prm} at http://{host}:{port} (POST /score, GET /health, GET /metrics; "
        f"{'with' if token else 'without'} a token); Ctrl-C ends it",
        soft_wrap=True,
    )
    if token is None and not config.host.startswith("127.") and config.host != "localhost":
        console.print(
            f"anyone who reaches {config.host} may use it: set {TOKEN_VARIABLE} or give "
            "--token-file",
            soft_wrap=True,
        )
    app = create_app(scorer, config, token=token)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(1, round(config.drain_s)),
        )
    )
    _run(server, listening)
    console.print("ended")


def _run(server: uvicorn.Server, listening: socket.socket) -> None:
    """Run a server; the signal that ends it is no error once it has ended in order."""
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        if server.force_exit:
            raise


def read_token(config: ServeConfig) -> str | None:
    """Read the bearer token from its file or from the environment, never from the command line.

    Raises
    ------
    InputError
        If the file is missing or empty, or the variable is set but empty.
    """
    if config.token_file is not None:
        try:
            token, place = config.token_file.read_text().strip(), str(config.token_file)
        except FileNotFoundError:
            raise InputError(f"the token file {config.token_file} does not exist") from None
    elif TOKEN_VARIABLE in os.environ:
        token, place = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if not token:
        raise InputError(f"{place} holds no token: write one into it, or leave it out")
    return token


def _listen(config: ServeConfig) -> socket.socket:
    """Take the address."""
    try:
        return socket.create_server((config.host, config.port), backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}): give another "
            "--host or --port"
        ) from error
