"""Speaks HTTP with vLLM servers: one question, one checked answer or one named fault.

Nothing is retried here and no server is chosen; `agent.engines.http` does that.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from agent.engines.completions import Draft, RequestRefused, ServerFault, error_sentence
from trajectory.errors import InputError

TOKEN_VARIABLE = "TOOLPRM_SERVER_TOKEN"  # noqa: S105 - the name of a variable, not a secret
_CONNECT_S = 10.0
_KEEP_ALIVE_S = 2.0
"""Idle connections are dropped before vLLM drops them (5 s), so that none is used as it closes."""
_REQUEST_FAULTS = frozenset({400, 413, 422})
"""Statuses that the request would get from every server."""
_BUSY = frozenset({429, 503})
_ERROR_BYTES = 65_536


class _Model(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a server says that it serves."""

    model: str
    max_model_len: int | None
    """Longest prompt plus turn, tokens; None if it does not say."""


class Client:
    """Connections to all servers; made and used in one event loop.

    Parameters
    ----------
    connections : int
        Most open ones, all servers together.
    timeout_s : float
        Longest that a turn may take on a server, seconds.

    Raises
    ------
    InputError
        If the bearer token in ``TOOLPRM_SERVER_TOKEN`` cannot be sent.
    """

    def __init__(self, *, connections: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers=_authorization(),
        )

    async def close(self) -> None:
        """Drop every connection; may be called twice."""
        await self._session.close()

    async def complete(self, url: str, draft: Draft) -> None:
        """Have a server write a turn into a draft.

        Leaving this (a cancelled episode, a turn that is complete) closes the connection, by which
        vLLM knows that it need not go on.

        Raises
        ------
        RequestRefused
            If the server finds the request impossible.
        ServerFault
            If it did not answer, not in time, or not as asked.
        """
        for last_try in (False, True):
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._complete(url, draft)
                return
            except aiohttp.ServerDisconnectedError as error:
                # It may have closed an idle connection in the moment in which that was used again;
                # a server that is dead refuses the new one.
                if last_try or draft.begun:
                    raise ServerFault("closed the connection without an answer") from error
            except (aiohttp.ClientError, OSError) as error:
                raise self._fault(error) from error

    async def _complete(self, url: str, draft: Draft) -> None:
        """Do so on one connection."""
        async with self._session.post(
            f"{url}/v1/completions",
            data=draft.body,
            headers={"X-Request-Id": draft.request_id, "Content-Type": "application/json"},
            allow_redirects=False,
        ) as response:
            await _check_status(response)
            if not draft.streamed:
                draft.add(await response.read())
                return
            async for event in _events(response):
                if draft.add(event):
                    response.close()
                    return

    async def identify(self, url: str, *, within_s: float) -> Identity:
        """Ask a server whether it works and what it serves.

        Parameters
        ----------
        url : str
            The server.
        within_s : float
            How long it may take, seconds.

        Raises
        ------
        ServerFault
            If it does not work, or serves no model.
        """
        await self.check_alive(url, within_s=within_s)
        try:
            async with asyncio.timeout(within_s):
                raw = await self._get(f"{url}/v1/models")
            models = _Models.model_validate_json(raw).data
        except ValidationError as error:
            raise ServerFault("does not say which models it serves") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._fault(error) from error
        if not models:
            raise ServerFault("serves no model")
        # The first is the model itself; adapters come behind it.
        return Identity(model=models[0].id, max_model_len=models[0].max_model_len)

    async def check_alive(self, url: str, *, within_s: float) -> None:
        """Ask a server whether its engine lives; parameters and errors as in `identify`."""
        try:
            async with asyncio.timeout(within_s):
                await self._get(f"{url}/health")
        except (aiohttp.ClientError, OSError) as error:
            raise self._fault(error, f"no sign of life in {within_s:.0f} s") from error

    async def _get(self, url: str) -> bytes:
        """Fetch a small page."""
        async with self._session.get(url, allow_redirects=False) as response:
            try:
                await _check_status(response)
            except RequestRefused as error:
                raise ServerFault(str(error)) from error
            return await response.read()

    def _fault(self, error: Exception, late: str | None = None) -> ServerFault:
        """Name what went wrong on the way."""
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return ServerFault(f"no connection in {_CONNECT_S:.0f} s")
        if isinstance(error, TimeoutError):
            return ServerFault(late or f"no answer in {self._timeout_s:.0f} s")
        if isinstance(error, aiohttp.ClientPayloadError):
            return ServerFault("broke off in the middle of an answer")
        if isinstance(error, aiohttp.ClientConnectorError):
            return ServerFault(f"no connection: {_cause(error.os_error)}")
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return ServerFault("closed the connection without an answer")
        if isinstance(error, OSError):
            return ServerFault(f"broken connection: {_cause(error)}")
        return ServerFault(f"{type(error).__name__}: {error}")


def _cause(error: OSError) -> str:
    """Say what the operating system reported."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 else str(error)  # look-ups of names count below 0


async def _check_status(response: aiohttp.ClientResponse) -> None:
    """Tell a request that is wrong from a server that is."""
    if response.status == 200:
        return
    raw = await response.content.read(_ERROR_BYTES)
    said = error_sentence(raw) or " ".join(raw.decode(errors="replace").split())[:200]
    status = f"{response.status} {response.reason or ''}".strip()
    sentence = f"{status}: {said}" if said else status
    if response.status in _REQUEST_FAULTS:
        raise RequestRefused(sentence)
    if response.status in (401, 403):
        raise ServerFault(f"{sentence}: set {TOKEN_VARIABLE} to its --api-key", misfit=True)
    if response.status == 404:
        raise ServerFault(f"{sentence}: is this a vLLM server?", misfit=True)
    # A date instead of a number of seconds would need a clock that both sides share.
    asked = response.headers.get("Retry-After", "")
    raise ServerFault(
        sentence,
        busy=response.status in _BUSY,
        retry_after_s=float(asked) if asked.isascii() and asked.isdigit() else None,
    )


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the JSON of every server-sent event; insist on the last one, ``[DONE]``."""
    waiting = b""
    async for chunk in response.content.iter_any():
        *lines, waiting = (waiting + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # empty, or a comment that keeps the connection open
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield data
    raise ServerFault("broke off in the middle of an answer")


def _authorization() -> dict[str, str]:
    """Return the header with the token, if the environment has one."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{TOKEN_VARIABLE} holds characters that no HTTP header can carry")
    return {"Authorization": f"Bearer {token}"}
