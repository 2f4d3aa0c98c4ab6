"""The `sandboxfusion` backend: code runs on a SandboxFusion server, reached over HTTP.

The address comes with the name: ``--sandbox sandboxfusion:http://HOST:PORT``. The server's
``/run_code`` keeps nothing from one request to the next, so every run sends all cells before it
too, which are run again there and must give what they gave before; a cell that prints the time
ends its session. The program that does this (``fusion_program``) bounds CPU time, wall clock,
memory, output and file size of every cell, and needs a POSIX server with Python 3.8 or later.

What the code can reach is the server's affair: in its ``none`` isolation, the files, environment
and network of the server's own account. Use a server that holds nothing else. The connection is
not authenticated, and not encrypted unless the address says https.

A server that fails, refuses, answers too late or with anything but a result is a broken sandbox,
never the code's fault. Failures that pass are tried again, which is safe because nothing is kept;
an answer that is late is not waited for again, as the server may still be busy with it.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from agent.processes import CHILD_ENVIRONMENT
from agent.sandbox.base import Capabilities, Limits, SandboxError, states_kept
from agent.sandbox.child import Outcome
from agent.sandbox.fusion_program import GRACE_SECONDS, Report, Request
from agent.sandbox.fusion_reply import (
    NoReport,
    Unavailable,
    check_repeated,
    ended_without_report,
    outcome_of,
    read_reply,
)
from agent.sandbox.history import History
from agent.sandbox.post import ReplyError, StatusError, post_json
from agent.sandbox.sessions import HistorySession, Sessions
from trajectory.errors import InputError

MAX_OUTPUT_CHARS = 16_000
"""Most characters of a stream kept: some servers stop reading a program's output at 190 KB."""
MARGIN_SECONDS = 30.0
"""How much longer than the program's own deadline the server lets it run."""
QUEUE_SECONDS = 60.0
"""How much longer than that the reply may take, for a server that runs other requests first."""
RETRY_PAUSES = (0.2, 1.0)
"""Seconds before the second and third attempt."""
PASSING_STATUSES = frozenset({429, 500, 502, 503, 504})
"""HTTP errors that another attempt may not meet."""
SENT = ("runner.py", "output.py")
"""Modules beside this one that the program imports."""


class FusionMachine:
    """Runs the cells of one session, each by a request that repeats all before it.

    Parameters
    ----------
    server : Server
        Where they run.
    limits : Limits
        Bounds of every run.
    seed : int
        Fixes string hashing, ``random`` and ``numpy.random``.
    """

    def __init__(self, server: Server, limits: Limits, seed: int) -> None:
        self._server, self._limits, self._seed = server, limits, seed

    async def run(self, history: History, node: int, code: str) -> Outcome:
        """Repeat the cells on the path to ``node`` and run the cell."""
        path = history.path(node)
        cells = [(number, cell.code) for number, cell in path]
        ending = await self._server.run(self._request([*cells, (len(history), code)]))
        if isinstance(ending, str):
            return ended_without_report(ending, self._limits)
        check_repeated(path, ending)
        return outcome_of(ending, len(path), self._limits)

    def branch(self) -> FusionMachine:
        """Return this machine: it keeps nothing of a session."""
        return self

    def close(self) -> None:
        """Do nothing: a machine holds nothing."""

    def _request(self, cells: list[tuple[int, str]]) -> Request:
        """Return what the program is told."""
        limits = self._limits
        return {
            "cells": cells,
            "seed": self._seed,
            "environment": {**CHILD_ENVIRONMENT, "PYTHONHASHSEED": str(self._seed % 2**32)},
            "cpu_s": limits.cpu_s,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_mb * 2**20,
            "file_bytes": limits.file_mb * 2**20,
            "output_chars": limits.output_chars,
        }


class SandboxFusionSandbox:
    """Makes sessions on a SandboxFusion server.

    Parameters
    ----------
    url : str
        ``http://HOST:PORT``; a path before ``/run_code`` may follow.
    max_running : int, default=16
        Requests at the same time, >= 1; more wait.
    queue_s : float, default=60
        Seconds a reply may take beyond the time the code is allowed.

    Raises
    ------
    InputError
        If the address is none.
    """

    def __init__(self, url: str, *, max_running: int = 16, queue_s: float = QUEUE_SECONDS) -> None:
        self.name = "sandboxfusion"
        self.isolation = "server"
        self.capabilities = Capabilities(
            stateful=False, forks=False, cpython=True, packages=True, files=True, cpu_limit=True
        )
        self._server = Server(_address(url), queue_s)
        self._sessions = Sessions(max_running=max_running)

    async def open(self, limits: Limits, seed: int, *, retain: str = "last") -> HistorySession:
        """Return a session in the empty state; nothing is kept, whatever ``retain`` asks for."""
        states_kept(retain)
        if limits.output_chars > MAX_OUTPUT_CHARS:
            raise InputError(
                f"the sandbox 'sandboxfusion' keeps at most {MAX_OUTPUT_CHARS} characters of "
                f"output, not {limits.output_chars}; lower output_chars"
            )
        machine = FusionMachine(self._server, limits, seed)
        return self._sessions.open(machine, History())

    async def close(self) -> None:
        """End every session."""
        await self._sessions.close()


class Server:
    """A SandboxFusion server, as something that runs the program.

    Parameters
    ----------
    url : SplitResult
        Of ``/run_code``.
    queue_s : float
        Seconds a reply may take beyond the time the code is allowed.
    """

    def __init__(self, url: SplitResult, queue_s: float) -> None:
        self._url, self._queue_s = url, queue_s
        folder = Path(__file__).parent
        self._program = (folder / "fusion_program.py").read_text(encoding="utf-8")
        self._files = {name: _base64((folder / name).read_bytes()) for name in SENT}

    async def run(self, request: Request) -> Report | NoReport:
        """Run a request.

        Raises
        ------
        SandboxError
            If there is no result, after three attempts where another may succeed.
        """
        seconds = request["wall_s"] * len(request["cells"]) + GRACE_SECONDS + MARGIN_SECONDS
        payload = {
            "code": self._program,
            "language": "python",
            "run_timeout": seconds,
            "files": {**self._files, "request.json": _base64(json.dumps(request).encode())},
        }
        for pause in RETRY_PAUSES:
            try:
                ending = await self._attempt(payload, seconds + self._queue_s)
                if ending != "crash":  # the server's killer of processes may have passed by
                    return ending
            except Unavailable:
                pass
            await asyncio.sleep(pause)
        return await self._attempt(payload, seconds + self._queue_s)

    async def _attempt(self, payload: Mapping[str, object], seconds: float) -> Report | NoReport:
        """Send the program once."""
        where = self._url.geturl()
        try:
            reply = await post_json(self._url, payload, seconds=seconds)
        except TimeoutError as error:
            raise SandboxError(f"{where} gave no reply within {seconds:g} s") from error
        except ReplyError as error:
            raise Unavailable(f"{where} could not be reached: {error}") from error
        except StatusError as error:
            kind = Unavailable if error.status in PASSING_STATUSES else SandboxError
            raise kind(f"{where} answered with {error}") from error
        return read_reply(reply, where)


def _base64(data: bytes) -> str:
    """Return the form in which the server takes files."""
    return base64.b64encode(data).decode("ascii")


def _address(url: str) -> SplitResult:
    """Return the address of ``/run_code``.

    Raises
    ------
    InputError
        If the text is no HTTP address.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise InputError(
            f"the sandbox 'sandboxfusion' needs the address of a server, not {url!r}; "
            "write sandboxfusion:http://HOST:PORT"
        )
    return parts._replace(path=parts.path.rstrip("/") + "/run_code")
