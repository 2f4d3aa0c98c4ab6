"""Spreads a labelling run over the workers of a Ray cluster, by Ray Data.

One row per task that is not finished, `ray_tasks_per_batch` rows to a call of a worker, two calls
at a time in each, so that the end of one batch does not leave the engine idle. What workers send
is written here, by one process, as it comes. If a worker or node dies, Ray starts another one and
sends the batch again; what did not come through is found missing afterwards and is the next pass.
Nothing depends on which worker does what: seeds follow from keys.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, floor, inf
from typing import Any

from agent.engines.base import Engine
from labeling.config import LabelConfig, RunnerConfig
from labeling.intake import Intake
from labeling.parcels import Order, Parcel, pack, unpack
from labeling.ray_worker import LabelWorker
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import Task

BATCHES_AT_ONCE = 2
"""Batches that a worker has at a time."""
CONNECT_WITHIN_S = 10.0
"""Longest wait for a cluster's head to accept a connection, seconds."""
PASS_BYTES = 256 * 2**20
"""Most text sent to the cluster in one pass, so that memory does not grow with the run; more
follows in the next pass."""


def check_ray() -> None:
    """Refuse if Ray is not there.

    Raises
    ------
    InputError
        If it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "--runner ray needs the package ray: install this package with the extra 'ray' (pip "
            "install 'toolprm[ray]')"
        )


def collect_on_ray(
    config: LabelConfig, tasks: Sequence[Task], intake: Intake, *, engine: Engine | None = None
) -> int:
    """Run every episode that is missing on a Ray cluster.

    Parameters
    ----------
    config : LabelConfig
        Settings of the run.
    tasks : sequence of Task
        Tasks to sample trajectories for; none if all trajectories are given.
    intake : Intake
        Takes what comes.
    engine : Engine, optional
        Every worker uses a copy of this engine instead of making the one the config names; it
        must be picklable.

    Returns
    -------
    int
        Workers.

    Raises
    ------
    InputError
        If there is no such cluster or it has no room, a worker gives up (its policy cannot be
        loaded, its engine or tools stop working), or workers die before they bring anything;
        what came until then is kept.
    """
    from ray.exceptions import RayError

    with _connected(config.runner):
        workers, gpus = _pool(config)
        with progress("rollouts", intake.expected(tasks), done=intake.rollouts) as bar:
            while batches := list(_batches(config, intake.missing(tasks), workers)):
                before, cause = intake.written, "they sent nothing"
                try:
                    for parcel in _parcels(config, batches, workers, gpus, engine):
                        intake.take(parcel, bar)
                except RayError as error:
                    cause = _first_line(error)
                if intake.written == before:
                    raise InputError(
                        f"the workers on Ray brought nothing in a whole pass: {cause}; what came "
                        "before is saved: repair it and run the same command again to resume"
                    )
    return workers


def _batches(config: LabelConfig, orders: Iterator[Order], workers: int) -> Iterator[str]:
    """Pack orders into batches, as many as one pass takes; none empty."""
    packed: list[str] = []
    size = 0
    for order in orders:
        packed.append(pack(order))
        size += len(packed[-1])
        if size >= PASS_BYTES:
            break
    # Few tasks are spread over all workers.
    fair = ceil(len(packed) / (workers * BATCHES_AT_ONCE))
    step = max(1, min(config.runner.ray_tasks_per_batch, fair))
    for start in range(0, len(packed), step):
        yield "".join(packed[start : start + step])


def _parcels(
    config: LabelConfig, batches: Sequence[str], workers: int, gpus: float, engine: Engine | None
) -> Iterator[Parcel]:
    """Have the workers label batches, and yield what they send."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # every parcel goes out by itself, at once
    with DataContext.current(context):
        rows = from_items([{"orders": text} for text in batches], override_num_blocks=len(batches))
        sent = rows.map_batches(
            LabelWorker,
            fn_constructor_kwargs={"config": config, "engine": engine},
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(
                size=min(workers, len(batches)),
                max_tasks_in_flight_per_actor=BATCHES_AT_ONCE,
                max_concurrent_calls_per_actor=BATCHES_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=config.runner.ray_cpus,
            num_gpus=gpus or None,
        )
    for batch in sent.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for text in batch["parcel"]:
            yield unpack(Parcel, str(text))


@contextmanager
def _connected(runner: RunnerConfig) -> Iterator[None]:
    """Be connected to the cluster; one that was started here ends with the block."""
    _quiet_ray()
    import ray

    if ray.is_initialized():  # a program that calls `label` has chosen its cluster
        yield
        return
    where: dict[str, Any] = {"address": runner.ray_address}
    if runner.ray_address == "auto-local":
        where = {"address": "local", "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        _knock(runner.ray_address)
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot reach the Ray cluster --ray-address {runner.ray_address}: {_first_line(error)}"
        ) from error
    finally:
        # Ray puts a handler of its own that exits without a word.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail at once if nothing listens at an address: Ray itself tries for minutes.

    Raises
    ------
    OSError
        If it cannot be connected to.
    ValueError
        If it is not of the form HOST:PORT.
    """
    if address in ("auto", "auto-local"):
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise ValueError("give HOST:PORT of the head node, auto or auto-local")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()


def _quiet_ray() -> None:
    """Keep Ray's own messages to its log files: what a user must know comes as one sentence."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray.data  # noqa: F401 - sets the loggers up

    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)


def _pool(config: LabelConfig) -> tuple[int, float]:
    """Return how many workers there will be, and the GPUs of each.

    Raises
    ------
    InputError
        If the cluster has no room for them.
    """
    import ray

    runner = config.runner
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = runner.ray_gpus
    if gpus is None:
        inside = config.agent.engine in ("transformers", "vllm") and config.agent.device != "cpu"
        gpus = 1.0 if inside and any(node.get("GPU") for node in nodes) else 0.0
    room = sum(
        floor(min(n.get("CPU", 0) / runner.ray_cpus, n.get("GPU", 0) / gpus if gpus else inf))
        for n in nodes
    )
    workers = runner.ray_workers or max(1, room if gpus else min(room, len(nodes)))
    if workers > room:
        each = f"{runner.ray_cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise InputError(
            f"the Ray cluster has room for {room} workers of {each}, not for {workers}: lower "
            "--ray-workers, --ray-cpus or --ray-gpus, or add nodes"
        )
    return workers, gpus


def _first_line(error: BaseException) -> str:
    """Return what an error says, without the traceback that Ray puts into it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
