"""The command ``prm view``: a labelled folder -> one self-contained HTML page to read it with."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from labeling.inputs import LABELS
from labeling.view_page import data_uri, summarise, write_page
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import JsonValue, LabelledTrajectory, StepScores
from trajectory.run import MANIFEST, Manifest, read_manifest
from trajectory.store import read_jsonl, read_labels

_KINDS = ("label", "consensus")
"""Kinds of folders that hold labels."""

_PNG = b"\x89PNG\r\n\x1a\n"
_HEAVY = 100_000_000
"""Bytes from which a page is slow to open, so that the summary suggests --limit."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Make a page that shows labelled trajectories, their values and what they cost."""

    labels: Positional[Path]
    """Folder that `prm label` or `prm consensus` wrote."""
    out: Path
    """HTML file to write; it needs no network and no other file."""
    scores: Path | None = None
    """JSONL file that `prm score` wrote for these trajectories, to show beside the labels."""
    reliability: Path | None = None
    """PNG to show in the summary, such as the reliability.png of `prm evaluate`."""
    limit: int | None = None
    """Show only the first so many trajectories; the summary still covers all."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be >= 1, not {self.limit}")
        if self.out.suffix not in (".html", ".htm"):
            raise InputError(f"--out must name an .html file, not {self.out}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewReport:
    """What was written."""

    trajectories: int
    """In the page's list."""
    left_out: int
    """Not in the list because of ``--limit``."""
    size: int
    """Of the page, bytes."""


def view(config: ViewConfig) -> ViewReport:
    """Write the page and print what is in it.

    Parameters
    ----------
    config : ViewConfig
        Resolved flags.

    Returns
    -------
    ViewReport
        Counts and size.

    Raises
    ------
    InputError
        If an input is missing or of another kind, the scores are of other trajectories, or the
        page cannot be written there.
    """
    manifest = _manifest_of(config.labels)
    rows = read_labels(config.labels / LABELS)
    scores = {} if config.scores is None else _scores_for(config.scores, rows)
    shown = rows[: config.limit]
    summary: dict[str, JsonValue] = {
        **summarise(rows),
        "folder": config.labels.resolve().name,
        "made": _made(manifest, rows),
        "notes": [*_notes(manifest, rows, len(rows) - len(shown))],
        "cost": _cost(manifest, rows),
        "scores": _score_facts(scores, rows) if scores else None,
        "image": None if config.reliability is None else data_uri(_png(config.reliability)),
    }
    _write(config.out, summary, shown, scores)
    report = ViewReport(
        trajectories=len(shown),
        left_out=len(rows) - len(shown),
        size=config.out.stat().st_size,
    )
    _show(config, report)
    return report


def _manifest_of(folder: Path) -> Manifest | None:
    """Return the folder's manifest, if it has one, after checking that it is a labelled folder."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}: give the folder that `prm label --out DIR` wrote")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest is not None and manifest.kind not in _KINDS:
        raise InputError(
            f"{folder} is a folder of kind {manifest.kind!r}: `prm view` shows folders that "
            "`prm label` or `prm consensus` wrote"
        )
    if not (folder / LABELS).is_file():
        if manifest is None:
            raise InputError(f"{folder} holds no {LABELS}: `prm label --out DIR` writes one")
        raise InputError(
            f"{folder} holds no {LABELS} yet, its run is {manifest.status}: run the same "
            f"`prm {manifest.kind}` command again to finish it"
        )
    return manifest


def _scores_for(path: Path, rows: Sequence[LabelledTrajectory]) -> dict[str, StepScores]:
    """Read the scores of these trajectories, by id; scores of others are passed over."""
    steps = {row.trajectory.trajectory_id: row.trajectory.steps for row in rows}
    found: dict[str, StepScores] = {}
    for scores in read_jsonl(path, StepScores):
        name = scores.trajectory_id
        if name not in steps:
            continue
        if name in found:
            raise InputError(f"{path} scores trajectory {name!r} twice: give one PRM's scores")
        if len(scores.values) != len(steps[name]) + 1:
            raise InputError(
                f"{path} has {len(scores.values)} scores for trajectory {name!r}, which has "
                f"{len(steps[name]) + 1} states: score the folder's own trajectories.jsonl"
            )
        calls = [len(one) for one in scores.calls]
        if calls and calls != [len(step.calls) for step in steps[name]]:
            raise InputError(
                f"{path} has scores for {calls} calls in the steps of trajectory {name!r}, which "
                "makes others: score the folder's own trajectories.jsonl"
            )
        if not all(0 <= value <= 1 for one in (scores.values, *scores.calls) for value in one):
            raise InputError(f"{path}: a score of trajectory {name!r} is not in [0, 1]")
        found[name] = scores
    if not found:
        raise InputError(
            f"{path} scores none of the folder's trajectories: score its trajectories.jsonl"
        )
    return found


def _png(path: Path) -> bytes:
    """Read a PNG."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read --reliability {path}: {error.strerror}") from error
    if not content.startswith(_PNG):
        raise InputError(f"--reliability {path} is not a PNG file")
    return content


def _made(manifest: Manifest | None, rows: Sequence[LabelledTrajectory]) -> str:
    """Say in a line how the labels were made, as far as it is recorded."""
    parts = [f"values of {name}" for name in _distinct(row.evidence.completer for row in rows)]
    parts += [f"estimator {name}" for name in _distinct(row.labels.estimator for row in rows)]
    if manifest is None:
        return " · ".join(parts)
    agent = manifest.config.get("agent")
    for source, key, text in (
        (agent, "tasks", "tasks {}"),
        (manifest.config, "strategy", "strategy {}"),
        (manifest.config, "rollouts", "rollouts per state: {}"),
        (manifest.config, "level", "interval level {}"),
        (manifest.config, "truncated", "cut-off rollouts: {}"),
    ):
        value = source.get(key) if isinstance(source, Mapping) else None
        if value is not None:
            parts.append(text.format(value))
    return " · ".join([*parts, f"begun {manifest.started}"])


def _distinct(names: Iterable[str]) -> list[str]:
    """Return the distinct names, the first three if there are many."""
    found = list(dict.fromkeys(names))
    return found[:3] + ([f"{len(found) - 3} others"] if len(found) > 3 else [])


def _notes(
    manifest: Manifest | None, rows: Sequence[LabelledTrajectory], left_out: int
) -> list[str]:
    """Say what the page does not show."""
    notes = []
    if left_out:
        notes.append(
            f"The list holds the first {len(rows) - left_out} of {len(rows)} trajectories: --limit "
            f"left out {left_out}. The summary covers all."
        )
    if manifest is None:
        notes.append(
            f"The folder has no {MANIFEST}, so what the rollouts cost in all is not known."
        )
        return notes
    if manifest.status != "finished":
        notes.append(f"The labelling run is {manifest.status}, not finished.")
    if manifest.kind == "consensus":
        notes.append(
            "Labels of `prm consensus`: values are unknown where its sources reach no verdict, and "
            "what the rollouts cost stands with the labels that it was made from."
        )
    failed = manifest.counts.get("trajectories_failed", 0)
    if failed:
        notes.append(
            f"{failed} trajectories that broken infrastructure ended have no labels and are not "
            "shown."
        )
    return notes


def _cost(manifest: Manifest | None, rows: Sequence[LabelledTrajectory]) -> list[JsonValue]:
    """Return what was labelled and what it cost, as names and values.

    Tokens per trajectory count the rollouts of a task's shared first state once for each of its
    trajectories, so only the run's own counts say what was spent.
    """
    counts = {} if manifest is None else manifest.counts
    states = sum(len(row.labels.values) for row in rows)
    facts = {"trajectories": f"{len(rows):,}", "states": f"{states:,}"}
    for name, key in (("rollouts", "rollouts"), ("rollout tokens", "tokens")):
        facts[name] = f"{counts[key]:,}" if key in counts else "unknown"
    if "tokens" in counts and states:
        facts["tokens per state"] = f"{counts['tokens'] / states:,.1f}"
    written = sum(row.trajectory.num_generated_tokens for row in rows)
    facts["step tokens"] = f"{written:,}" if written else "unknown"
    return [[name, value] for name, value in facts.items()]


def _score_facts(
    scores: Mapping[str, StepScores], rows: Sequence[LabelledTrajectory]
) -> list[JsonValue]:
    """Say which reward model's scores are shown, and for how many trajectories."""
    first = next(iter(scores.values()))
    others = {s.checkpoint for s in scores.values()} - {first.checkpoint}
    more = f" and {len(others)} others" if others else ""
    return [
        ["model", f"{first.checkpoint[:12]}{more}"],
        ["kind", first.kind],
        ["after", first.position],
        ["scored", f"{len(scores):,} of {len(rows):,}"],
    ]


def _write(
    out: Path,
    summary: Mapping[str, JsonValue],
    rows: Sequence[LabelledTrajectory],
    scores: Mapping[str, StepScores],
) -> None:
    """Replace the page as a whole."""
    if out.is_dir():
        raise InputError(f"{out} is a folder: give a file for the page")
    try:
        with (
            atomic_path(out) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):
            write_page(file, summary, rows, scores)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # not the input's fault: the command line says what to do
        raise InputError(f"cannot write {out}: {error.strerror}") from error


def _show(config: ViewConfig, report: ViewReport) -> None:
    """Print what was written."""
    lines = [f"{config.out}: {report.trajectories} trajectories, {report.size / 1e6:.1f} MB"]
    if report.left_out:
        lines.append(f"left out by --limit: {report.left_out} trajectories; the page says so")
    if report.size > _HEAVY:
        lines.append("a page of this size opens slowly: --limit N lists the first N only")
    console = Console(soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False, markup=False)
