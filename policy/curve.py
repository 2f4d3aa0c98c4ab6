"""The learning curve of an optimization as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trajectory.atomic import atomic_path
from trajectory.tracking import MetricsEntry, read_metrics

CURVE = "learning_curve.png"
_SMOOTHING = 5


def draw_curve(folder: Path) -> Path:
    """Draw outcome, PRM value and tokens over the steps of a run folder.

    Parameters
    ----------
    folder : Path
        Holds ``metrics.jsonl``.

    Returns
    -------
    Path
        ``learning_curve.png`` in the folder, replaced as a whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = read_metrics(folder)
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for name, label in (("outcome", "outcome"), ("prm_last", "PRM value of the last state")):
        steps, values = _series(entries, name)
        if len(steps):
            (line,) = upper.plot(steps, _moving_mean(values), label=label)
            upper.plot(steps, values, color=line.get_color(), alpha=0.25)
    upper.set_ylim(0, 1)
    upper.set_ylabel(f"batch mean (line: last {_SMOOTHING} steps)")
    upper.legend(loc="lower right")
    upper.grid(alpha=0.3)
    lower.plot(*_series(entries, "tokens"))
    lower.set_ylabel("tokens per episode")
    lower.set_xlabel("optimization step")
    lower.grid(alpha=0.3)
    path = folder / CURVE
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _series(entries: Sequence[MetricsEntry], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one metric, where it is known."""
    known = [(e.step, v) for e in entries if (v := e.metrics.get(name)) is not None]
    return np.array([s for s, _ in known]), np.array([v for _, v in known], dtype=np.float64)


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Average each value with the few before it."""
    return np.array([values[max(0, i + 1 - _SMOOTHING) : i + 1].mean() for i in range(len(values))])
