"""A sandbox for code that is not asynchronous.

Any `Sandbox` behind ordinary calls, which may come from any thread: the sandbox lives on an event
loop in a thread of its own, and each call waits for its result there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from agent.sandbox.base import Capabilities, Limits, Result, Sandbox, SandboxError, Session

T = TypeVar("T")

EXIT_SECONDS = 10.0
"""How long closing may take, also at the end of the interpreter."""


class SyncSandbox:
    """A sandbox whose methods wait for their results; use it in a ``with`` block.

    Parameters
    ----------
    sandbox : Sandbox
        Used by nothing else from now on; `close` closes it.

    Examples
    --------
    >>> from agent.sandbox import build_sandbox
    >>> with SyncSandbox(build_sandbox("unsafe", allow_unsafe=True)) as sandbox:
    ...     with sandbox.open(Limits(), seed=0) as session:
    ...         _ = session.run("x = [1]")
    ...         branch = session.branch()
    ...         _ = branch.run("x.append(2)")
    ...         print(session.run("x").stdout + branch.run("x").stdout, end="")
    [1]
    [1, 2]
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._loop = _LoopThread()
        # Also at the end of the interpreter, where a `with` block was not left or not used.
        self._finalizer = weakref.finalize(self, _end, self._loop, sandbox)

    @property
    def name(self) -> str:
        """The backend."""
        return self._sandbox.name

    @property
    def isolation(self) -> str:
        """What keeps code in; ``none`` for the unsafe backend."""
        return self._sandbox.isolation

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do."""
        return self._sandbox.capabilities

    def open(self, limits: Limits, seed: int, *, retain: str = "last") -> SyncSession:
        """Start a session with an empty state, as `Sandbox.open` does.

        Raises
        ------
        SandboxError
            If it cannot be started, or this is closed.
        InputError
            If a setting is one the backend cannot hold.
        """
        session = self._loop.call(lambda: self._sandbox.open(limits, seed, retain=retain))
        return SyncSession(self, self._loop, session)

    def close(self) -> None:
        """End every session, and calls that wait in other threads; may be called twice."""
        self._finalizer.detach()
        _end(self._loop, self._sandbox)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SyncSession:
    """Notebook-like state of one episode; made by `SyncSandbox.open` and `branch`.

    Parameters
    ----------
    sandbox : SyncSandbox
        Kept alive as long as the session.
    loop : _LoopThread
        Where the session lives.
    session : Session
        What the calls are passed to.
    """

    def __init__(self, sandbox: SyncSandbox, loop: _LoopThread, session: Session) -> None:
        self._sandbox, self._loop, self._session = sandbox, loop, session

    def run(self, code: str, *, at: int | None = None) -> Result:
        """Run ``code`` in the state ``at`` (default: the latest), as `Session.run` does.

        Raises
        ------
        SandboxError
            If the sandbox broke, or the session or sandbox is closed.
        ValueError
            If there is no such node.
        """
        return self._loop.call(lambda: self._session.run(code, at=at))

    def branch(self, node: int | None = None) -> SyncSession:
        """Return an independent session that starts in the state ``node`` (default: latest)."""
        session = self._loop.call(lambda: self._session.branch(node))
        return SyncSession(self._sandbox, self._loop, session)

    def close(self) -> None:
        """End the session; may be called twice, and after the sandbox was closed."""
        if not self._loop.closed:
            self._loop.call(self._session.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _LoopThread:
    """An event loop that runs in a thread of its own until it is ended."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self.closed = False
        # A daemon, so that the interpreter's end does not wait for it.
        self._thread = threading.Thread(target=self._serve, name="sandbox", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function on the loop and wait for what it returns or raises."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a call from the sandbox's own event loop would wait for itself")
        with self._lock:
            if self.closed:
                raise SandboxError("the sandbox is closed")
            future = asyncio.run_coroutine_threadsafe(function(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise SandboxError("the sandbox was closed during the call") from error
        except BaseException:  # Ctrl-C while waiting: the code must not go on unseen
            future.cancel()
            raise

    def end(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Refuse further calls, run ``last``, cancel what is left and stop the thread.

        Raises
        ------
        SandboxError
            If that takes longer than `EXIT_SECONDS`.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
            ending = asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        if threading.current_thread() is self._thread:  # collected there as garbage
            return
        try:
            ending.result(EXIT_SECONDS)
        except concurrent.futures.TimeoutError as error:
            raise SandboxError(f"the sandbox did not end within {EXIT_SECONDS:g} s") from error
        finally:
            self._thread.join(EXIT_SECONDS)

    async def _finish(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``last``, then cancel all other tasks and stop the loop."""
        try:
            await last()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.call_soon(self._loop.stop)

    def _serve(self) -> None:
        """Run the loop until it is stopped."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


def _end(loop: _LoopThread, sandbox: Sandbox) -> None:
    """End the sandbox and its thread."""
    loop.end(sandbox.close)
