"""``python -m benchmarks labels``: label error against tokens, for every strategy and estimator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.label_errors import FAILURES, first_errors, recovery_errors
from benchmarks.label_pool import TaskPool, load_pool
from labeling.backup import moment_interval, tree_posterior
from labeling.estimators import ESTIMATORS, Estimate
from labeling.ledger import Rollout
from labeling.states import SameState
from labeling.stopping import StoppingRule, stopped
from labeling.strategies import Adaptive, Fixed, Strategy
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.run import read_manifest
from trajectory.store import read_jsonl

BUDGETS = (2, 4, 8, 16, 32, 48, 64, 96)
"""Rollouts per state: of each (fixed), or of one of value 1/2 (adaptive)."""
REFERENCE = 32
"""Budget of the run whose error the others are asked to reach."""


@dataclass(frozen=True, kw_only=True)
class LabelStudyConfig:
    """Draw labelling runs again from a large pool of rollouts, and compare their labels."""

    pool: Path
    """Folder of `prm label --strategy fixed` with many --rollouts."""
    out: Path
    """Files OUT.json and OUT.png."""
    wide: Path | None = None
    """Another such folder, of many tasks with fewer rollouts, for the search of first errors;
    --pool when not given."""
    drawable: int = 256
    """Rollouts of each state for the simulated runs; the others measure the true value."""
    seeds: int = 5
    """Simulated runs of each arm."""
    level: float = 0.9
    """Nominal coverage of the intervals."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.drawable < 1:
            raise InputError("--seeds and --drawable must be >= 1")


class Arm(NamedTuple):
    """One way to label."""

    name: str
    strategy: Strategy
    same: SameState
    budget: int


def study(config: LabelStudyConfig) -> dict[str, object]:
    """Run the study, write data and picture, and print its tables.

    Returns
    -------
    dict
        ``pool`` (sizes), ``arms`` (one row per arm, budget and estimator: means over the seeds,
        smallest and largest error), ``cost_of_reference_error`` (tokens, as a share of those of
        fixed K = 32 without reuse, at which each arm reaches its error),
        ``cost_of_best_allocation``, ``first_error`` and ``first_error_recovering``.

    Raises
    ------
    InputError
        If the folder is no finished run of ``--strategy fixed``, or its pool is too small.
    """
    pools = _load(config.pool, config.drawable)
    wide = pools if config.wide is None else _load(config.wide, max(FAILURES))
    states = sum(len(pool.truth) for pool in pools)
    noise = fmean(truth.variance for pool in pools for truth in pool.truth.values())
    rows = []
    arms = list(_arms(config.drawable))
    with progress("arms", len(arms)) as bar:
        for arm in arms:
            rows += _measure(arm, pools, config, noise)
            bar.advance()
    report: dict[str, object] = {
        "pool": {
            "tasks": len(pools),
            "states": states,
            "rollouts": sum(len(r) for p in pools for r in p.rollouts.values())
            + sum(t.n for p in pools for t in p.truth.values()),
            "truth_standard_error": noise**0.5,
            "seeds": config.seeds,
        },
        "arms": rows,
        "cost_of_reference_error": _costs(rows),
        "cost_of_best_allocation": _best_allocation(pools),
        "first_error": first_errors(wide, seeds=config.seeds),
        "first_error_recovering": recovery_errors(),
    }
    with atomic_path(config.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    _draw(rows, config.out.with_suffix(".png"))
    _show(report)
    return report


def _load(folder: Path, drawable: int) -> list[TaskPool]:
    """Read a pool."""
    manifest = read_manifest(folder)
    settings = manifest.config
    plan = settings.get("plan")
    fixed = isinstance(plan, Mapping) and plan.get("strategy") == "fixed"
    if manifest.kind != "label" or not fixed:
        raise InputError(f"{folder} is not a run of `prm label --strategy fixed`")
    agent = settings["agent"]
    assert isinstance(agent, Mapping)
    max_steps = agent["max_steps"]
    assert isinstance(max_steps, int)
    first = next(read_jsonl(folder / "evidence.jsonl", Rollout), None)
    if first is None:
        raise InputError(f"{folder} holds no rollout")
    return load_pool(folder, drawable=drawable, max_steps=max_steps, completer=first.completer)


def _arms(drawable: int) -> Iterator[Arm]:
    """Yield every arm at every budget that the pool is large enough for."""
    budgets = [k for k in BUDGETS if 2 * k <= drawable]
    sharing: Sequence[tuple[SameState, str]] = (("never", ""), ("text", ", reuse"))
    for same, suffix in sharing:
        for k in budgets:
            yield Arm(f"fixed{suffix}", Fixed(rollouts=k), same, k)
        for k in budgets:
            adaptive = Adaptive(rollouts=k, most=2 * k, batch=max(1, min(8, k // 4)))
            yield Arm(f"adaptive{suffix}", adaptive, same, k)
            if same != "never":
                backing = replace(adaptive, backs_up=True)
                yield Arm(f"adaptive for backup{suffix}", backing, same, k)


def _measure(
    arm: Arm, pools: Sequence[TaskPool], config: LabelStudyConfig, noise: float
) -> list[dict[str, object]]:
    """Simulate one arm and compare its labels with the truth, by estimator."""
    errors: dict[str, list[float]] = {}
    covered: dict[str, list[float]] = {}
    widths: dict[str, list[float]] = {}
    wrong: list[float] = []
    tokens: list[int] = []
    for seed in range(config.seeds):
        squares: dict[str, list[float]] = {}
        spent = 0
        for pool in pools:
            work = pool.simulate(arm.strategy, same=arm.same, seed=seed)
            backed = tree_posterior(work.view(exclude_truncated=False).states)
            for node, moments in zip(work.nodes, backed, strict=True):
                spent += node.own.tokens
                n, c = node.counts.usable(exclude_truncated=False)
                truth = pool.truth[node.state].value
                found = _estimates(arm, n, c, config.level)
                if arm.same != "never":
                    found["backed_up"] = moment_interval(moments, config.level)
                for name, estimate in found.items():
                    if name == "hard":
                        wrong.append(float((estimate.value > 0) != (truth > 0)))
                        continue
                    squares.setdefault(name, []).append((estimate.value - truth) ** 2)
                    covered.setdefault(name, []).append(estimate.low <= truth <= estimate.high)
                    widths.setdefault(name, []).append(estimate.high - estimate.low)
        tokens.append(spent)
        for name, values in squares.items():
            errors.setdefault(name, []).append(max(0.0, fmean(values) - noise) ** 0.5)
    return [
        {
            "arm": arm.name,
            "budget": arm.budget,
            "estimator": name,
            "tokens": fmean(tokens),
            "rmse": fmean(values),
            "rmse_low": min(values),
            "rmse_high": max(values),
            "hard_labels_wrong": fmean(wrong),
            "coverage": fmean(covered[name]),
            "mean_width": fmean(widths[name]),
        }
        for name, values in errors.items()
    ]


def _estimates(arm: Arm, n: int, c: int, level: float) -> dict[str, Estimate]:
    """Apply every estimator that fits the arm."""
    found = {name: estimator(n, c, level) for name, estimator in ESTIMATORS.items()}
    strategy = arm.strategy
    if isinstance(strategy, Adaptive) and arm.same == "never":
        rule = StoppingRule(goes_on=strategy.goes_on, ends=frozenset(strategy.batch_ends()))
        found["stopped"] = stopped(n, c, level, rule)
    return found


def _costs(rows: Sequence[Mapping[str, object]]) -> dict[str, float | None]:
    """Interpolate the tokens at which each curve meets the reference's error; None if it never."""

    def curve(arm: object, estimator: object) -> tuple[list[float], list[float]]:
        points = [r for r in rows if (r["arm"], r["estimator"]) == (arm, estimator)]
        return [float(str(r["tokens"])) for r in points], [float(str(r["rmse"])) for r in points]

    tokens, errors = curve("fixed", "soft")
    if len(tokens) <= BUDGETS.index(REFERENCE):
        return {}
    goal, full = errors[BUDGETS.index(REFERENCE)], tokens[BUDGETS.index(REFERENCE)]
    costs: dict[str, float | None] = {}
    for arm, estimator in dict.fromkeys((r["arm"], r["estimator"]) for r in rows):
        spent, missed = curve(arm, estimator)
        if len(spent) < len(tokens) or min(missed) > goal or max(missed) < goal:
            costs[f"{arm} ({estimator})"] = None
            continue
        # Errors fall with tokens along a straight line in logarithms.
        order = np.argsort(missed)
        at = np.interp(
            np.log(goal), np.log(np.array(missed)[order]), np.log(np.array(spent)[order])
        )
        costs[f"{arm} ({estimator})"] = float(np.exp(at)) / full
    return costs


def _best_allocation(pools: Sequence[TaskPool]) -> float:
    """Return the cost, relative to equal numbers, of the best allocation if values were known.

    Without sharing, with values V, costs k per rollout and s = sqrt(V (1 - V)), the least error
    for given tokens has ``n ~ s / sqrt(k)``: it costs ``mean(s sqrt(k))^2 / (mean(s^2) mean(k))``.
    """
    truths = [(p.truth[state].value, p.tokens(state)) for p in pools for state in p.truth]
    spread = [(v * (1 - v)) ** 0.5 for v, _ in truths]
    mixed = fmean(s * k**0.5 for s, (_, k) in zip(spread, truths, strict=True))
    return mixed**2 / (fmean(s * s for s in spread) * fmean(k for _, k in truths))


def _draw(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Draw the error against the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    shown = [
        ("fixed", "soft", "C0", "-"),
        ("fixed, reuse", "soft", "C0", "--"),
        ("adaptive", "smoothed", "C1", "-"),
        ("adaptive, reuse", "smoothed", "C1", "--"),
        ("fixed, reuse", "backed_up", "C2", "-"),
        ("adaptive for backup, reuse", "backed_up", "C3", "-"),
    ]
    for arm, estimator, colour, line in shown:
        points = [r for r in rows if (r["arm"], r["estimator"]) == (arm, estimator)]
        x, y, low, high = (
            np.array([float(str(r[key])) for r in points])
            for key in ("tokens", "rmse", "rmse_low", "rmse_high")
        )
        axes.plot(x, y, line, color=colour, marker="o", markersize=3, label=f"{arm} ({estimator})")
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="generated tokens", ylabel="RMSE of the labels")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _show(report: Mapping[str, object]) -> None:
    """Print the tables."""
    console = Console()
    table = Table("arm", "K", "estimator", "tokens", "RMSE", "hard wrong", "coverage")
    rows = report["arms"]
    assert isinstance(rows, list)
    for r in rows:
        table.add_row(
            r["arm"],
            str(r["budget"]) if r["budget"] else "",
            r["estimator"],
            f"{r['tokens']:.0f}",
            f"{r['rmse']:.4f} [{r['rmse_low']:.4f}, {r['rmse_high']:.4f}]",
            f"{r['hard_labels_wrong']:.3f}",
            f"{r['coverage']:.3f}",
        )
    console.print(table)
    costs = report["cost_of_reference_error"]
    assert isinstance(costs, dict)
    table = Table("arm", f"tokens for the error of fixed K = {REFERENCE} (soft), relative")
    for name, cost in costs.items():
        table.add_row(name, "not reached" if cost is None else f"{cost:.2f}")
    console.print(table)
    best = report["cost_of_best_allocation"]
    console.print(f"best allocation without sharing, if all values were known: {best:.2f}")
    table = Table("search", "failures", "wrong", "wrong if it recovers", "n", "tokens")
    searches = report["first_error"]
    assert isinstance(searches, list)
    for r in searches:
        shares = ["" if r[k] is None else f"{r[k]:.3f}" for k in ("wrong", "wrong_recovering")]
        counts = f"{r['trajectories']} ({r['recovering']} recover)"
        table.add_row(r["method"], str(r["failures"]), *shares, counts, f"{r['tokens']:.0f}")
    console.print(table)
    table = Table("made-up trajectories: recovery", "search", "wrong", "states measured")
    searches = report["first_error_recovering"]
    assert isinstance(searches, list)
    for r in searches:
        table.add_row(
            str(r["recovery"]), r["method"], f"{r['wrong']:.3f}", f"{r['states']:.1f} of 12"
        )
    console.print(table)
