"""Run folders: a manifest that says what made the artifact, a lock, and safe resumption.

A folder belongs to one run: one kind of command with one configuration and the same inputs. The
same command again resumes it; anything else is refused. ``manifest.json`` is replaced as a whole,
so it is readable at any moment. A new run that is refused before it wrote anything takes its
manifest back, so that the corrected command may use the folder. The lock is held by the kernel for
the life of the process, so not even ``kill -9`` leaves it behind.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from trajectory.atomic import atomic_path
from trajectory.codec import from_json, to_json
from trajectory.errors import InputError
from trajectory.provenance import git_commit, package_versions
from trajectory.records import JsonValue

MANIFEST = "manifest.json"
_LOCK = ".lock"
SCHEMA_VERSION = "1.0"
"""``major.minor`` of manifest and records; other majors are refused."""

_NOT_CONTENT = {MANIFEST, "metrics.jsonl", "tracking.json", "tables", "wandb", "evaluation"}
"""Names that say how a folder came about; a parent's hash passes over them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """An artifact this one was made from."""

    path: str
    sha256: str
    """Hash of the file, or of the names and hashes of the folder's files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What made the artifact in a folder."""

    kind: str
    """Command family: ``label``, ``train`` ..."""
    schema_version: str
    status: Literal["running", "interrupted", "finished"]
    """``running`` without a live process means it was killed."""
    command: tuple[str, ...]
    """Command line of the latest start."""
    config: Mapping[str, JsonValue]
    """Every setting, resolved."""
    git_commit: str | None
    """Commit of the code, with ``-dirty`` if changed; None if it does not run from a checkout."""
    packages: Mapping[str, str]
    """Versions of the libraries that decide numbers."""
    parents: tuple[Parent, ...]
    started: str
    """First start, ISO 8601, UTC."""
    finished: str | None = None
    starts: int = 1
    """1 plus the number of resumptions."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What came out, dropped and failed items included."""
    isolation: tuple[str, ...] = ()
    """Isolations under which code of the policy was run here; ``none`` is no isolation."""


class RunFolder:
    """A locked run folder; use as a context manager, which releases the lock."""

    def __init__(
        self, path: Path, manifest: Manifest, *, resumed: bool, created: bool, lock: int
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.resumed = resumed
        """Whether an earlier start of the same run left work here."""
        self._created = created
        self._lock: int | None = lock

    def finish(self, counts: Mapping[str, int]) -> None:
        """Mark the run finished and record what came out."""
        self._write(replace(self.manifest, status="finished", finished=_now(), counts=counts))

    def stamp(self, isolation: str) -> None:
        """Record the isolation under which code is about to be run; empty for no code."""
        if isolation and isolation not in self.manifest.isolation:
            known = (*self.manifest.isolation, isolation)
            self._write(replace(self.manifest, isolation=known))

    def close(self) -> None:
        """Release the lock; may be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, manifest: Manifest) -> None:
        self.manifest = manifest
        _write_manifest(self.path, manifest)

    def _is_bare(self) -> bool:
        """Tell whether this start began the run and wrote nothing but its own marks."""
        others = [path for path in self.path.iterdir() if path.name not in (MANIFEST, _LOCK)]
        return not self.resumed and all(p.is_file() and not p.stat().st_size for p in others)

    def _withdraw(self) -> None:
        """Clear the folder, so that a corrected command may use it."""
        for path in self.path.iterdir():
            path.unlink()
        if self._created:
            self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, InputError) and self._is_bare():
                self._withdraw()
            elif error is not None and self.manifest.status == "running":
                self._write(replace(self.manifest, status="interrupted"))
        except OSError:
            pass  # a full disk is what ended the block: its error is the one to report
        finally:
            self.close()


def open_run(
    out: str | Path,
    *,
    kind: str,
    config: Mapping[str, JsonValue],
    parents: Sequence[str | Path] = (),
    free: Collection[str] = (),
) -> RunFolder:
    """Begin a run in a new folder, or resume the same run in its own.

    Parameters
    ----------
    out : str or Path
        The run's folder; created if missing.
    kind : str
        Command family.
    config : mapping
        Every setting, JSON values only (see `config_dict`). The key ``out`` may differ on
        resumption, so that a run folder can be moved.
    parents : sequence of str or Path, default=()
        Files and folders the run reads; hashed into the manifest. Paths that do not exist (hub
        ids) are recorded without a hash.
    free : collection of str, default=()
        Keys of ``config`` that may differ on resumption as well: they say how the work is carried
        out, not what comes out. The manifest holds those of the latest start.

    Returns
    -------
    RunFolder
        Locked; ``resumed`` says whether work was found.

    Raises
    ------
    InputError
        If the folder belongs to another run (the message names the first difference), holds
        files without a manifest, or another live process writes to it.
    """
    out = Path(out)
    manifest = Manifest(
        kind=kind,
        schema_version=SCHEMA_VERSION,
        status="running",
        command=(Path(sys.argv[0]).name, *sys.argv[1:]),
        config=json.loads(json.dumps(config, allow_nan=False)),
        git_commit=git_commit(),
        packages=package_versions(),
        parents=tuple(_parent(Path(p)) for p in parents),
        started=_now(),
    )
    _check_folder(out)
    created = not out.exists()
    lock = _lock_folder(out)
    try:
        _check_folder(out)
        earlier = read_manifest(out) if (out / MANIFEST).exists() else None
        if earlier is not None:
            _check_same(out, earlier, manifest, {"out", *free})
            manifest = replace(
                manifest,
                started=earlier.started,
                starts=earlier.starts + 1,
                isolation=earlier.isolation,
            )
        run = RunFolder(out, manifest, resumed=earlier is not None, created=created, lock=lock)
        _write_manifest(out, manifest)
    except BaseException:
        os.close(lock)
        raise
    return run


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a run folder.

    Raises
    ------
    InputError
        If there is none, it is malformed, or its schema has another major version.
    """
    path = Path(folder) / MANIFEST
    try:
        obj = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist: {folder} is not a run folder") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    version = obj.get("schema_version") if isinstance(obj, dict) else None
    if isinstance(version, str) and version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputError(
            f"{path} has schema {version}, this version reads {SCHEMA_VERSION}: make the folder "
            "again, or use the version that wrote it"
        )
    try:
        return from_json(Manifest, obj)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def config_dict(config: Any) -> dict[str, JsonValue]:
    """Turn a configuration dataclass into JSON values: paths to text, enums to values.

    Examples
    --------
    >>> @dataclass
    ... class Config:
    ...     out: Path
    ...     sizes: tuple[int, ...] = (1, 2)
    >>> config_dict(Config(out=Path("runs/x")))
    {'out': 'runs/x', 'sizes': [1, 2]}
    """
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def sha256_of(path: str | Path) -> str:
    """Hash a file, or a folder by the names and hashes of its files.

    Hidden files, manifests and metrics are passed over: they say how a folder came about.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file_path.relative_to(path)
        if _NOT_CONTENT.isdisjoint(relative.parts) and not any(
            part.startswith(".") for part in relative.parts
        ):
            digest.update(f"{relative.as_posix()}\0{sha256_of(file_path)}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> JsonValue:
    """Turn one configuration value into a JSON value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_dict(value)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a configuration cannot hold {type(value).__name__}")


def _check_folder(out: Path) -> None:
    """Refuse a path that is no folder, or a folder of unknown files."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder for the output")
    if out.is_dir() and not (out / MANIFEST).exists():
        foreign = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
        if foreign:
            raise InputError(
                f"{out} holds files but no {MANIFEST} ({foreign[0]} ...): give a new or empty "
                "folder for the output"
            )


def _lock_folder(out: Path) -> int:
    """Take the folder's lock; the descriptor holds it."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(
                f"another process is writing to {out}: wait for it, stop it, or give another folder"
            ) from None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # a run that was refused removed the file between opening and locking


def _check_same(out: Path, earlier: Manifest, now: Manifest, free: Collection[str]) -> None:
    """Refuse to resume a run that differs in more than the settings that are free to."""

    def identity(manifest: Manifest) -> dict[str, Any]:
        fixed = {name: value for name, value in manifest.config.items() if name not in free}
        return {"kind": manifest.kind, **fixed}

    difference = _first_difference(identity(earlier), identity(now))
    if difference is None:
        difference = _first_difference(
            {f"input {p.path}": p.sha256 for p in earlier.parents},
            {f"input {p.path}": p.sha256 for p in now.parents},
        )
    if difference is not None:
        name, old, new = difference
        raise InputError(
            f"{out} belongs to another run: {name} was {old}, now {new}; give another folder, or "
            "the same settings to resume"
        )


def _first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> tuple[str, str, str] | None:
    """Find the first setting that differs: its name, the old and the new value."""
    for name in [*new, *(n for n in old if n not in new)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = _first_difference(before, after, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif before != after or (name in old) != (name in new):
            shown = [repr(side[name]) if name in side else "not set" for side in (old, new)]
            return f"{prefix}{name}", shown[0], shown[1]
    return None


def _parent(path: Path) -> Parent:
    """Hash an input; a name that is no path (a hub id) has no hash."""
    return Parent(path=str(path), sha256=sha256_of(path) if path.exists() else "")


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest."""
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(to_json(manifest), indent=2) + "\n")


def _now() -> str:
    """Return the present moment, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
