"""The reliability diagram: what was predicted against what happened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prm.metrics import ECE_BINS, Array, Items, bootstrap, equal_mass_bins
from trajectory.atomic import atomic_path


def draw_reliability(
    path: Path, series: Mapping[str, Items], *, resamples: int = 1000, seed: int = 0
) -> None:
    """Draw predicted against observed rates in equal-mass bins, with 95 % intervals over tasks.

    Parameters
    ----------
    path : Path
        PNG file to write.
    series : mapping of str to Items
        What to draw, by legend; empty items are left out.
    resamples : int, default=1000
        Bootstrap resamples of whole tasks behind the intervals.
    seed : int, default=0
        Of the bootstrap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    for name, items in series.items():
        if len(items) == 0:
            continue
        predicted_B, observed_B, low_B, high_B = _curve(items, resamples=resamples, seed=seed)
        bars = np.abs(np.stack([observed_B - low_B, high_B - observed_B]))
        top.errorbar(predicted_B, observed_B, yerr=bars, marker="o", capsize=2, label=name)
        bottom.hist(items.scores, bins=20, range=(0, 1), histtype="step", label=name)
    top.set(ylabel="observed rate", xlim=(0, 1), ylim=(0, 1), title="Reliability")
    bottom.set(xlabel="predicted probability", ylabel="items")
    if top.get_legend_handles_labels()[0]:
        top.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _curve(items: Items, *, resamples: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """Return mean prediction, observed rate and its interval for every bin that has items."""
    place_N = equal_mass_bins(items.scores)
    used = np.unique(place_N)
    member_NB = (place_N[:, None] == np.arange(ECE_BINS)[None, used]).astype(np.float64)
    mass_B = items.weights @ member_NB
    predicted_B = (items.weights * items.scores) @ member_NB / mass_B
    observed_B = (items.weights * items.targets) @ member_NB / mass_B

    def rates(resampled: Items, weights_RN: Array) -> Array:
        mass_RB = weights_RN @ member_NB
        hits_RB = (weights_RN * resampled.targets) @ member_NB
        return np.where(mass_RB > 0, hits_RB / np.where(mass_RB > 0, mass_RB, 1), observed_B)

    rates_RB = bootstrap(rates, items, resamples=resamples, seed=seed)
    low_B, high_B = np.quantile(rates_RB, [0.025, 0.975], axis=0)
    return predicted_B, observed_B, low_B, high_B
