"""The HTTP engine: a policy that several vLLM servers serve, token ids in and out.

Which server gets a request is decided in `agent.engines.fleet`; servers are tried and watched in
`agent.engines.tending`; what goes over the wire stands in `agent.engines.client` and
`agent.engines.completions`. Here a request goes from server to server until one answers.

Everything happens on an event loop of its own in a background thread, because commands start
several loops one after the other, and servers are to be watched also while a tool runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from agent.engines.base import (
    EngineError,
    EngineOptions,
    EngineStats,
    GenerateRequest,
    Generation,
)
from agent.engines.checks import check_options, check_request
from agent.engines.completions import RequestRefused, ServerFault
from agent.engines.fleet import Seat, backoff_s
from agent.engines.loading import load_config
from agent.engines.servers import Servers
from trajectory.errors import InputError

if TYPE_CHECKING:
    from agent.engines.client import Client
    from agent.engines.tending import TendedFleet

T = TypeVar("T")

_ATTEMPTS = 4
"""Servers that may fail at one request before it is given up: it may be what breaks them."""
_BUSY_ATTEMPTS = 60
"""The same for servers that only have too much to do."""
_PREFIX = 256
"""Ids of a prompt that stand for its prefix where the request names no affinity."""
_SPARE_CONNECTIONS = 4
"""Connections per server beyond those of requests, for signs of life and trials."""


class HttpEngine:
    """Have a policy served by vLLM 0.32 servers that somebody started.

    Parameters
    ----------
    options : EngineOptions
        ``policy`` gives the vocabulary; ``max_batch`` requests are in flight at most;
        ``max_context`` is lowered to what the policy was made for.
    servers : Servers
        Where they are, and how long to wait for them.

    Raises
    ------
    InputError
        If no server works in time, they serve different models or not as this needs it, a setting
        is theirs to make, or aiohttp is not installed.

    Notes
    -----
    A request that fails on a server goes to another with the same id and the same seed. What the
    first had already sent is dropped, and the sample is drawn again from the same distribution.
    That it is the same sample is not promised: servers differ in batches, kernels and cards.
    """

    name = "http"

    def __init__(self, options: EngineOptions, servers: Servers) -> None:
        check_options(options)
        if importlib.util.find_spec("aiohttp") is None:
            raise InputError(
                "the http engine needs aiohttp, which is not installed: install this package with "
                "the extra 'http'"
            )
        if options.device != "auto" or options.dtype != "auto":
            raise InputError(
                "--device and --dtype do not apply to --engine http: they are the servers' to set"
            )
        text_config = load_config(options.policy).get_text_config()
        longest = getattr(text_config, "max_position_embeddings", None) or options.max_context
        self.policy = options.policy
        self.revision = ""
        self.max_context = min(options.max_context, longest)
        self.stats = EngineStats()
        self._vocabulary: int = text_config.vocab_size
        self._servers = servers
        self._slots = asyncio.Semaphore(options.max_batch)
        self._client: Client | None = None
        self._fleet: TendedFleet | None = None
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="http-engine", daemon=True
        )
        self._thread.start()
        try:
            self.revision = self._submit(self._open(options.max_batch)).result()
        except BaseException:
            self._shut_down()
            raise

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one turn; see `agent.engines.base.Engine.generate`."""
        if self._closed:
            raise EngineError("the engine is closed")
        check_request(request, max_context=self.max_context, vocabulary=self._vocabulary)
        try:
            return await asyncio.wrap_future(self._submit(self._generate(request)))
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed") from None
            raise

    async def close(self) -> None:
        """Drop every connection; pending requests end with `EngineError`."""
        await asyncio.to_thread(self._shut_down)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self, max_batch: int) -> str:
        """Find the servers; return the model they serve."""
        from agent.engines.client import Client
        from agent.engines.tending import TendedFleet

        spare = _SPARE_CONNECTIONS * len(self._servers.urls)
        self._client = Client(connections=max_batch + spare, timeout_s=self._servers.timeout_s)
        self._fleet = TendedFleet(
            self._servers,
            self._client,
            vocabulary=self._vocabulary,
            max_context=self.max_context,
        )
        return await self._fleet.open()

    async def _generate(self, request: GenerateRequest) -> Generation:
        """Send a request from server to server until one answers."""
        assert self._fleet is not None
        affinity = request.affinity or repr(request.prompt_ids[:_PREFIX])
        faults: list[str] = []
        busy = 0
        async with self._slots:
            while len(faults) < _ATTEMPTS and busy < _BUSY_ATTEMPTS:
                if len(faults) > 1:  # one server may break by itself; two hint at a common cause
                    await asyncio.sleep(self._pause_s(len(faults) - 1, request))
                seat = await self._fleet.seat(affinity)
                try:
                    return await self._attempt(seat, request)
                except RequestRefused as error:
                    raise EngineError(
                        f"{seat.server.url} refuses request {request.request_id}: {error}"
                    ) from error
                except ServerFault as fault:
                    self._fleet.failed(seat, fault, key=request.request_id)
                    busy += fault.busy
                    if not fault.busy:
                        faults.append(f"{seat.server.url}: {fault}")
                finally:
                    self._fleet.leave(seat)
        causes = "; ".join(dict.fromkeys(faults)) or "the servers stayed too busy"
        raise EngineError(f"request {request.request_id} was given up: {causes}")

    async def _attempt(self, seat: Seat, request: GenerateRequest) -> Generation:
        """Ask one server."""
        assert self._fleet is not None
        draft = self._fleet.draft(request)
        await self._fleet.ask(seat, draft)
        generation = draft.generation()
        self._fleet.answered(seat)
        self.stats.requests += 1
        self.stats.prompt_tokens += draft.prompt_tokens
        self.stats.cached_prompt_tokens += draft.cached_tokens
        self.stats.generated_tokens += len(generation.token_ids)
        return generation

    def _pause_s(self, failures: int, request: GenerateRequest) -> float:
        """Time before a request that has failed in several places is sent again, seconds."""
        return backoff_s(failures, request.request_id, first_s=self._servers.backoff_s)

    def _shut_down(self) -> None:
        """End every task, the connections and the thread; may be called twice."""
        self._closed = True
        if not self._thread.is_alive():
            return
        self._submit(self._end_tasks()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        """Cancel what is in flight on this loop and drop the connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
            await asyncio.sleep(0.01)  # the loop closes the sockets in passes to come
