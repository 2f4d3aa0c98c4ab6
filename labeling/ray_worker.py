"""A worker of a spread labelling run: takes batches of tasks, sends lines as they are made.

It runs the same `Collector` as a run in one process, on a folder of its own with what is recorded
of its tasks, and sends what is appended there. It knows nothing of Ray: to Ray Data it is a class
whose calls are generators. They are plain generators over an event loop in a thread, because Ray
Data passes on what an *async* generator yields only once that has ended, and a killed run would
lose all of a batch instead of its last half second.
"""

from __future__ import annotations

import asyncio
import os
import socket
import traceback
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

from agent.engines.base import Engine
from agent.episode import Agent
from agent.setup import open_agent
from labeling.collect import Collector
from labeling.config import LabelConfig
from labeling.ledger import Ledger, Rollout
from labeling.parcels import (
    Order,
    Parcel,
    fingerprint,
    pack,
    unpack_lines,
)
from labeling.scratch import Scratch
from labeling.setup import completer_of, plan_of, repeatable
from labeling.trajectories import TrajectoryFile
from trajectory.command import quiet_libraries
from trajectory.errors import InputError
from trajectory.progress import Field
from trajectory.records import Trajectory
from trajectory.store import JsonlWriter

SEND_EVERY_S = 0.5
"""Time between two looks for new lines, seconds: what a killed worker loses at most, beside the
episodes in flight."""

CLOSE_WITHIN_S = 10.0
"""Longest wait for an engine to close, seconds."""

ResultT = TypeVar("ResultT")


class LabelWorker:
    """Labels batches of tasks with an agent of its own.

    Parameters
    ----------
    config : LabelConfig
        Settings of the run; the agent they name is built here, on this machine.
    engine : Engine, optional
        Use this engine instead of making the one the config names.
    """

    def __init__(self, config: LabelConfig, engine: Engine | None = None) -> None:
        quiet_libraries()
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._config, self._engine = config, engine
        self._scratch = Scratch("prm-label-")
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()
        self._exit = AsyncExitStack()
        # One agent for all batches. What is wrong with it is told by the batches.
        self._agent = self._submit(self._open())

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> Iterator[dict[str, list[str]]]:
        """Label a batch of tasks.

        Parameters
        ----------
        batch : mapping
            Column ``orders``: `Order` records, one JSON line each.

        Yields
        ------
        dict
            Column ``parcel`` with one packed `Parcel`; the last one of the call says whether the
            worker gave up.
        """
        orders = [order for text in batch["orders"] for order in unpack_lines(Order, str(text))]
        with TemporaryDirectory(dir=self._scratch.path, ignore_cleanup_errors=True) as folder:
            desk = Desk(Path(folder), orders)
            work = self._submit(self._label(orders, desk))
            try:
                while not wait([work], timeout=SEND_EVERY_S).done:
                    parcel = self._parcel(desk)
                    if parcel.rollouts or parcel.trajectories:
                        yield {"parcel": [pack(parcel)]}
                yield {"parcel": [pack(_with_failure(self._parcel(desk), work))]}
            finally:
                work.cancel()

    def close(self) -> None:
        """Release the engine; may be called twice."""
        if self._loop.is_closed():
            return
        try:
            self._submit(self._exit.aclose()).result(timeout=CLOSE_WITHIN_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=CLOSE_WITHIN_S)
            self._loop.close()
            self._scratch.close()

    def __del__(self) -> None:
        """Release the engine: Ray Data drops its workers once no batch is left."""
        self.close()

    def _submit(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Run a coroutine in the thread of the episodes."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> Agent:
        """Build the agent."""
        return await self._exit.enter_async_context(
            open_agent(self._config.agent, engine=self._engine)
        )

    async def _label(self, orders: Sequence[Order], desk: Desk) -> None:
        """Run every episode that a batch misses.

        The end of a batch comes soon, and an engine that failed in its last episodes may well
        work again in the next, so it counts as dead only when a whole attempt brought nothing.
        """
        # Shielded: a batch that is given up must not take the agent from the others.
        agent = await asyncio.shield(asyncio.wrap_future(self._agent))
        config = self._config
        if config.trajectories is not None:
            config = replace(config, trajectories=desk.trajectories)
        agent = repeatable(agent, config)
        completer = completer_of(agent)
        others = {order.completer for order in orders} - {"", completer}
        if others:
            raise InputError(
                f"the rollouts recorded so far are by {others.pop()!r}, the policy here is "
                f"{completer!r}: give another folder for the output, or the policy of before"
            )
        with ExitStack() as files:
            ledger = files.enter_context(Ledger(desk.rollouts, completer=completer))
            trajectories = files.enter_context(TrajectoryFile(desk.trajectories))
            continuations = None
            if config.keep_continuations:
                continuations = files.enter_context(JsonlWriter(desk.continuations))
            while True:
                before = (len(trajectories), ledger.totals.rollouts)
                collector = Collector(
                    agent,
                    plan_of(config),
                    ledger=ledger,
                    trajectories=trajectories,
                    continuations=continuations,
                )
                collector.prepare([order.task for order in orders if order.sample])
                try:
                    return await collector.run(concurrency=config.agent.concurrency, bar=_NoBar())
                except InputError:
                    if (len(trajectories), ledger.totals.rollouts) == before:
                        raise

    def _parcel(self, desk: Desk) -> Parcel:
        """Gather what is new."""
        parcel = replace(desk.new_lines(), worker=self.name)
        if not self._agent.done() or self._agent.exception() is not None:
            return parcel
        agent = self._agent.result()
        stats = agent.engine.stats
        return replace(
            parcel,
            completer=completer_of(agent),
            isolation=agent.isolation,
            generated_tokens=stats.generated_tokens,
            prompt_tokens=stats.prompt_tokens,
            cached_prompt_tokens=stats.cached_prompt_tokens,
            busy_seconds=stats.busy_seconds,
        )


class Desk:
    """The files of one batch: what is recorded goes in, what is appended comes out.

    Parameters
    ----------
    folder : Path
        Empty.
    orders : sequence of Order
        The batch.
    """

    def __init__(self, folder: Path, orders: Sequence[Order]) -> None:
        self.trajectories = folder / "trajectories.jsonl"
        self.rollouts = folder / "evidence.jsonl"
        self.continuations = folder / "continuations.jsonl"
        self.trajectories.write_bytes("".join(o.trajectories for o in orders).encode())
        self.rollouts.write_bytes("".join(o.rollouts for o in orders).encode())
        self.continuations.touch()
        self._sent = {path: path.stat().st_size for path in (self.trajectories, self.rollouts)}
        self._fingerprints: dict[str, str] = {}
        for order in orders:
            self._learn(order.trajectories)

    def new_lines(self) -> Parcel:
        """Return what was appended since the last time."""
        # Rollouts are looked for first: the trajectories they continue are then there.
        rollouts = self._read(self.rollouts)
        continuations = self._read(self.continuations)
        trajectories = self._read(self.trajectories)
        self._learn(trajectories)
        ids = {r.trajectory_id for r in unpack_lines(Rollout, rollouts) if r.trajectory_id}
        return Parcel(
            worker="",
            trajectories=trajectories,
            continuations=continuations,
            rollouts=rollouts,
            origins={name: self._fingerprints[name] for name in sorted(ids)},
        )

    def _read(self, path: Path) -> str:
        """Read the whole lines behind what was read before."""
        with path.open("rb") as file:
            file.seek(self._sent.get(path, 0))
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._sent[path] = self._sent.get(path, 0) + len(text)
        return text.decode()

    def _learn(self, lines: str) -> None:
        """Remember the fingerprints of trajectories."""
        for trajectory in unpack_lines(Trajectory, lines):
            self._fingerprints[trajectory.trajectory_id] = fingerprint(trajectory)


class _NoBar:
    """Progress that nobody watches: the driver shows it."""

    def advance(self, n: int = 1, **fields: Field) -> None:
        """Show nothing."""

    def grow(self, n: int) -> None:
        """Show nothing."""


def _with_failure(parcel: Parcel, work: Future[None]) -> Parcel:
    """Say in the last parcel of a batch how it ended."""
    error = work.exception()
    if error is None:
        return parcel
    if isinstance(error, InputError):
        return replace(parcel, failure=str(error))
    return replace(
        parcel,
        failure=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
    )
