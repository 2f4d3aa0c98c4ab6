"""The command ``prm merge``: parts of one labelling run -> one folder, as if it were one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from agent.setup import AgentConfig
from labeling.config import FREE_SETTINGS, LabelConfig, StrategyConfig, parse_shard
from labeling.ledger import Ledger, Rollout, read_rollouts
from labeling.run import EVIDENCE, TRAJECTORIES, freeze
from labeling.trajectories import TrajectoryFile
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import JsonValue, Trajectory
from trajectory.run import Manifest, config_dict, open_run, read_manifest
from trajectory.store import read_jsonl


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Join the parts of a labelling run that was split with `prm label --shard`."""

    parts: Positional[tuple[Path, ...]]
    """Folders of `prm label`, of equal settings."""
    out: Path
    """Folder for the whole; afterwards it is that of the run without --shard."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("give the folders to merge")
        if self.out.resolve() in {part.resolve() for part in self.parts}:
            raise InputError(f"--out {self.out} is one of the parts: give a new folder")


def merge(config: MergeConfig) -> dict[str, int]:
    """Join the parts and label everything again from the joined evidence.

    A line that stands in several parts is taken once. The parts stay as they are.

    Parameters
    ----------
    config : MergeConfig
        Resolved flags.

    Returns
    -------
    dict
        Counts, as in the manifest.

    Raises
    ------
    InputError
        If a part is no finished labelling run, the parts were made with different settings or by
        different policies, a shard is missing, or two parts say different things under one key.
    """
    manifests = [_read_part(part) for part in config.parts]
    settings = _common_settings(config.parts, manifests)
    _check_shards(config.parts, manifests)
    merged = label_config(settings, out=config.out)
    completer = _completer(config.parts)
    inputs = {parent.path for parent in manifests[0].parents}
    with open_run(
        config.out,
        kind="label",
        config=config_dict(merged),
        parents=sorted(inputs),
        free=FREE_SETTINGS,
    ) as run:
        for name in (TRAJECTORIES, EVIDENCE):
            (config.out / name).unlink(missing_ok=True)  # of an earlier start: quickly redone
        with (
            TrajectoryFile(config.out / TRAJECTORIES) as trajectories,
            Ledger(config.out / EVIDENCE, completer=completer) as ledger,
            progress("parts", len(config.parts)) as bar,
        ):
            duplicates = 0
            for part in config.parts:
                duplicates += _add_trajectories(trajectories, part)
                duplicates += _add_rollouts(ledger, part)
                bar.advance(trajectories=len(trajectories), rollouts=ledger.totals.rollouts)
            counts = freeze(merged, ledger, trajectories, config.out)
        counts |= {"cut_lines": 0, "duplicate_lines": duplicates, "trajectories_reencoded": 0}
        for isolation in dict.fromkeys(i for m in manifests for i in m.isolation):
            run.stamp(isolation)
        run.finish(counts)
    Console().print(
        f"{config.out}: {counts['labelled']} labelled trajectories from {len(config.parts)} parts, "
        f"{counts['rollouts']} rollouts, {duplicates} lines were there twice",
        soft_wrap=True,
    )
    return counts


def label_config(settings: dict[str, Any], *, out: Path) -> LabelConfig:
    """Make the settings of ``prm label`` from those in a manifest, but for shard and runner."""
    agent = {**settings["agent"], "tools": tuple(settings["agent"]["tools"])}
    left_out = ("agent", "shard", *FREE_SETTINGS)
    rest = {name: value for name, value in settings.items() if name not in left_out}
    given = rest.get("trajectories")
    rest |= {"out": out, "trajectories": None if given is None else Path(given)}
    rest["plan"] = StrategyConfig(**settings["plan"])
    known = {f.name for f in fields(LabelConfig)}
    unknown = sorted(set(rest) - known)
    if unknown:
        raise InputError(f"the parts were made with settings of another version: {unknown[0]}")
    return LabelConfig(agent=AgentConfig(**agent), **rest)


def _read_part(part: Path) -> Manifest:
    """Read the manifest of a part."""
    manifest = read_manifest(part)
    if manifest.kind != "label":
        raise InputError(f"{part} was made by {manifest.kind!r}: give folders of `prm label`")
    if manifest.status != "finished":
        raise InputError(f"{part} is not finished: run its command again first")
    return manifest


def _common_settings(parts: Sequence[Path], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return the settings in common; parts may differ in place, shard and how they were run."""

    def essential(manifest: Manifest) -> dict[str, JsonValue]:
        free = ("out", "shard", *FREE_SETTINGS)
        return {k: v for k, v in manifest.config.items() if k not in free}

    first = essential(manifests[0])
    for part, manifest in zip(parts, manifests, strict=True):
        settings = essential(manifest)
        for name in sorted(first.keys() | settings.keys()):
            if first.get(name) != settings.get(name):
                raise InputError(
                    f"{part} was made with another {name} than {parts[0]}: only parts of one run "
                    "can be merged"
                )
    return first


def _check_shards(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Refuse parts that leave a shard out."""
    shards = [parse_shard(str(manifest.config.get("shard", "0/1"))) for manifest in manifests]
    sizes = {size for _, size in shards}
    if len(sizes) > 1:
        raise InputError(
            f"{parts[0]} and the others were cut into different numbers of shards: {sorted(sizes)}"
        )
    size = sizes.pop()
    missing = sorted(set(range(size)) - {index for index, _ in shards})
    if missing:
        raise InputError(f"shard {missing[0]}/{size} is missing: give the folders of all shards")


def _completer(parts: Sequence[Path]) -> str:
    """Return whose rollouts the parts hold."""
    for part in parts:
        for rollout in read_jsonl(part / EVIDENCE, Rollout):
            return rollout.completer
    raise InputError("none of the parts holds a rollout: there is nothing to merge")


def _add_trajectories(trajectories: TrajectoryFile, part: Path) -> int:
    """Add the trajectories of a part; return how many were there already."""
    duplicates = 0
    for trajectory in read_jsonl(part / TRAJECTORIES, Trajectory):
        if trajectory.trajectory_id not in trajectories:
            trajectories.append(trajectory)
            continue
        duplicates += 1
        if trajectories.read(trajectory.trajectory_id) != trajectory:
            raise InputError(
                f"{part / TRAJECTORIES}: trajectory {trajectory.trajectory_id!r} stands in an "
                "earlier part with another content"
            )
    return duplicates


def _add_rollouts(ledger: Ledger, part: Path) -> int:
    """Add the rollouts of a part; return how many were there already."""
    duplicates = 0
    for _, rollout in read_rollouts(part / EVIDENCE):
        if rollout.completer != ledger.completer:
            raise InputError(
                f"{part / EVIDENCE} holds rollouts by {rollout.completer!r}, an earlier part by "
                f"{ledger.completer!r}"
            )
        if not ledger.tally(rollout.state).has(rollout):
            ledger.append(rollout)
            continue
        duplicates += 1
        if rollout not in ledger.rollouts_of(rollout.task_id):
            raise InputError(
                f"{part / EVIDENCE}: rollout {rollout.rollout} of {rollout.state[0]!r} after step "
                f"{rollout.prefix} stands in an earlier part with another content"
            )
    return duplicates
