"""Curves and tables of a run: Weights & Biases, plain JSONL files, or nothing.

Either way the run has an id, kept in ``tracking.json`` of its folder, so a resumed run continues
its own curves. A run resumed from a checkpoint logs some steps again: the last entry of a step
counts, and `read_metrics` returns just that one.
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from trajectory.errors import InputError
from trajectory.records import JsonValue, StepScores, Trajectory
from trajectory.store import JsonlWriter, atomic_path, read_jsonl, repair_tail, write_jsonl

if TYPE_CHECKING:
    import wandb

TrackerKind: TypeAlias = Literal["wandb", "jsonl", "none"]

METRICS = "metrics.jsonl"
PROJECT = "toolprm"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsEntry:
    """One line of ``metrics.jsonl``."""

    step: int
    metrics: Mapping[str, float | None]
    """Name to value; None where it was not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One step of one trajectory, for reading by eye."""

    trajectory_id: str
    prompt: str
    step: int
    """1..S."""
    text: str
    calls: str
    observations: str
    score_before: float | None
    """PRM value of the prefix before the step; None without a PRM."""
    score_after: float | None
    outcome: float | None
    """Of the whole trajectory."""


class Tracker(Protocol):
    """Where a run's curves go."""

    run_id: str
    """Stable over resumptions; empty if nothing is tracked."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step; steps may repeat after a resumption."""
        ...

    def table(
        self, name: str, trajectories: Sequence[Trajectory], scores: Sequence[StepScores] | None
    ) -> None:
        """Record trajectories, a row per step, with PRM scores if given (in the same order)."""
        ...

    def close(self) -> None:
        """Finish writing; may be called twice."""
        ...


def make_tracker(
    kind: TrackerKind, *, out: Path, name: str, config: Mapping[str, JsonValue]
) -> Tracker:
    """Open the tracker of a run folder.

    Parameters
    ----------
    kind : {"wandb", "jsonl", "none"}
        ``wandb`` honours ``WANDB_MODE=offline`` and keeps its files in ``out``; ``jsonl`` writes
        ``metrics.jsonl`` and ``tables/NAME.jsonl``.
    out : Path
        The run folder.
    name : str
        Name of the run, for people.
    config : mapping
        Every setting of the run.

    Raises
    ------
    InputError
        If the kind is unknown, or W&B is neither logged in nor offline.
    """
    if kind == "none":
        return NoTracker()
    if kind == "jsonl":
        return JsonlTracker(out)
    if kind == "wandb":
        return WandbTracker(out, name=name, config=config)
    raise InputError(f"unknown tracker {kind!r}: the trackers are wandb, jsonl, none")


def read_metrics(folder: str | Path) -> list[MetricsEntry]:
    """Read the curves of a run folder: the last entry of each step, in step order."""
    entries = read_jsonl(Path(folder) / METRICS, MetricsEntry, tail="drop")
    latest = {entry.step: entry for entry in entries}
    return [latest[step] for step in sorted(latest)]


def table_rows(
    trajectories: Sequence[Trajectory], scores: Sequence[StepScores] | None
) -> list[TableRow]:
    """Lay trajectories out as one row per step.

    Raises
    ------
    ValueError
        If the scores are not those of the trajectories, in their order.
    """
    aligned: Sequence[StepScores | None] = [None] * len(trajectories) if scores is None else scores
    rows = []
    for trajectory, score in zip(trajectories, aligned, strict=True):
        if score is not None and (
            score.trajectory_id != trajectory.trajectory_id
            or len(score.values) != trajectory.num_steps + 1
        ):
            raise ValueError(
                f"{trajectory.trajectory_id}: the scores are of {score.trajectory_id} with "
                f"{len(score.values)} prefixes"
            )
        for index, step in enumerate(trajectory.steps):
            rows.append(
                TableRow(
                    trajectory_id=trajectory.trajectory_id,
                    prompt=trajectory.task.prompt,
                    step=index + 1,
                    text=step.text,
                    calls="\n".join(f"{c.name} {c.arguments}" for c in step.calls),
                    observations="\n".join(o.content for o in step.observations),
                    score_before=None if score is None else score.values[index],
                    score_after=None if score is None else score.values[index + 1],
                    outcome=trajectory.outcome,
                )
            )
    return rows


class NoTracker:
    """Records nothing."""

    run_id = ""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def table(
        self, name: str, trajectories: Sequence[Trajectory], scores: Sequence[StepScores] | None
    ) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class JsonlTracker:
    """Writes curves and tables as JSONL files in the run folder."""

    def __init__(self, out: Path) -> None:
        self.run_id = _run_id(out)
        self._out = out
        repair_tail(out / METRICS)
        self._writer = JsonlWriter(out / METRICS)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        values = {
            name: float(value) if math.isfinite(value) else None for name, value in metrics.items()
        }
        self._writer.append(MetricsEntry(step=step, metrics=values))

    def table(
        self, name: str, trajectories: Sequence[Trajectory], scores: Sequence[StepScores] | None
    ) -> None:
        """Replace ``tables/NAME.jsonl``."""
        write_jsonl(self._out / "tables" / f"{name}.jsonl", table_rows(trajectories, scores))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbTracker:
    """Sends curves and tables to Weights & Biases, or keeps them for ``wandb sync`` if offline."""

    def __init__(self, out: Path, *, name: str, config: Mapping[str, JsonValue]) -> None:
        import wandb

        self.run_id = _run_id(out)
        self._wandb = wandb
        try:
            self._run: wandb.Run | None = wandb.init(
                project=PROJECT,
                name=name,
                id=self.run_id,
                resume="allow",
                dir=str(out),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.UsageError as error:
            raise InputError(
                "--track wandb needs a login: run `wandb login`, or set WANDB_MODE=offline to keep "
                "the files and send them later with `wandb sync`"
            ) from error
        if self._run.url:
            print(f"curves: {self._run.url}", file=sys.stderr)  # noqa: T201 - people want it
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one point of every curve."""
        self._open_run().log({**metrics, "step": step})

    def table(
        self, name: str, trajectories: Sequence[Trajectory], scores: Sequence[StepScores] | None
    ) -> None:
        """Log a W&B table."""
        columns: list[str | int] = list(TableRow.__dataclass_fields__)
        rows = table_rows(trajectories, scores)
        data = [[getattr(row, str(column)) for column in columns] for row in rows]
        self._open_run().log({name: self._wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open_run(self) -> wandb.Run:
        """Return the run while it is open."""
        if self._run is None:
            raise ValueError("the tracker is closed")
        return self._run


def _run_id(out: Path) -> str:
    """Read the run's id, or make and keep one."""
    path = out / "tracking.json"
    if path.exists():
        try:
            return str(json.loads(path.read_text())["run_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: delete it to begin new curves") from error
    run_id = uuid.uuid4().hex[:12]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"run_id": run_id}) + "\n")
    return run_id
