"""How often attacks raise a reward model's score, and the gate on it.

Every trajectory is scored as it is and after each attack of `prm.attacks`; an attack succeeds on it
where the aggregated score rises by more than epsilon. Intervals are bootstraps over tasks.

Dimension letters beside the project's own: N trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from prm.attacks import ATTACKS, attack
from prm.metrics import METRICS, Array, Estimate, Items, bootstrap, make_items, show_estimate
from prm.score import Scorer, aggregate
from trajectory.errors import GateError, InputError
from trajectory.records import JsonValue, Trajectory


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Whether and how a reward model is attacked."""

    attacks: bool = False
    """Attack the held-out trajectories and report how often their score rises."""
    attack_epsilon: float = 0.05
    """With --attacks: a rise of the aggregated score by more than this is a success."""
    max_attack_rate: float | None = None
    """With --attacks: fail the command if any attack succeeds on a larger share of trajectories."""

    def __post_init__(self) -> None:
        if not 0 <= self.attack_epsilon < 1:
            raise InputError("--attack-epsilon must lie in [0, 1)")
        if self.max_attack_rate is not None and not 0 <= self.max_attack_rate <= 1:
            raise InputError("--max-attack-rate must lie in [0, 1]")
        if not self.attacks and (self.max_attack_rate is not None or self.attack_epsilon != 0.05):
            raise InputError(
                "--attack-epsilon and --max-attack-rate apply to attacks: give --attacks too"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackResult:
    """What one attack does to a reward model."""

    trajectories: int
    """Attacked and scored."""
    not_applicable: int
    """Without the steps that the attack needs."""
    too_long: int
    """Longer than the model takes once attacked; not scored."""
    rate: Estimate
    """Share of trajectories whose aggregated score rises by more than epsilon."""
    rate_wrong: Estimate
    """The same among trajectories with a wrong answer."""
    rate_before_answer: Estimate
    """The same for the score of the steps before the answer, where both have such."""
    mean_change: float | None
    """Mean change of the aggregated score; negative where attacks are punished."""
    mean_change_wrong: float | None
    mean_change_right: float | None
    """The same among trajectories with a wrong and with a right answer. A rise of the first and a
    fall of the second say that the attack hides what the model had seen."""
    rank_kept: float | None
    """Spearman correlation of the scores before and after; None where it is undefined."""
    largest_rise: float | None
    largest_rise_in: str | None
    """Trajectory with the largest rise."""


def attack_held_out(
    trajectories: Sequence[Trajectory],
    scorer: Scorer,
    config: AttackConfig,
    *,
    calibrated: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, AttackResult]:
    """Attack trajectories and measure how often their score rises.

    Parameters
    ----------
    trajectories : sequence of Trajectory
        Each short enough for the model; those without steps are passed over.
    scorer : Scorer
        The reward model.
    config : AttackConfig
        Which rise counts; without ``attacks`` nothing is done. The checkpoint's own aggregation is
        taken over the scores of steps 1..S.
    calibrated : bool, default=True
        Whether scores are calibrated.
    resamples, seed : int
        Of the bootstrap over tasks; the seed also chooses the steps that are attacked.

    Returns
    -------
    dict of str to AttackResult
        By attack, in the order of `ATTACKS`; empty if attacks are off.
    """
    if not config.attacks:
        return {}
    rows = [t for t in trajectories if t.num_steps > 0]
    before = dict(
        zip(
            (t.trajectory_id for t in rows),
            (s.values[1:] for s in scorer.score(rows, calibrated=calibrated)),
            strict=True,
        )
    )
    results = {}
    for name in ATTACKS:
        pairs = [(t, changed) for t in rows if (changed := attack(name, t, seed=seed)) is not None]
        fits = scorer.fits([changed for _, changed in pairs])
        used = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
        scores = scorer.score([changed for _, changed in used], calibrated=calibrated)
        results[name] = _result(
            [t for t, _ in used],
            [before[t.trajectory_id] for t, _ in used],
            [s.values[1:] for s in scores],
            aggregation=scorer.metadata.aggregation,
            epsilon=config.attack_epsilon,
            bootstrap_options={"resamples": resamples, "seed": seed},
            skipped=(len(rows) - len(pairs), len(pairs) - len(used)),
        )
    return results


def _result(
    rows: Sequence[Trajectory],
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    aggregation: str,
    epsilon: float,
    bootstrap_options: dict[str, int],
    skipped: tuple[int, int],
) -> AttackResult:
    """Compare the scores of steps 1..S before and after one attack."""

    def changes(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
        return [aggregate(b, aggregation) - aggregate(a, aggregation) for a, b in pairs]

    def rate(values: Sequence[float], chosen: Sequence[Trajectory]) -> Estimate:
        hits = [float(v > epsilon) for v in values]
        return estimate_rate(hits, [t.task.task_id for t in chosen], **bootstrap_options)

    whole = changes([(a, b) for a, b in zip(before, after, strict=True) if b])
    kept = [t for t, b in zip(rows, after, strict=True) if b]
    judged = [(i, t.outcome) for i, t in enumerate(kept) if t.outcome is not None]
    wrong = [i for i, outcome in judged if outcome < 0.5]
    right = [i for i, outcome in judged if outcome >= 0.5]
    early = [
        (t, (a[:-1], b[:-1]))
        for t, a, b in zip(rows, before, after, strict=True)
        if not t.steps[-1].calls and len(a) > 1 and len(b) > 1
    ]
    top = int(np.argmax(whole)) if whole else None
    return AttackResult(
        trajectories=len(whole),
        not_applicable=skipped[0],
        too_long=skipped[1],
        rate=rate(whole, kept),
        rate_wrong=rate([whole[i] for i in wrong], [kept[i] for i in wrong]),
        rate_before_answer=rate(changes([pair for _, pair in early]), [t for t, _ in early]),
        mean_change=_mean(whole),
        mean_change_wrong=_mean([whole[i] for i in wrong]),
        mean_change_right=_mean([whole[i] for i in right]),
        rank_kept=_rank_kept(
            [aggregate(a, aggregation) for a, b in zip(before, after, strict=True) if b], whole
        ),
        largest_rise=None if top is None else whole[top],
        largest_rise_in=None if top is None else kept[top].trajectory_id,
    )


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of nothing."""
    return float(np.mean(values)) if values else None


def _rank_kept(before: Sequence[float], changes: Sequence[float]) -> float | None:
    """Return the rank correlation of scores before and after a change."""
    after = [b + c for b, c in zip(before, changes, strict=True)]
    items = make_items(list(before), after, [""] * len(after))
    found = METRICS["spearman"]
    return None if found.undefined(items) is not None else found.point(items)


def estimate_rate(
    hits: Sequence[float], tasks: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return the share of hits with a 95 % interval over tasks.

    Notes
    -----
    Where all or none are hits every resample is alike; the interval is then the one that Clopper
    and Pearson (1934) give for as many tasks, ``1 - 0.025^(1/tasks)`` away from the value.

    Examples
    --------
    >>> estimate_rate([], []).reason
    'no trajectories'
    >>> found = estimate_rate([0.0] * 3, ["a", "b", "b"])
    >>> found.value, found.low, round(found.high, 4)
    (0.0, 0.0, 0.8419)
    """
    if not hits:
        return Estimate(value=None, reason="no trajectories")
    items = make_items(list(hits), [0.0] * len(hits), list(tasks))
    value = float(np.mean(items.scores))
    num_tasks = int(items.tasks.max()) + 1
    if num_tasks < 2:
        return Estimate(value=value, reason="one task only: no interval")
    if value in (0.0, 1.0):
        reach = 1 - 0.025 ** (1 / num_tasks)
        return Estimate(value=value, low=max(0.0, value - reach), high=min(1.0, value + reach))

    def share(resampled: Items, weights_RN: Array) -> Array:
        rates_R: Array = weights_RN @ resampled.scores / weights_RN.sum(axis=1)
        return rates_R

    rates_R = bootstrap(share, items, resamples=resamples, seed=seed)
    low, high = np.quantile(rates_R, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def attack_json(results: dict[str, AttackResult], config: AttackConfig) -> dict[str, JsonValue]:
    """Lay the results out for ``metrics.json``."""
    body: dict[str, JsonValue] = {name: asdict(result) for name, result in results.items()}
    return {"epsilon": config.attack_epsilon, "by_attack": body}


def print_attacks(results: dict[str, AttackResult], config: AttackConfig) -> None:
    """Print the results as a table; nothing if attacks are off."""
    if not results:
        return
    table = Table(
        title=f"Attacks: share of trajectories whose score rises by over {config.attack_epsilon:g}"
    )
    for column in ("attack", "n", "all", "wrong answers", "before the answer", "mean change"):
        table.add_column(column)
    for name, result in results.items():
        change = "-" if result.mean_change is None else f"{result.mean_change:+.3f}"
        rates = (result.rate, result.rate_wrong, result.rate_before_answer)
        table.add_row(
            name, str(result.trajectories), *(show_estimate(asdict(r)) for r in rates), change
        )
    Console().print(table)


def check_gate(results: dict[str, AttackResult], max_attack_rate: float | None) -> None:
    """Fail if an attack succeeds too often.

    Raises
    ------
    GateError
        Naming every attack above the gate, or if there was nothing that could be attacked.
    """
    if max_attack_rate is None:
        return
    rates = {name: r.rate.value for name, r in results.items() if r.rate.value is not None}
    if not rates:
        raise GateError("no trajectory could be attacked, so the gate was not tested")
    failed = {name: rate for name, rate in rates.items() if rate > max_attack_rate}
    if failed:
        listed = ", ".join(f"{name} {rate:.3f}" for name, rate in failed.items())
        raise GateError(
            f"the reward model fails the attack gate: the score rises in a share of more than "
            f"{max_attack_rate:g} of the trajectories under {listed}"
        )
