"""What the driver of a spread labelling run and its workers send each other, as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from labeling.states import state_digests
from trajectory.codec import from_json
from trajectory.records import Task, Trajectory
from trajectory.store import encode_line

RecordT = TypeVar("RecordT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One task to work on, with what is recorded of it, so that a half-finished one resumes."""

    task: Task
    sample: bool
    """Whether trajectories are sampled; else the recorded ones are all that are labelled."""
    trajectories: str = ""
    """Recorded trajectories, one JSON line each."""
    rollouts: str = ""
    """Recorded rollouts, one JSON line each."""
    completer: str = ""
    """Who wrote the rollouts of the run so far; empty if nobody did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """New lines of a worker, and how it is doing."""

    worker: str
    """Machine and process."""
    completer: str = ""
    """Model and weights that write the rollouts; empty if they could not be loaded."""
    isolation: str = ""
    """Isolation of the sandbox behind the tools; empty if none of them runs code."""
    trajectories: str = ""
    """New trajectories, one JSON line each; to be written before the rollouts."""
    continuations: str = ""
    """With ``--keep-continuations``: the rollouts as trajectories."""
    rollouts: str = ""
    """New rollouts, one JSON line each."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Trajectory id to `fingerprint`, for every trajectory that these rollouts continue."""
    generated_tokens: int = 0
    """By the worker's engine since it was made, as all of the following."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    busy_seconds: float = 0.0
    failure: str | None = None
    """Why the worker gave up what it was working on; None as long as it did not."""
    traceback: str = ""
    """Where it failed, if the failure is a fault of the program."""


def fingerprint(trajectory: Trajectory) -> str:
    """Return a digest of what was said and seen: equal ones have the same states to continue.

    A task that is begun again after its worker died may get other trajectories under the same ids
    (a sample can depend on what else is in an engine's batch), and rollouts of those are not
    rollouts of the recorded ones.
    """
    digests = state_digests(trajectory.task.task_id, trajectory.steps, "text")
    return digests[-1] if digests else ""


def pack(record: object) -> str:
    """Turn a record into text."""
    return encode_line(record).decode()


def unpack(cls: type[RecordT], text: str) -> RecordT:
    """Turn the text of `pack` into the record.

    Examples
    --------
    >>> unpack(Parcel, pack(Parcel(worker="a:1"))).worker
    'a:1'
    """
    return from_json(cls, json.loads(text))


def pack_lines(records: Iterable[object]) -> str:
    """Turn records into JSON lines."""
    return "".join(map(pack, records))


def unpack_lines(cls: type[RecordT], text: str) -> Iterator[RecordT]:
    """Read records from JSON lines."""
    for line in text.split("\n"):
        if line:
            yield unpack(cls, line)
