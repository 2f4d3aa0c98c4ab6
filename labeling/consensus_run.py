"""The command ``prm consensus``: rollouts, judge and oracle -> filtered labels and a report.

It computes in memory and replaces whole files, so there is nothing to resume: an interrupted run
is run again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from labeling.consensus import (
    POLICIES,
    SOURCES,
    Consensus,
    Evidence,
    Ternary,
    combine,
    filtered,
    lost_at,
    progress_signs,
)
from labeling.disagreement import Disagreement, report
from labeling.inputs import LABELS, read_finished, read_labels_folder
from labeling.judge import Abstention, Judgement, Verdict, data_mark, majority
from labeling.judge_run import JUDGEMENTS, read_judgements
from labeling.oracle import execution_oracle
from trajectory.atomic import atomic_path
from trajectory.codec import to_json
from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory
from trajectory.run import config_dict, open_run
from trajectory.store import write_jsonl, write_labels

CONSENSUS = "consensus.jsonl"
DISAGREEMENT = "disagreement.json"


@dataclass(frozen=True, kw_only=True)
class ConsensusConfig:
    """Combine rollouts, a judge and the execution oracle, and say where they disagree."""

    labels: Path
    """Folder that `prm label` wrote."""
    out: Path
    """Folder for consensus.jsonl, labels.parquet, disagreement.json and manifest.json."""
    judgements: Path | None = None
    """Folder that `prm judge` wrote about these labels; no judge when not given."""
    policy: str = "unanimous"
    """unanimous (rollouts and judge name the same first error), majority (of the sources that
    speak), or rollouts-first (the judge where rollouts are undecided)."""
    examples: int = 20
    """Most contradictory steps listed in disagreement.json."""
    seed: int = 0
    """Of the bootstrap intervals."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"unknown policy {self.policy!r}: choose from {', '.join(POLICIES)}")
        if self.examples < 0:
            raise InputError(f"--examples must be >= 0, not {self.examples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What a folder of judgements says."""

    steps: dict[tuple[str, int], Ternary]
    """Majority of the votes by (trajectory id, step)."""
    votes: dict[str, int]
    """Votes in all, and abstentions by reason."""


def consensus(config: ConsensusConfig) -> Disagreement:
    """Combine the sources, write the folder and print a short table.

    Returns
    -------
    Disagreement
        Content of ``disagreement.json``.

    Raises
    ------
    InputError
        On bad input.
    """
    rows = read_labels_folder(config.labels)
    parents = [config.labels / LABELS]
    judged = None
    if config.judgements is not None:
        judged = _read_judged(config.judgements, rows)
        parents.append(config.judgements / JUDGEMENTS)
    with open_run(config.out, kind="consensus", config=config_dict(config), parents=parents) as run:
        combined = [
            combine(row.trajectory.trajectory_id, gather(row, judged), config.policy)
            for row in rows
        ]
        found = report(
            rows,
            combined,
            policy=config.policy,
            votes=judged.votes if judged else {},
            examples=config.examples,
            seed=config.seed,
        )
        kept = _write(run.path, rows, combined, found)
        run.finish(
            {
                "trajectories": len(rows),
                "steps": found.steps,
                "steps_kept": found.steps - found.consensus["none"],
                "steps_without_consensus": found.consensus["none"],
                "trajectories_without_consensus": len(rows) - kept,
            }
        )
    _show(found, Console())
    return found


def gather(row: LabelledTrajectory, judged: Judged | None) -> Evidence:
    """Ask every source about one trajectory."""
    trajectory, labels = row.trajectory, row.labels
    name = trajectory.trajectory_id
    steps = range(1, trajectory.num_steps + 1)
    successes = (
        None if value is None else count
        for value, count in zip(labels.values, row.evidence.correct, strict=True)
    )
    return Evidence(
        rollouts=progress_signs(labels),
        oracle=tuple(step.value for step in execution_oracle(trajectory)),
        judge=None if judged is None else tuple(judged.steps.get((name, t)) for t in steps),
        lost_at=lost_at(list(successes)),
    )


def _read_judged(folder: Path, rows: Sequence[LabelledTrajectory]) -> Judged:
    """Read judgements and make sure that they are about these trajectories."""
    read_finished(folder, flag="--judgements", kind="judge", file=JUDGEMENTS)
    trajectories = {row.trajectory.trajectory_id: row.trajectory for row in rows}
    marks: dict[tuple[str, int], str] = {}
    votes: dict[tuple[str, int], list[Verdict | None]] = {}
    counts: Counter[str] = Counter()
    seen: set[tuple[str, int, int]] = set()
    for judgement in read_judgements(folder / JUDGEMENTS):
        place = (judgement.trajectory_id, judgement.step)
        trajectory = trajectories.get(judgement.trajectory_id)
        if trajectory is None or judgement.step > trajectory.num_steps:
            raise InputError(_foreign(folder, judgement, "the labels have no such step"))
        if place not in marks:
            marks[place] = data_mark(trajectory, judgement.step)
        if marks[place] != judgement.data:
            raise InputError(_foreign(folder, judgement, "in the labels it reads otherwise"))
        if judgement.key in seen:
            continue
        seen.add(judgement.key)
        votes.setdefault(place, []).append(judgement.verdict)
        counts["votes"] += 1
        if judgement.abstention is not None:
            counts[f"abstained_{judgement.abstention.value}"] += 1
    names = ["votes", *(f"abstained_{reason.value}" for reason in Abstention)]
    return Judged(
        steps={place: majority(said) for place, said in votes.items()},
        votes={name: counts[name] for name in names},
    )


def _foreign(folder: Path, judgement: Judgement, why: str) -> str:
    """Say that judgements belong to other labels."""
    return (
        f"--judgements: {folder} judged step {judgement.step} of {judgement.trajectory_id!r}, but "
        f"{why}: give the judgements of these labels"
    )


def _write(
    out: Path,
    rows: Sequence[LabelledTrajectory],
    combined: Sequence[Consensus],
    found: Disagreement,
) -> int:
    """Write the folder and return how many trajectories have a step with a verdict."""
    write_jsonl(out / CONSENSUS, combined)
    write_labels(out / LABELS, map(filtered, rows, combined))
    with atomic_path(out / DISAGREEMENT) as temporary:
        temporary.write_text(json.dumps(to_json(found), indent=2, ensure_ascii=False) + "\n")
    return sum(any(step.verdict is not None for step in one.steps) for one in combined)


def _show(found: Disagreement, console: Console) -> None:
    """Print what was said and how far the sources agree."""
    answers = list(found.consensus)
    said = Table(title=f"{found.steps} steps of {found.trajectories} trajectories")
    for name in ("", *answers):
        said.add_column(name, justify="right" if name else "left")
    for name in SOURCES:
        said.add_row(name, *(str(found.sources[name][answer]) for answer in answers))
    kept = (str(found.consensus[answer]) for answer in answers)
    said.add_row(f"consensus ({found.policy})", *kept, style="bold")
    console.print(said)
    pairs = Table(title="agreement")
    for name in ("", "both spoke", "same", "kappa [95 % interval]"):
        pairs.add_column(name, justify="right" if name else "left")
    for pair in found.pairs:
        kappa = pair.kappa
        shown = kappa.reason or ""
        if kappa.value is not None:
            ends = f" [{kappa.low:.2f}, {kappa.high:.2f}]" if kappa.low is not None else ""
            shown = f"{kappa.value:.2f}{ends or f' ({kappa.reason})'}"
        pairs.add_row(f"{pair.first}, {pair.second}", str(pair.both_spoke), str(pair.same), shown)
    console.print(pairs)
    first = found.first_errors
    console.print(
        f"first error, rollouts and judge: the same in {first.same} of {first.both_known} "
        f"trajectories where both name one or none",
        soft_wrap=True,
    )
