"""Reads the folders that other commands wrote, and says in a sentence what is wrong with one."""

from __future__ import annotations

from pathlib import Path

from trajectory.errors import InputError
from trajectory.records import LabelledTrajectory
from trajectory.run import MANIFEST, Manifest, read_manifest
from trajectory.store import read_labels

LABELS = "labels.parquet"


def read_labels_folder(folder: Path) -> list[LabelledTrajectory]:
    """Read the labelled trajectories of a folder.

    Raises
    ------
    InputError
        If the folder is missing or of another kind, or its labels are damaged, empty or name a
        trajectory twice.
    """
    offer = "give the folder that `prm label --out` wrote"
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"--labels: {folder} {kind}: {offer}")
    path = folder / LABELS
    if not path.is_file():
        raise InputError(f"--labels: {folder} holds no {LABELS}{_made_by(folder)}: {offer}")
    rows = read_labels(path)
    if not rows:
        raise InputError(f"{path} holds no trajectory: {offer} after it labelled some")
    seen: set[str] = set()
    for row in rows:
        name = row.trajectory.trajectory_id
        if name in seen:
            raise InputError(f"{path} holds trajectory {name!r} twice: give each its own id")
        seen.add(name)
    return rows


def read_finished(folder: Path, *, flag: str, kind: str, file: str) -> Manifest:
    """Read the manifest of a finished run of a certain command.

    Parameters
    ----------
    folder : Path
        The run's folder.
    flag : str
        How the user named it, for messages.
    kind : str
        Command family, for example ``judge``.
    file : str
        What the folder must hold.

    Raises
    ------
    InputError
        If the folder is missing, of another kind, or not finished.
    """
    offer = f"give the folder that `prm {kind} --out` wrote"
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{flag}: {folder} {reason}: {offer}")
    if not (folder / MANIFEST).is_file() or read_manifest(folder).kind != kind:
        raise InputError(f"{flag}: {folder} is not of `prm {kind}`{_made_by(folder)}: {offer}")
    manifest = read_manifest(folder)
    if manifest.status != "finished" or not (folder / file).is_file():
        raise InputError(
            f"{flag}: {folder} is not finished (it is {manifest.status}): run its "
            f"`prm {kind}` command again first"
        )
    return manifest


def _made_by(folder: Path) -> str:
    """Name the command that made a folder, if it says so."""
    if not (folder / MANIFEST).is_file():
        return ""
    return f" (it is of the command `{read_manifest(folder).kind}`)"
