"""``prm evaluate``: how good are the scores, on tasks the model was not trained on.

Sections of the report, each with the same metrics for the reward model and for the baseline:

- ``actions``: score after each step against the trajectory's outcome;
- ``actions_before_answer``: the same without the last step, which shows the answer;
- ``trajectories``: aggregated score of all steps against the outcome;
- ``trajectories_before_answer``: the same without the last step;
- ``states``: score of every measured state against its Monte-Carlo counts.

The baseline sees only position and length (step number, tokens so far) through a logistic
regression, cross-fitted by task. A reward model that does not beat it has learned no content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from prm.attack_report import (
    AttackConfig,
    attack_held_out,
    attack_json,
    check_gate,
    print_attacks,
)
from prm.baseline import cross_fit_logistic
from prm.benchmarks.run import PublicBenchmark, evaluate_public
from prm.checkpoint import load_tasks
from prm.evaluation_table import print_report
from prm.metrics import Array, Estimate, Items, estimate, make_items
from prm.model import Device
from prm.reliability import draw_reliability
from prm.score import Scorer, aggregate
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import JsonValue, LabelledTrajectory, StepScores
from trajectory.run import config_dict, open_run
from trajectory.store import read_labels

EXACT_ROLLOUTS = 64
"""Usable rollouts from which a state's measured value counts as exact."""

EXACT_STATES = 100
"""States needed for ``spearman_exact``."""

OUTCOME_METRICS = ("auroc", "average_precision", "brier", "ece")
STATE_METRICS = ("brier", "ece", "nll", "spearman")

_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a process reward model on held-out tasks."""

    prm: Path
    """Folder that `prm train` wrote."""
    labels: Path | None = None
    """Folder that `prm label` wrote, or give --benchmark; tasks the PRM was trained on are left
    out."""
    public: PublicBenchmark = field(default_factory=PublicBenchmark)
    out: Path | None = None
    """Folder of the report; None is PRM/evaluation, or PRM-BENCHMARK beside the PRM."""
    calibrated: bool = True
    """Apply the checkpoint's calibration."""
    resamples: int = 1000
    """Bootstrap resamples behind the intervals."""
    seed: int = 0
    device: Device = "auto"
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise InputError("--resamples must be at least 100")
        if (self.labels is None) == (self.public.benchmark is None):
            raise InputError(
                "give exactly one of --labels (a folder of `prm label`) and --benchmark with --data"
            )
        if self.attack.attacks and self.public.benchmark is not None:
            raise InputError("--attacks is for --labels: leave it out with --benchmark")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPrefix:
    """One prefix of one held-out trajectory."""

    trajectory: int
    """Index of the trajectory."""
    task_id: str
    step: int
    """Steps before it, 0..S."""
    last: bool
    """Whether it is the whole trajectory."""
    tokens: int
    """Length so far."""
    key: tuple[int, ...]
    """The text so far, as ids: equal states have equal keys."""
    score: float
    outcome: float | None
    """Of the whole trajectory."""
    rollouts: int
    """Usable ones."""
    correct: int


def evaluate(config: EvaluateConfig) -> dict[str, JsonValue]:
    """Measure a reward model and write ``metrics.json`` and ``reliability.png``.

    Returns
    -------
    dict
        The content of ``metrics.json``.

    Raises
    ------
    InputError
        If an input is unusable or every task was trained on.
    GateError
        If attacks succeed more often than the user allows; the report is written all the same.
    """
    if config.labels is None:
        return evaluate_public(config)
    labels_path = config.labels / "labels.parquet"
    rows = read_labels(labels_path)
    scorer = Scorer.load(config.prm, device=config.device)
    tasks = load_tasks(config.prm)
    held_out = [r for r in rows if r.trajectory.task.task_id not in set(tasks.train)]
    if not held_out:
        raise InputError(
            f"{config.labels} holds no held-out trajectories: the PRM was trained on the tasks of "
            f"all {len(rows)}; label other tasks"
        )
    out = config.out or config.prm / "evaluation"
    with open_run(
        out,
        kind="evaluate",
        config=config_dict(config),
        parents=[labels_path, config.prm / "prm.json"],
    ) as run:
        prefixes = score_prefixes(held_out, scorer, calibrated=config.calibrated)
        sections = build_sections(prefixes, aggregation=scorer.metadata.aggregation)
        report = _report(config, scorer, sections)
        attacked = attack_held_out(
            [row.trajectory for row in held_out],
            scorer,
            config.attack,
            calibrated=config.calibrated,
            resamples=config.resamples,
            seed=config.seed,
        )
        seen = {r.trajectory.task.task_id for r in rows}
        counts = {
            "tasks": len({r.trajectory.task.task_id for r in held_out}),
            "trajectories": len(held_out),
            "trajectories_without_outcome": sum(r.trajectory.outcome is None for r in held_out),
            "excluded_training_tasks": len(seen & set(tasks.train)),
            "excluded_trajectories": len(rows) - len(held_out),
            "validation_tasks": len(seen & set(tasks.validation)),
        }
        report["counts"] = dict(counts)
        if attacked:
            report["attacks"] = attack_json(attacked, config.attack)
        with atomic_path(out / "metrics.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        draw_reliability(
            out / "reliability.png",
            {"measured states": sections["states"].prm, "actions": sections["actions"].prm},
            resamples=config.resamples,
            seed=config.seed,
        )
        print_report(report, out)
        print_attacks(attacked, config.attack)
        run.finish(counts)
    check_gate(attacked, config.attack.max_attack_rate)
    return report


def score_prefixes(
    rows: Sequence[LabelledTrajectory], scorer: Scorer, *, calibrated: bool
) -> list[ScoredPrefix]:
    """Score labelled trajectories and lay out every prefix with what is known of it."""
    prefixes: list[ScoredPrefix] = []
    with progress("score", len(rows)) as bar:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            trajectories = [row.trajectory for row in chunk]
            scores = scorer.score(trajectories, calibrated=calibrated)
            rendered = scorer.render(trajectories)
            for offset, row in enumerate(chunk):
                ids, positions = rendered[offset].input_ids, rendered[offset].positions
                keys = [ids[: p + 1] for p in positions]
                prefixes += _prefixes(start + offset, row, scores[offset], keys)
            bar.advance(len(chunk))
    return prefixes


def _prefixes(
    index: int, row: LabelledTrajectory, scores: StepScores, keys: Sequence[tuple[int, ...]]
) -> list[ScoredPrefix]:
    """Lay out the prefixes of one trajectory."""
    evidence = row.evidence
    return [
        ScoredPrefix(
            trajectory=index,
            task_id=row.trajectory.task.task_id,
            step=t,
            last=t == row.trajectory.num_steps,
            tokens=len(keys[t]),
            key=keys[t],
            score=scores.values[t],
            outcome=row.trajectory.outcome,
            rollouts=evidence.rollouts[t] - evidence.failed[t],
            correct=evidence.correct[t],
        )
        for t in range(row.trajectory.num_steps + 1)
    ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Section:
    """The same items scored by the reward model and by the baseline."""

    prm: Items
    baseline: Items
    metrics: tuple[str, ...]


def build_sections(prefixes: Sequence[ScoredPrefix], *, aggregation: str) -> dict[str, Section]:
    """Pick the items of every section, and fit the baseline to each target."""
    actions = [p for p in prefixes if p.step > 0 and p.outcome is not None]
    outcomes = [float((p.outcome or 0.0) >= 0.5) for p in actions]
    guesses = _baseline(actions, outcomes, [1.0] * len(actions))
    early = [i for i, p in enumerate(actions) if not p.last]
    scores = np.asarray([p.score for p in actions])
    sections = {}
    for name, chosen in (("actions", list(range(len(actions)))), ("actions_before_answer", early)):
        sections[name] = Section(
            prm=_pick(actions, scores, outcomes, chosen),
            baseline=_pick(actions, guesses, outcomes, chosen),
            metrics=OUTCOME_METRICS,
        )
        sections[name.replace("actions", "trajectories")] = Section(
            prm=_aggregated(actions, scores, outcomes, chosen, aggregation=aggregation),
            baseline=_aggregated(actions, guesses, outcomes, chosen, aggregation=aggregation),
            metrics=OUTCOME_METRICS,
        )
    states = distinct_states(prefixes)
    values = [s.correct / s.rollouts for s in states]
    rollouts = [float(s.rollouts) for s in states]
    guesses = _baseline(states, values, rollouts)
    names = [s.task_id for s in states]
    sections["states"] = Section(
        prm=make_items([s.score for s in states], values, names, rollouts),
        baseline=make_items(guesses.tolist(), values, names, rollouts),
        metrics=STATE_METRICS,
    )
    return sections


def _baseline(
    prefixes: Sequence[ScoredPrefix], targets: Sequence[float], weights: Sequence[float]
) -> Array:
    """Predict targets from step number and tokens so far."""
    return cross_fit_logistic(
        np.asarray([[p.step, p.tokens] for p in prefixes], dtype=np.float64).reshape(-1, 2),
        np.asarray(targets),
        weights=np.asarray(weights),
        groups=[p.task_id for p in prefixes],
    )


def _pick(
    actions: Sequence[ScoredPrefix], scores: Array, outcomes: Sequence[float], chosen: Sequence[int]
) -> Items:
    """Gather some actions as items."""
    return make_items(
        [float(scores[i]) for i in chosen],
        [outcomes[i] for i in chosen],
        [actions[i].task_id for i in chosen],
    )


def _aggregated(
    actions: Sequence[ScoredPrefix],
    scores: Array,
    outcomes: Sequence[float],
    chosen: Sequence[int],
    *,
    aggregation: str,
) -> Items:
    """Gather the trajectories of some actions as items, their scores aggregated."""
    members: dict[int, list[int]] = {}
    for i in chosen:
        members.setdefault(actions[i].trajectory, []).append(i)
    groups = list(members.values())
    return make_items(
        [aggregate([float(scores[i]) for i in group], aggregation) for group in groups],
        [outcomes[group[0]] for group in groups],
        [actions[group[0]].task_id for group in groups],
    )


def distinct_states(prefixes: Sequence[ScoredPrefix]) -> list[ScoredPrefix]:
    """Keep one entry per measured state before the end of its trajectory.

    Trajectories that reached the same state measured it independently, so their counts add up.
    Prefix 0 is measured once per task and only repeated with every trajectory, so it is not added.
    """
    states: dict[tuple[str, tuple[int, ...]], ScoredPrefix] = {}
    for p in prefixes:
        if p.rollouts == 0 or p.last:
            continue
        name = (p.task_id, p.key)
        if name not in states:
            states[name] = p
        elif p.step > 0:
            known = states[name]
            states[name] = replace(
                known,
                rollouts=known.rollouts + p.rollouts,
                correct=known.correct + p.correct,
            )
    return list(states.values())


def _report(
    config: EvaluateConfig, scorer: Scorer, sections: Mapping[str, Section]
) -> dict[str, JsonValue]:
    """Compute every metric of every section."""

    def measure(name: str, items: Items) -> Estimate:
        return estimate(name, items, resamples=config.resamples, seed=config.seed)

    body: dict[str, JsonValue] = {}
    for name, section in sections.items():
        body[name] = {
            "items": len(section.prm),
            "rate": float(np.average(section.prm.targets, weights=section.prm.weights))
            if len(section.prm)
            else None,
            "prm": {m: asdict(measure(m, section.prm)) for m in section.metrics},
            "baseline": {m: asdict(measure(m, section.baseline)) for m in section.metrics},
        }
    states = sections["states"].prm
    exact = states.weights >= EXACT_ROLLOUTS
    report: dict[str, JsonValue] = {
        "prm": str(config.prm),
        "labels": str(config.labels),
        "checkpoint": scorer.checkpoint_hash,
        "kind": scorer.kind,
        "position": scorer.position,
        "aggregation": scorer.metadata.aggregation,
        "calibrated": config.calibrated,
        "sections": body,
        "rollouts_per_state": _spread(states.weights),
    }
    if int(exact.sum()) >= EXACT_STATES:
        chosen = Items(
            scores=states.scores[exact],
            targets=states.targets[exact],
            weights=states.weights[exact],
            tasks=np.unique(states.tasks[exact], return_inverse=True)[1].astype(np.int64),
        )
        report["spearman_exact"] = {**asdict(measure("spearman", chosen)), "states": len(chosen)}
    return report


def _spread(rollouts: Array) -> JsonValue:
    """Say how many rollouts stand behind a state."""
    if len(rollouts) == 0:
        return None
    return {
        "least": int(rollouts.min()),
        "median": float(np.median(rollouts)),
        "most": int(rollouts.max()),
    }
