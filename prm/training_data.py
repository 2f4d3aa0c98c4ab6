"""Where ``prm train`` gets its rows from: labels of ``prm label``, or a public data set."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prm.checkpoint import Provenance
from prm.data import Example
from prm.heads import Head
from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory
from trajectory.seeds import derive_seed
from trajectory.step_formats import FORMATS, Neutral, parse_spec, read_labelled
from trajectory.store import read_labels


@dataclass(frozen=True, kw_only=True)
class PublicData:
    """Training rows in a public format, instead of labels of `prm label`."""

    data: str | None = None
    """FORMAT:PATH, instead of --labels: trl, processbench, prm800k, math_shepherd,
    agentprocessbench, prmbench, intercode or messages. A folder stands for the files in it."""
    neutral: Neutral | None = None
    """What steps rated neutral are: good, bad, or masked (no label). Needed where there are any."""
    shuffle_labels: bool = False
    """Deal the labels out anew at random: a control that has learned no content. prm.json says
    so."""

    def __post_init__(self) -> None:
        if self.data is not None:
            parse_spec(self.data)
        elif self.neutral is not None:
            raise InputError("--neutral says what neutral steps of --data are: it needs --data")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """Rows to train on and where they came from."""

    rows: list[LabelledTrajectory]
    source: str
    """The labels folder, or FORMAT:PATH."""
    path: Path
    """File or folder to hash."""


def load_rows(labels: Path | None, public: PublicData) -> TrainingRows:
    """Read the rows of the one source that is given.

    Raises
    ------
    InputError
        If they are unusable; names file and line.
    """
    if labels is not None:
        path = Path(labels) / "labels.parquet"
        return TrainingRows(rows=read_labels(path), source=str(labels), path=path)
    assert public.data is not None
    rows = read_labelled(public.data, neutral=public.neutral)
    return TrainingRows(rows=rows, source=public.data, path=parse_spec(public.data)[1])


def provenance_of(
    rows: Sequence[LabelledTrajectory],
    public: PublicData,
    *,
    source: str,
    parents: Mapping[str, str],
) -> Provenance:
    """Record where labels came from.

    Parameters
    ----------
    rows : sequence of LabelledTrajectory
        What `load_rows` read.
    public : PublicData
        How they were read.
    source : str
        The labels folder, or FORMAT:PATH.
    parents : mapping of str to str
        Path to sha256 of everything that goes into training.
    """
    return Provenance(
        labels=source,
        neutral=public.neutral,
        shuffled_labels=public.shuffle_labels,
        parents=parents,
        estimators=tuple(sorted({row.labels.estimator for row in rows})),
        completers=tuple(sorted({row.evidence.completer for row in rows})),
    )


def why_unusable(head: Head, public: PublicData) -> str:
    """Say why a head found no target in the rows, and what to do."""
    if public.data is None:
        return "label them with more rollouts"
    name, _ = parse_spec(public.data)
    gives = FORMATS[name].gives
    if head.kind == "value" and gives == "labels":
        return (
            f"{name} says whether steps are right, not how often the task is solved from them: "
            f"head {head.name!r} needs counts or outcomes; use --head binary"
        )
    return f"its rows hold no label that head {head.name!r} can use"


def shuffle_labels(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """Deal the targets of all labelled prefixes out anew among them.

    Parameters
    ----------
    examples : sequence of Example
        With counts, labels or both.
    seed : int
        The same seed deals alike.

    Returns
    -------
    list of Example
        The same texts and the same labelled places; (label, rollouts, correct) of a place come
        from a random place, so the base rate stays and nothing else can be learned.
    """
    places = [
        (row, prefix)
        for row, e in enumerate(examples)
        for prefix in range(len(e.positions))
        if e.rollouts[prefix] or e.values[prefix] is not None
    ]
    targets = [
        (examples[r].values[p], examples[r].rollouts[p], examples[r].correct[p]) for r, p in places
    ]
    random.Random(derive_seed("shuffle-labels", seed)).shuffle(targets)  # noqa: S311 - no security
    dealt: list[list[tuple[float | None, int, int]]] = [
        [(None, 0, 0)] * len(e.positions) for e in examples
    ]
    for (row, prefix), target in zip(places, targets, strict=True):
        dealt[row][prefix] = target
    return [
        replace(
            e,
            values=tuple(v for v, _, _ in new),
            rollouts=tuple(n for _, n, _ in new),
            correct=tuple(c for _, _, c in new),
        )
        for e, new in zip(examples, dealt, strict=True)
    ]
