"""The study of heads as a table and a picture: means over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from trajectory.atomic import atomic_path

METRICS = ("spearman", "rmse", "ece", "auroc", "auroc_before_answer")
REFERENCE = "value (counts)"
"""The arm that others with as many rollouts are compared with."""

Run = dict[str, object]


def values_of(runs: Sequence[Run], arm: str, rollouts: str, metric: str) -> dict[int, float]:
    """Map seed to a metric of an arm."""
    chosen = [r for r in runs if (r["arm"], r["rollouts"]) == (arm, rollouts)]
    return {int(str(r["seed"])): float(str(r[metric])) for r in chosen}


def paired(runs: Sequence[Run], arm: str, rollouts: str, metric: str) -> tuple[float, float]:
    """Return the mean difference to the reference, and the half-width of its 95 % t-interval.

    Examples
    --------
    >>> runs = [
    ...     {"arm": a, "rollouts": "1", "seed": s, "ece": v}
    ...     for a, values in ((REFERENCE, (0.1, 0.2)), ("x", (0.2, 0.4)))
    ...     for s, v in enumerate(values)
    ... ]
    >>> mean, half = paired(runs, "x", "1", "ece")
    >>> round(mean, 3), round(half, 3)  # 0.1 and 0.2: 12.706 * 0.0707 / sqrt(2)
    (0.15, 0.635)
    """
    found, reference = (values_of(runs, a, rollouts, metric) for a in (arm, REFERENCE))
    differences = np.array([found[s] - reference[s] for s in sorted(found)])
    n = len(differences)
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5
    return float(differences.mean()), float(half)


def show(runs: Sequence[Run]) -> None:
    """Print one row per arm: mean and spread over seeds, and the difference to the reference."""
    table = Table(
        title="Heads and targets at equal tokens: mean ± sd over seeds (difference ± 95 %)"
    )
    for column in ("K", "head (target)", "rows", *METRICS):
        table.add_column(column)
    for arm, rollouts in dict.fromkeys((str(r["arm"]), str(r["rollouts"])) for r in runs):
        rows = np.mean(list(values_of(runs, arm, rollouts, "rows").values()))
        cells = [_cell(runs, arm, rollouts, metric) for metric in METRICS]
        table.add_row(rollouts, arm, f"{rows:.0f}", *cells)
    Console(width=200).print(table)


def _cell(runs: Sequence[Run], arm: str, rollouts: str, metric: str) -> str:
    """Render a metric of an arm."""
    values = np.array(list(values_of(runs, arm, rollouts, metric).values()))
    text = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    if arm == REFERENCE:
        return text
    mean, half = paired(runs, arm, rollouts, metric)
    return f"{text} ({mean:+.3f} ± {half:.3f})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the rank correlation and the calibration error of every arm against K."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    order = list(dict.fromkeys(str(r["rollouts"]) for r in runs))
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, ("spearman", "ece"), strict=True):
        for number, arm in enumerate(dict.fromkeys(str(r["arm"]) for r in runs)):
            found = [(i, values_of(runs, arm, k, metric)) for i, k in enumerate(order)]
            points = [(i, list(v.values())) for i, v in found if v]
            x = [i + 0.06 * (number - 3) for i, _ in points]
            mean = [float(np.mean(v)) for _, v in points]
            spread = [float(np.std(v, ddof=1)) for _, v in points]
            axis.errorbar(x, mean, yerr=spread, marker="o", linestyle="", capsize=2, label=arm)
        axis.set_xticks(range(len(order)), [f"K = {k}" for k in order])
        axis.set(ylabel=metric)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
