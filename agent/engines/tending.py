"""Keeps a fleet of servers: each is tried again while it is out and watched while it is in.

Which server is in, and for how long one stays out, `agent.engines.fleet` decides. A server comes in
only if it is what the fleet needs: it serves the same model as the others, with enough context, and
gives the log-probabilities of the distribution it samples from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from agent.engines.base import EngineError, GenerateRequest
from agent.engines.completions import Draft, RequestRefused, ServerFault
from agent.engines.fleet import Fleet, Seat, Server
from agent.engines.servers import Servers
from trajectory.errors import InputError
from trajectory.records import Sampling
from trajectory.seeds import derive_seed

if TYPE_CHECKING:
    from agent.engines.client import Client, Identity

_log = logging.getLogger(__name__)

_MISSES = 3
"""Signs of life in a row that a server with work may fail to give."""
_SILENT = "gave no sign of life while it had work"
_IDENTIFY_S = 30.0
"""Time for a server to say what it is, seconds."""
_TRIAL_S = 120.0
"""Time for the tokens of a trial, which may have to wait on a server that is full of work."""
_TICK_S = 0.25
_CERTAIN = 1e-3
"""A log-probability this close to 0 is that of the only token there was."""
_TRIAL_PROMPT = 4
"""Ids of the prompt of a trial; with random ones no model is certain how to go on."""
_TRIAL_TOKENS = 8
"""Tokens of a trial: at one of them two could be equally likely, in bfloat16 above all."""
_COMMON_IDS = 10_000
"""Ids below this are text in any vocabulary, ids near its end may stand for images."""


class TendedFleet:
    """Servers that are watched; made and used in one event loop.

    Parameters
    ----------
    servers : Servers
        Where they are, and how long to wait for them.
    client : Client
        Speaks with them.
    vocabulary : int
        Number of ids the policy knows.
    max_context : int
        Longest prompt plus turn that they must take, tokens.
    """

    def __init__(
        self, servers: Servers, client: Client, *, vocabulary: int, max_context: int
    ) -> None:
        self._servers = servers
        self._client = client
        self._vocabulary = vocabulary
        self._max_context = max_context
        self._fleet = Fleet(
            servers.urls, patience_s=servers.patience_s, backoff_s=servers.backoff_s
        )
        self._first: tuple[str, Identity] | None = None
        """The first server that came in, and what it serves: the others must serve the same."""
        self._misfit: str | None = None
        self._untried = set(servers.urls)
        self._news = asyncio.Event()
        self._calls: dict[asyncio.Task[None], Server] = {}
        self._stalled: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> str:
        """Start tending; wait until every server was tried once and one is in.

        Returns
        -------
        str
            The model they serve.

        Raises
        ------
        InputError
            If one of them is no server for this run, or none answers in time.
        """
        self._tasks = [asyncio.create_task(self._tend(s)) for s in self._fleet.servers]
        self._tasks.append(asyncio.create_task(self._count_patience()))
        while self._untried or not self._fleet.some_in:
            if self._misfit is not None:
                break
            if self._fleet.lost:
                raise InputError(
                    f"the engine http finds no server that works within "
                    f"{self._fleet.patience_s:.0f} s ({self._fleet.complaints()}): start them "
                    "with `vllm serve`, or correct --engine"
                )
            await self._news.wait()
        if self._misfit is not None:
            raise InputError(f"the engine http cannot use these servers: {self._misfit}")
        assert self._first is not None
        return self._first[1].model

    async def close(self) -> None:
        """Stop tending; may be called twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def seat(self, affinity: str) -> Seat:
        """Wait for a server that is in; give the seat back with `leave`.

        Raises
        ------
        EngineError
            If none has been in for longer than the fleet's patience.
        """
        while (seat := self._fleet.take(affinity)) is None:
            if self._fleet.lost:
                raise EngineError(
                    f"no server has worked for {self._fleet.patience_s:.0f} s "
                    f"({self._fleet.complaints()})"
                )
            await self._news.wait()
        return seat

    def leave(self, seat: Seat) -> None:
        """Give a seat back."""
        self._fleet.leave(seat)

    def answered(self, seat: Seat) -> None:
        """Take note of a good answer."""
        self._fleet.answered(seat)

    def failed(self, seat: Seat, fault: ServerFault, *, key: str) -> None:
        """Take a server out, because of a fault that the request with the id ``key`` met."""
        is_news = self._fleet.failed(
            seat, str(fault), now=time.monotonic(), key=key, retry_after_s=fault.retry_after_s
        )
        if is_news:
            _log.warning("the server %s is out (%s)", seat.server.url, fault)
            self._announce()

    def draft(self, request: GenerateRequest) -> Draft:
        """Begin a turn, in the words of these servers."""
        assert self._first is not None
        return self._draft(request, self._first[1].model)

    async def ask(self, seat: Seat, draft: Draft) -> None:
        """Have the server of a seat write a turn, as long as it gives signs of life.

        Raises
        ------
        RequestRefused, ServerFault
            As `agent.engines.client.Client.complete`.
        """
        call = asyncio.ensure_future(self._client.complete(seat.server.url, draft))
        self._calls[call] = seat.server
        try:
            await call
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if call not in self._stalled or (this is not None and this.cancelling()):
                raise
            raise ServerFault(_SILENT) from None
        finally:
            del self._calls[call]
            self._stalled.discard(call)

    # -- tending -------------------------------------------------------------------------------

    async def _tend(self, server: Server) -> None:
        """Try a server while it is out, and watch it while it is in, for ever."""
        while True:
            if server.is_in:
                await self._watch(server)
            else:
                await asyncio.sleep(max(0.0, server.retry_at - time.monotonic()))
                await self._try(server)

    async def _watch(self, server: Server) -> None:
        """Return once a server is out; take it out if it has work and gives no sign of life."""
        misses = 0
        while misses < _MISSES:
            next_check = time.monotonic() + self._servers.check_s
            while server.is_in and (left := next_check - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._news.wait()
            if not server.is_in:
                return
            misses = misses + 1 if server.in_flight and await self._is_silent(server) else 0
        if server.is_in:
            self._put_out(server, ServerFault(_SILENT), key=server.url)
            _log.warning("the server %s is out (%s)", server.url, _SILENT)
            for call, owner in self._calls.items():
                if owner is server:
                    self._stalled.add(call)
                    call.cancel()

    async def _is_silent(self, server: Server) -> bool:
        """Ask a server for a sign of life; return whether none came."""
        try:
            await self._client.check_alive(server.url, within_s=self._servers.check_s)
        except ServerFault:
            return True
        return False

    async def _try(self, server: Server) -> None:
        """Let a server in if it passes a trial."""
        returning = server.url not in self._untried
        try:
            await self._pass_trial(server)
        except ServerFault as fault:
            if fault.misfit and self._misfit is None:
                self._misfit = f"{server.url}: {fault}"
            self._put_out(server, fault, key=server.url)
        except Exception as error:  # whatever it is, it must not end the tending
            self._put_out(server, ServerFault(f"failed its trial: {error!r}"), key=server.url)
        else:
            self._fleet.came_back(server)
            if returning:
                _log.warning("the server %s is in again", server.url)
        self._untried.discard(server.url)
        self._announce()

    def _put_out(self, server: Server, fault: ServerFault, *, key: str) -> None:
        """Keep a server out for a time."""
        self._fleet.stay_out(
            server,
            str(fault),
            now=time.monotonic(),
            key=key,
            retry_after_s=fault.retry_after_s,
        )
        self._announce()

    async def _pass_trial(self, server: Server) -> None:
        """Check what a server is and have it write a few tokens.

        Raises
        ------
        ServerFault
            If it does not work or is not what the fleet needs.
        """
        identity = await self._client.identify(server.url, within_s=_IDENTIFY_S)
        self._check_identity(server.url, identity)
        length = min(_TRIAL_PROMPT, self._max_context - 1)
        request = GenerateRequest(
            request_id=f"trial/{server.outages}",
            prompt_ids=tuple(
                derive_seed("trial", place) % min(self._vocabulary, _COMMON_IDS)
                for place in range(length)
            ),
            sampling=Sampling(max_tokens=_TRIAL_TOKENS, top_k=1),
            seed=0,
            stop_ids=(),
        )
        draft = self._draft(request, identity.model)
        try:
            async with asyncio.timeout(_TRIAL_S):
                await self._client.complete(server.url, draft)
        except TimeoutError:
            raise ServerFault(f"wrote no {_TRIAL_TOKENS} tokens in {_TRIAL_S:.0f} s") from None
        except RequestRefused as error:
            raise ServerFault(f"refuses the simplest request: {error}") from error
        # The only token that top-k 1 leaves has probability 1, unless the server reports the
        # distribution before temperature, top-k and top-p.
        certain = [logprob > -_CERTAIN for logprob in draft.generation().logprobs]
        if 2 * sum(certain) < len(certain):
            raise ServerFault(
                "does not report the probabilities it samples with: start it with "
                "--logprobs-mode processed_logprobs",
                misfit=True,
            )
        if self._first is None:
            self._first = (server.url, identity)
        self._check_identity(server.url, identity)  # another one may have come in meanwhile

    def _check_identity(self, url: str, identity: Identity) -> None:
        """Refuse a server that serves something else than the others."""
        length = identity.max_model_len
        if length is not None and length < self._max_context:
            raise ServerFault(
                f"was started with --max-model-len {length}, which --max-context "
                f"{self._max_context} exceeds",
                misfit=True,
            )
        if self._first is not None and self._first[1].model != identity.model:
            raise ServerFault(
                f"serves {identity.model!r} and {self._first[0]} serves "
                f"{self._first[1].model!r}: all must serve one model",
                misfit=True,
            )

    def _draft(self, request: GenerateRequest, model: str) -> Draft:
        """Begin a turn of a model."""
        return Draft(
            request, model=model, vocabulary=self._vocabulary, max_context=self._max_context
        )

    async def _count_patience(self) -> None:
        """Let the fleet's patience run while no server is in."""
        while True:
            was_lost = self._fleet.lost
            self._fleet.tick(time.monotonic())
            if self._fleet.lost and not was_lost:
                self._announce()
            await asyncio.sleep(_TICK_S)

    def _announce(self) -> None:
        """Wake whoever waits for a change."""
        self._news.set()
        self._news = asyncio.Event()
