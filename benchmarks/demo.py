"""``python -m benchmarks demo``: gathers the numbers of a demo run into one table and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import JsonValue

STAGES = ("synthesize", "warmup", "label", "train", "optimize")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Gather what runs/demo.sh made."""

    run: Path
    """Folder of the demo."""


def report(config: DemoConfig) -> dict[str, JsonValue]:
    """Write ``report.json`` and the two pictures into the folder and print a short table.

    Parameters
    ----------
    config : DemoConfig
        Where the demo ran.

    Returns
    -------
    dict
        ``accuracy`` (warmup, prm), ``n`` test tasks, ``prm`` (auroc, ece, spearman_exact),
        ``policy``, ``checkpoint`` and ``seconds`` per stage, with the intervals beside them.

    Raises
    ------
    InputError
        If a stage of the demo is missing.
    """
    run = config.run
    before, after = _read(run / "before/evaluation.json"), _read(run / "after/evaluation.json")
    outcomes = _read(run / "held-out/evaluation/metrics.json")["sections"]
    exact = _read(run / "prm/evaluation/metrics.json")
    estimates = {
        "auroc": outcomes["actions"]["prm"]["auroc"],
        "auroc_trajectories": outcomes["trajectories"]["prm"]["auroc"],
        "ece": outcomes["actions"]["prm"]["ece"],
        "spearman_exact": exact.get("spearman_exact", {"value": None}),
    }
    body: dict[str, JsonValue] = {
        "accuracy": {"warmup": before["accuracy"], "prm": after["accuracy"]},
        "n": after["num_tasks"],
        "prm": {name: estimate["value"] for name, estimate in estimates.items()},
        "intervals": {
            "accuracy": {
                "warmup": [before["low"], before["high"]],
                "prm": [after["low"], after["high"]],
            },
            **{name: [e.get("low"), e.get("high")] for name, e in estimates.items()},
        },
        "policy": str(run / "warmup"),
        "optimized": str(run / "optimized/policy"),
        "checkpoint": str(run / "prm"),
        "seconds": _seconds(run / "seconds.tsv"),
    }
    shutil.copyfile(run / "optimized/learning_curve.png", run / "learning_curve.png")
    shutil.copyfile(run / "held-out/evaluation/reliability.png", run / "reliability.png")
    with atomic_path(run / "report.json") as temporary:
        temporary.write_text(json.dumps(body, indent=2) + "\n")
    _print(body, estimates, run)
    return body


def _read(path: Path) -> dict[str, Any]:
    """Read the JSON a stage left."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: the demo has not finished; run runs/demo.sh again"
        ) from None
    assert isinstance(content, dict)
    return content


def _seconds(path: Path) -> dict[str, JsonValue]:
    """Read how long each stage took, and the whole demo."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    seconds = {stage: int(value) for stage, value in rows}
    return {**{name: seconds.get(name) for name in STAGES}, "total": sum(seconds.values())}


def _print(
    body: Mapping[str, JsonValue], estimates: Mapping[str, Mapping[str, float]], run: Path
) -> None:
    """Print the headline numbers with their intervals."""
    table = Table(title="Demo", show_header=False)
    accuracy, intervals = body["accuracy"], body["intervals"]
    assert isinstance(accuracy, dict)
    assert isinstance(intervals, dict)
    spread = intervals["accuracy"]
    assert isinstance(spread, dict)
    for name, row in (("warmup", "policy after warm-up"), ("prm", "policy after RL with the PRM")):
        ends = spread[name]
        assert isinstance(ends, list)
        shown = f"{accuracy[name]:.3f}  (95 % {ends[0]:.3f} .. {ends[1]:.3f})"
        table.add_row(f"accuracy, {row}", shown)
    for name, estimate in estimates.items():
        value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
        shown = "-" if value is None else f"{value:.3f}  (95 % {low:.3f} .. {high:.3f})"
        table.add_row(f"PRM {name.replace('_', ' ')}", shown)
    seconds = body["seconds"]
    assert isinstance(seconds, dict)
    for name, taken in seconds.items():
        table.add_row(f"seconds, {name}", str(taken))
    console = Console()
    console.print(table)
    for name in ("report.json", "learning_curve.png", "reliability.png"):
        console.print(str(run / name), soft_wrap=True)
