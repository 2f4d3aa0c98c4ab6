"""Public formats of step-labelled trajectories, in and (where they can hold it) out.

Adding a format is one module with a ``read`` and one row in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory
from trajectory.step_formats import (
    agentprocessbench,
    intercode,
    math_shepherd,
    messages,
    prm800k,
    prmbench,
    processbench,
    trl,
)
from trajectory.step_formats.rated import Neutral, RatedTrajectory, to_labelled

__all__ = [
    "FORMATS",
    "Format",
    "Neutral",
    "RatedTrajectory",
    "parse_spec",
    "read_labelled",
    "read_ratings",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One way to write step-labelled trajectories down."""

    gives: Literal["labels", "counts", "either"]
    """What a row says of a step: whether it is right, or how often the task was solved from it."""
    read: Callable[[Path], Iterator[RatedTrajectory]]
    write: Callable[[Path, Iterable[LabelledTrajectory]], int] | None = None
    """None where our records do not hold what the format needs."""


FORMATS: dict[str, Format] = {
    trl.NAME: Format(gives="labels", read=trl.read, write=trl.write),
    processbench.NAME: Format(gives="labels", read=processbench.read, write=processbench.write),
    prm800k.NAME: Format(gives="labels", read=prm800k.read),
    math_shepherd.NAME: Format(gives="labels", read=math_shepherd.read, write=math_shepherd.write),
    agentprocessbench.NAME: Format(gives="labels", read=agentprocessbench.read),
    prmbench.NAME: Format(gives="labels", read=prmbench.read),
    intercode.NAME: Format(gives="counts", read=intercode.read),
    messages.NAME: Format(gives="either", read=messages.read, write=messages.write),
}


def parse_spec(spec: str) -> tuple[str, Path]:
    """Split ``FORMAT:PATH``.

    Raises
    ------
    InputError
        If there is no such format; the message lists them.

    Examples
    --------
    >>> parse_spec("processbench:data/math.jsonl")[0]
    'processbench'
    """
    name, colon, path = spec.partition(":")
    if not colon or not path or name not in FORMATS:
        raise InputError(
            f"--data {spec}: give FORMAT:PATH, with one of the formats {', '.join(FORMATS)}"
        )
    return name, Path(path)


def read_ratings(spec: str) -> list[RatedTrajectory]:
    """Read all trajectories of ``FORMAT:PATH`` with their ratings, neutral ones as such.

    Raises
    ------
    InputError
        If the format is unknown, a row is malformed, two trajectories share an id, or there is
        none.
    """
    name, path = parse_spec(spec)
    rows = list(FORMATS[name].read(path))
    if not rows:
        raise InputError(f"{path} holds no rows of format {name}")
    places: dict[str, str] = {}
    for row in rows:
        known = places.setdefault(row.trajectory.trajectory_id, row.place)
        if known != row.place:
            raise InputError(
                f"{row.place}: {row.trajectory.trajectory_id} is the id of the row at {known} too: "
                "ids must differ"
            )
    return rows


def read_labelled(spec: str, *, neutral: Neutral | None = None) -> list[LabelledTrajectory]:
    """Read all trajectories of ``FORMAT:PATH`` as training rows; see `rated.to_labelled`."""
    return to_labelled(read_ratings(spec), neutral=neutral)
