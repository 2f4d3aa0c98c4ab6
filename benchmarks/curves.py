"""``python -m benchmarks curves``: learning curves of several arms over seeds, with a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.tracking import read_metrics

_SMOOTHING = 5


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Compare the arms of an experiment."""

    run: Path
    """Folder with one `policy optimize` folder per arm and seed, named ARM-seedN, and optionally
    `policy evaluate` folders ARM-seedN-test."""
    out: Path
    """Files OUT.csv, OUT.json and OUT.png."""


def compare(config: CurvesConfig) -> dict[str, dict[str, float]]:
    """Write the curves as data and picture, and print each arm's numbers.

    Parameters
    ----------
    config : CurvesConfig
        Where the runs are.

    Returns
    -------
    dict
        Arm -> ``seeds``, ``area`` (mean outcome over all steps), ``final`` (mean of the last five
        steps), ``test`` (held-out accuracy, mean over seeds) and the standard deviation of each.

    Raises
    ------
    InputError
        If the folder holds no run.
    """
    arms = _arms(config.run)
    if not arms:
        raise InputError(f"{config.run} holds no folder named ARM-seedN with a metrics.jsonl")
    curves = {name: _curves(folders) for name, folders in arms.items()}
    result = {name: _numbers(curves[name], arms[name]) for name in arms}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(config.out.with_suffix(".csv")) as temporary, temporary.open("w") as sink:
        rows = csv.writer(sink)
        rows.writerow(["arm", "seed", "step", "outcome"])
        for name, curves_NT in curves.items():
            for seed, curve_T in enumerate(curves_NT):
                rows.writerows([name, seed, step, f"{y:.4f}"] for step, y in enumerate(curve_T))
    with atomic_path(config.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    _draw(curves, config.out.with_suffix(".png"))
    table = Table("arm", "seeds", "mean outcome over the run", "last 5 steps", "test accuracy")
    for name, numbers in result.items():
        shown = [f"{numbers[k]:.3f} ± {numbers[k + '_sd']:.3f}" for k in ("area", "final", "test")]
        table.add_row(name, f"{numbers['seeds']:.0f}", *shown)
    Console().print(table)
    return result


def _arms(folder: Path) -> dict[str, list[Path]]:
    """Find the runs of each arm, in seed order."""
    arms: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-seed*")):
        if (path / "metrics.jsonl").exists():
            arms.setdefault(path.name.rpartition("-seed")[0], []).append(path)
    return arms


def _curves(folders: Sequence[Path]) -> np.ndarray:
    """Return outcomes (N seeds, T steps), cut to the shortest run."""
    curves = [[e.metrics["outcome"] for e in read_metrics(folder)] for folder in folders]
    shortest = min(len(curve) for curve in curves)
    return np.array([curve[:shortest] for curve in curves])


def _numbers(curves_NT: np.ndarray, folders: Sequence[Path]) -> dict[str, float]:
    """Summarize one arm; test accuracy is nan where it was not measured."""
    tests = [folder.with_name(folder.name + "-test") / "evaluation.json" for folder in folders]
    test_N = [json.loads(path.read_text())["accuracy"] for path in tests if path.exists()]
    columns = {
        "area": curves_NT.mean(1),
        "final": curves_NT[:, -_SMOOTHING:].mean(1),
        "test": np.array(test_N or [np.nan]),
    }
    numbers = {"seeds": float(len(folders))}
    for name, values_N in columns.items():
        numbers[name] = float(values_N.mean())
        numbers[f"{name}_sd"] = float(values_N.std(ddof=1)) if len(values_N) > 1 else 0.0
    return numbers


def _draw(curves: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw the mean over seeds, a band from the lowest to the highest seed, and the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kernel = np.ones(_SMOOTHING) / _SMOOTHING
    highest = 0.1
    for name, curves_NT in curves.items():
        padded = np.pad(curves_NT, ((0, 0), (_SMOOTHING - 1, 0)), mode="edge")
        smooth_NT = np.array([np.convolve(curve, kernel, mode="valid") for curve in padded])
        steps = np.arange(smooth_NT.shape[1])
        seeds = f"{len(curves_NT)} seed{'s' * (len(curves_NT) > 1)}"
        (line,) = axes.plot(steps, smooth_NT.mean(0), label=f"{name} ({seeds})")
        axes.fill_between(
            steps, smooth_NT.min(0), smooth_NT.max(0), color=line.get_color(), alpha=0.2
        )
        highest = max(highest, float(smooth_NT.max()))
    axes.set_ylim(0, min(1.0, 1.2 * highest))  # up to 1, low outcomes would be one flat line
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimization step")
    axes.set_ylabel(f"outcome of the batch (mean of {_SMOOTHING} steps)")
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
