"""One JSON request to an HTTP server, with a deadline for all of it."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
from contextlib import suppress
from typing import cast
from urllib.parse import SplitResult

from trajectory.records import JsonValue

MAX_REPLY_BYTES = 16 * 2**20
"""A longer reply is refused."""


class ReplyError(Exception):
    """The connection failed or what came back is no complete reply; the request may have run."""


class StatusError(Exception):
    """The server answered with an HTTP error.

    Parameters
    ----------
    status : int
        The HTTP status.
    text : str
        Beginning of the reply.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP status {status}: {text}")
        self.status = status


async def post_json(url: SplitResult, payload: object, *, seconds: float) -> JsonValue:
    """Send a JSON body and return the JSON reply.

    Parameters
    ----------
    url : SplitResult
        Whole address; the scheme is ``http`` or ``https``.
    payload : object
        Body, anything `json.dumps` takes.
    seconds : float
        Deadline of connecting, sending and receiving together.

    Raises
    ------
    TimeoutError
        If the deadline passes.
    ReplyError
        If there is no complete JSON reply.
    StatusError
        If the HTTP status is not 200.

    Notes
    -----
    Proxy settings of the environment are not used.
    """
    body = json.dumps(payload).encode()
    async with asyncio.timeout(seconds):
        try:
            raw = await _exchange(url, body)
        except TimeoutError as error:  # the system's own, of connecting
            raise ReplyError(str(error) or "the connection timed out") from error
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise ReplyError(str(error)) from error
    status, reply = _parse(raw)
    if status != 200:
        raise StatusError(status, reply[:200].decode(errors="replace"))
    try:
        return cast("JsonValue", json.loads(reply))
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"the reply is not JSON: {error}") from error


async def _exchange(url: SplitResult, body: bytes) -> bytes:
    """Send the request on a new connection and return all that comes back."""
    secure = url.scheme == "https"
    port = url.port or (443 if secure else 80)
    head = (
        f"POST {url.path or '/'} HTTP/1.1\r\nHost: {url.netloc.rpartition('@')[2]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Accept: application/json\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=secure or None)
    try:
        writer.write(head.encode("ascii") + body)
        await writer.drain()
        received = await reader.readuntil(b"\r\n\r\n")
        length = _content_length(received)
        if length is not None and length <= MAX_REPLY_BYTES:
            return received + await reader.readexactly(length)
        while len(received) <= MAX_REPLY_BYTES:
            if not (data := await reader.read(2**16)):
                return received
            received += data
        raise OSError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
    finally:
        writer.close()
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 1)


def _content_length(head: bytes) -> int | None:
    """Return the length of the body, if the head gives it."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return None


class _Received:
    """What has been received, as the parser of `http.client` wants it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        """Return the data as a file."""
        return io.BytesIO(self._data)


def _parse(raw: bytes) -> tuple[int, bytes]:
    """Return the status and the body of a reply."""
    response = http.client.HTTPResponse(cast("socket.socket", _Received(raw)))
    try:
        response.begin()
        return response.status, response.read()
    except (http.client.HTTPException, ValueError) as error:
        raise ReplyError(f"no complete HTTP reply: {error!r}") from error
