"""Dynamic batching: requests that arrive together are scored in one forward pass.

One thread scores. While it is busy, whatever arrives waits in a bounded queue in order of arrival,
and the next batch takes from its front up to a budget of tokens. A full queue refuses at once, with
the time after which trying again makes sense, so that waiting is visible to clients and memory is
bounded. What a request that is given up has waiting makes room at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from prm.metrics import Array
from prm.rendering import Rendered

_SMOOTHING = 0.2
"""Weight of the latest batch in the running speed."""
_LONGEST_PAUSE_S = 60


class QueueFull(Exception):
    """The queue takes no more for now."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{waiting} trajectories are waiting already")


class QueueClosed(Exception):
    """The queue takes no more at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReport:
    """One batch that was scored."""

    trajectories: int
    tokens: int
    """Real ones, without padding."""
    seconds: float


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """What one request asked for."""

    future: Future[list[Array]]
    left: int
    """Rows that have no result yet."""
    results: list[Array | None] = field(default_factory=list)

    def settle(self, index: int, margins_P: Array) -> None:
        """Keep a row's result; with the last one the request is answered."""
        self.results[index] = margins_P
        self.left -= 1
        if self.left == 0:
            with suppress(InvalidStateError):  # cancelled or failed meanwhile
                self.future.set_result([r for r in self.results if r is not None])

    def fail(self, error: BaseException) -> None:
        """Answer with an error, once."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Row:
    """One trajectory that waits."""

    job: _Job
    index: int
    """Place in its request."""
    rendered: Rendered


class ScoringQueue:
    """Scores rendered trajectories of many requests together, in one thread of its own.

    Parameters
    ----------
    margins : callable
        Rendered trajectories to their raw log-odds, in the same order (`Scorer.margins`).
    batch_tokens : int
        Real tokens taken for one batch, >= 1; a longer single trajectory is a batch of its own.
    max_waiting : int
        Most trajectories that wait, >= 1. A request with more is taken when nothing waits.
    report : callable, optional
        Told of every scored batch, in the scoring thread.
    """

    def __init__(
        self,
        margins: Callable[[Sequence[Rendered]], list[Array]],
        *,
        batch_tokens: int,
        max_waiting: int,
        report: Callable[[BatchReport], None] | None = None,
    ) -> None:
        self._margins = margins
        self._batch_tokens, self._max_waiting = batch_tokens, max_waiting
        self._report = report
        self._rows: deque[_Row] = deque()
        self._waiting_tokens = 0
        self._tokens_per_s = math.nan
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Trajectories that wait for their batch."""
        return len(self._rows)

    def check_room(self, count: int, *, ahead: int = 0) -> None:
        """Refuse early what `submit` would refuse.

        Parameters
        ----------
        count : int
            Trajectories to come.
        ahead : int, default=0
            Others on their way here, which count as waiting.

        Raises
        ------
        QueueFull, QueueClosed
            As `submit`.
        """
        with self._changed:
            self._check_room(count, ahead)

    def _check_room(self, count: int, ahead: int) -> None:
        """Refuse, with the lock held."""
        if self._closed:
            raise QueueClosed("the server is ending")
        waiting = len(self._rows) + ahead
        if waiting and waiting + count > self._max_waiting:
            raise QueueFull(waiting, self._pause_s())

    def submit(self, rendered: Sequence[Rendered]) -> Future[list[Array]]:
        """Queue the trajectories of one request.

        Returns
        -------
        Future of list of array
            Raw log-odds of every scored position, in the order given; `give_up` ends it early.

        Raises
        ------
        QueueFull
            If too much is waiting; nothing of the request is kept.
        QueueClosed
            If the queue was closed.
        """
        future: Future[list[Array]] = Future()
        if not rendered:
            future.set_result([])
            return future
        job = _Job(future=future, left=len(rendered), results=[None] * len(rendered))
        rows = [_Row(job=job, index=i, rendered=r) for i, r in enumerate(rendered)]
        with self._changed:
            self._check_room(len(rows), 0)
            self._rows.extend(rows)
            self._waiting_tokens += sum(len(r.input_ids) for r in rendered)
            self._changed.notify()
        return future

    def give_up(self, future: Future[list[Array]]) -> int:
        """Take what still waits of a request out of the queue and cancel its future.

        Returns
        -------
        int
            Trajectories taken out. Those in the batch that is being scored are not among them.
        """
        with self._changed:
            waiting = self._rows
            self._rows = deque(row for row in waiting if row.job.future is not future)
            self._waiting_tokens = sum(len(row.rendered.input_ids) for row in self._rows)
            future.cancel()
        return len(waiting) - len(self._rows)

    def close(self) -> None:
        """Take no more, score what waits, and end the thread; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _pause_s(self) -> int:
        """Estimate how long the queue takes to get empty, whole seconds, at least one."""
        if math.isnan(self._tokens_per_s):
            return 1
        seconds = math.ceil(self._waiting_tokens / self._tokens_per_s)
        return min(_LONGEST_PAUSE_S, max(1, seconds))

    def _run(self) -> None:
        """Score batch after batch until the queue is closed and empty."""
        while rows := self._next_batch():
            started = time.perf_counter()
            self._score(rows)
            seconds = time.perf_counter() - started
            tokens = sum(len(row.rendered.input_ids) for row in rows)
            speed = tokens / max(seconds, 1e-9)
            known = speed if math.isnan(self._tokens_per_s) else self._tokens_per_s
            self._tokens_per_s = known + _SMOOTHING * (speed - known)
            if self._report is not None:
                self._report(BatchReport(trajectories=len(rows), tokens=tokens, seconds=seconds))

    def _next_batch(self) -> list[_Row]:
        """Wait for rows and take the first ones; none means that the queue is closed."""
        with self._changed:
            while True:
                rows = self._take()
                if rows or self._closed:
                    return rows
                self._changed.wait()

    def _take(self) -> list[_Row]:
        """Take rows from the front up to the token budget, passing over failed requests."""
        rows: list[_Row] = []
        tokens = 0
        while self._rows:
            length = len(self._rows[0].rendered.input_ids)
            if rows and tokens + length > self._batch_tokens:
                break
            row = self._rows.popleft()
            self._waiting_tokens -= length
            if not row.job.future.done():  # not failed by another of its rows
                rows.append(row)
                tokens += length
        return rows

    def _score(self, rows: Sequence[_Row]) -> None:
        """Score a batch and hand out the results; if it fails, each row alone."""
        try:
            results = self._margins([row.rendered for row in rows])
        except Exception as error:  # whatever it is, the thread must go on
            if len(rows) == 1:
                rows[0].job.fail(error)
                return
            for row in rows:
                self._score([row])
            return
        for row, margins_P in zip(rows, results, strict=True):
            row.job.settle(row.index, margins_P)
