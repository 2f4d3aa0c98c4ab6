"""Chooses the server for a request and keeps account of which servers work; no input or output.

A request goes to the least loaded server. Among those that are nearly as little loaded, rendezvous
hashing of its affinity decides, so that requests with a common prefix meet the cache that holds it,
and a server that leaves or joins moves only the requests that it had or gets.

A server is in or out. A failure takes it out for a time that doubles with every failure in a row
and is spread by a hash, so that many clients do not come back at once. It then counts as due, and
whoever tends the fleet tries it with one small request (half open) before it is in again. Failures
in a row end with a real answer, not with a passed trial.

Time is what the caller's monotonic clock says. No state depends on the clock of the wall, and a
clock that jumps (a suspended process) uses up no more patience than one long tick.

References
----------
.. [1] Thaler, Ravishankar, Using name-based mappings to increase hit rates, IEEE/ACM Transactions
   on Networking 6(1), 1998 (rendezvous hashing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trajectory.seeds import derive_seed

_FEWEST_SPARE = 4
"""A server this many requests above the least loaded one is always near enough."""
_SPARE_SHARE = 4
"""So is one that is above it by the least load divided by this."""
_LONGEST_BACKOFF_S = 15.0
_LONGEST_ASKED_S = 60.0
"""A server's own ``Retry-After`` is followed up to here."""
_LONGEST_TICK_S = 5.0
"""Waiting between two ticks counts at most this much: more was no waiting but a jump."""


@dataclass(kw_only=True, slots=True, eq=False)
class Server:
    """One server as its fleet sees it."""

    url: str
    is_in: bool = False
    in_flight: int = 0
    """Requests that hold a seat here."""
    failures: int = 0
    """In a row: since the last good answer."""
    outages: int = 0
    """How often it was taken out."""
    retry_at: float = 0.0
    """When it may be tried again, by the monotonic clock; without meaning while it is in."""
    reason: str = "not tried yet"
    """Why it is out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A request's place at a server; give it back with `Fleet.leave`."""

    server: Server
    outage: int
    """``server.outages`` when the seat was taken: news from before an outage is no news."""


class Fleet:
    """Servers of the same weights.

    Parameters
    ----------
    urls : sequence of str
        Their addresses, different ones. They begin out, and due.
    patience_s : float
        How long no server need be in before the fleet counts as lost, seconds.
    backoff_s : float
        Time out after a first failure, seconds.
    """

    def __init__(self, urls: Sequence[str], *, patience_s: float, backoff_s: float = 1.0) -> None:
        self.servers = tuple(Server(url=url) for url in urls)
        self.patience_s = patience_s
        self._backoff_s = backoff_s
        self._ticked: float | None = None
        self._waited_s = 0.0

    @property
    def some_in(self) -> bool:
        """Whether any server is in."""
        return any(server.is_in for server in self.servers)

    @property
    def lost(self) -> bool:
        """Whether no server has been in for longer than the fleet's patience."""
        return not self.some_in and self._waited_s >= self.patience_s

    def take(self, affinity: str) -> Seat | None:
        """Give a request a seat; None if every server is out.

        Parameters
        ----------
        affinity : str
            Requests with equal ones go to one server as far as its load allows.
        """
        there = [server for server in self.servers if server.is_in]
        if not there:
            return None
        least = min(server.in_flight for server in there)
        near = [server for server in there if server.in_flight <= least + spare(least)]
        chosen = max(near, key=lambda s: (derive_seed("rendezvous", affinity, s.url), s.url))
        chosen.in_flight += 1
        return Seat(server=chosen, outage=chosen.outages)

    @staticmethod
    def leave(seat: Seat) -> None:
        """Give a seat back, whatever came of it."""
        seat.server.in_flight -= 1

    @staticmethod
    def answered(seat: Seat) -> None:
        """Take note of a good answer."""
        if seat.server.is_in and seat.outage == seat.server.outages:
            seat.server.failures = 0

    def failed(
        self, seat: Seat, reason: str, *, now: float, key: str, retry_after_s: float | None = None
    ) -> bool:
        """Take a server out because of a failure; return whether that is news.

        Of many requests that one outage breaks, only the first counts.

        Parameters
        ----------
        seat : Seat
            Where it happened.
        reason : str
            What went wrong, for messages.
        now : float
            Monotonic clock, seconds.
        key : str
            Spreads the backoff: the id of the request.
        retry_after_s : float, optional
            What the server itself asked for, seconds.
        """
        server = seat.server
        if not server.is_in or seat.outage != server.outages:
            return False
        self.stay_out(server, reason, now=now, key=key, retry_after_s=retry_after_s)
        return True

    def stay_out(
        self,
        server: Server,
        reason: str,
        *,
        now: float,
        key: str,
        retry_after_s: float | None = None,
    ) -> None:
        """Keep a server out after a trial that failed; parameters as in `failed`."""
        server.is_in = False
        server.outages += 1
        server.failures += 1
        server.reason = reason
        wait_s = backoff_s(server.failures, key, first_s=self._backoff_s)
        if retry_after_s is not None:
            wait_s = max(wait_s, min(retry_after_s, _LONGEST_ASKED_S))
        server.retry_at = now + wait_s

    def came_back(self, server: Server) -> None:
        """Let a server in that passed its trial."""
        server.is_in = True
        self._waited_s = 0.0

    def tick(self, now: float) -> None:
        """Count the time without any server; call every second or so while the fleet is in use."""
        before, self._ticked = self._ticked, now
        if self.some_in or before is None:
            self._waited_s = 0.0
        else:
            self._waited_s += min(max(0.0, now - before), _LONGEST_TICK_S)

    def complaints(self) -> str:
        """Say which servers are out and why."""
        return "; ".join(f"{s.url}: {s.reason}" for s in self.servers if not s.is_in)


def spare(least: int) -> int:
    """How many requests above the least load a server may have and still be preferred.

    Computing a long prefix again costs more than sharing a batch with a few requests, but not more
    than with many.

    Examples
    --------
    >>> spare(0), spare(100)
    (4, 25)
    """
    return max(_FEWEST_SPARE, least // _SPARE_SHARE)


def backoff_s(failures: int, key: str, *, first_s: float) -> float:
    """How long to wait after some failures in a row, seconds.

    Parameters
    ----------
    failures : int
        >= 1.
    key : str
        What the wait is spread by: equal keys wait equally long.
    first_s : float
        Longest wait after the first failure, seconds.

    Returns
    -------
    float
        Between half of ``min(15 s, first_s 2**(failures - 1))`` and all of it.

    Examples
    --------
    >>> [0.5 * b <= backoff_s(n, "a", first_s=1.0) <= b for n, b in ((1, 1), (3, 4), (99, 15))]
    [True, True, True]
    """
    longest = max(first_s, _LONGEST_BACKOFF_S)
    doublings = min(failures - 1, math.ceil(math.log2(longest / first_s)))
    fraction = derive_seed("backoff", key, failures) / 2**63
    return min(longest, first_s * 2.0**doublings) * (0.5 + 0.5 * fraction)
