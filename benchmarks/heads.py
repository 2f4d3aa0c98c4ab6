"""``python -m benchmarks heads``: which head, from which target, with how many rollouts per state.

A pool of labels is drawn from again: K of the rollouts of each state (without replacement, so as
if only K had been run), of as many tasks as cost the same number of generated tokens. Every arm
trains on the same rows of the same seed, so arms are compared in pairs. Optimizer steps are equal
too: fewer rows are passed over more often, and the held-out part decides when to stop.

With a fixed K the binomial likelihood *is* soft cross-entropy, times K: the two can only differ
where states were measured unequally often. The arms ``1|8`` give a quarter of the states 8 rollouts
and the others one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.heads_report import draw, show
from labeling.estimators import ESTIMATORS
from prm.evaluate import build_sections, score_prefixes
from prm.metrics import Items, auroc, ece, spearman
from prm.model import open_tokenizer
from prm.rendering import Position, render
from prm.score import Scorer
from prm.train import TrainConfig, train
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import LabelledTrajectory
from trajectory.run import open_run
from trajectory.seeds import derive_seed
from trajectory.store import read_labels, write_labels

STEP_TOKENS = 1024
MIXED = (1, 8)
"""Rollouts of most states and of some, where states are measured unequally often."""
_MIXED_SHARE = 0.25
_LEVEL = 0.9
_HELD_OUT = 0.15


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Train every head on targets drawn from a pool of labels, and measure the scores."""

    labels: Path
    """Folder of `prm label --same-state never` with 8 or more --rollouts: the pool."""
    exact: Path
    """Such a folder of other tasks with 64 or more rollouts: the true values."""
    held_out: Path
    """Label folder of other tasks, for AUROC against outcomes."""
    model: str
    """Base of every PRM."""
    out: Path
    """Files OUT.json and OUT.png."""
    work: Path
    """Folder for the runs; finished ones are not repeated."""
    seeds: int = 5
    steps: int = 120
    """Optimizer steps of each run, at most, each of 1024 tokens."""

    def __post_init__(self) -> None:
        if self.seeds < 2 or self.steps < 1:
            raise InputError("--seeds must be >= 2 and --steps >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train."""

    head: str
    target: str
    """Estimator of the labels: hard, soft; or counts."""
    rollouts: str
    """Per state: K, or ``1|8``."""
    position: Position = "observation"

    @property
    def name(self) -> str:
        """Short and unique."""
        where = "" if self.position == "observation" else ", before observation"
        return f"{self.head} ({self.target}){where}"


ARMS = (
    Arm(head="value", target="counts", rollouts="1|8"),
    Arm(head="binary", target="soft", rollouts="1|8"),
    Arm(head="value", target="counts", rollouts="1"),
    Arm(head="binary", target="soft", rollouts="1"),  # with one rollout, hard labels are the same
    Arm(head="token", target="soft", rollouts="1"),
    Arm(head="ranking", target="soft", rollouts="1"),
    Arm(head="implicit", target="counts", rollouts="1"),
    Arm(head="value", target="counts", rollouts="1", position="action"),
    *(
        arm
        for k in ("2", "4", "8")
        for arm in (
            Arm(head="value", target="counts", rollouts=k),
            Arm(head="binary", target="hard", rollouts=k),
        )
    ),
    Arm(head="ranking", target="soft", rollouts="8"),  # its labels are nearer to certain here
    Arm(head="implicit", target="counts", rollouts="8"),
)


def compare(config: HeadsConfig) -> dict[str, object]:
    """Run the study, write data and picture, and print its table.

    Returns
    -------
    dict
        ``runs``: one row per arm and seed; ``sizes``: what they were measured on.

    Raises
    ------
    InputError
        If the pool has states with too few rollouts or the folders share tasks.
    """
    pool = _read_pool(config.labels)
    exact = read_labels(config.exact / "labels.parquet")
    held_out = read_labels(config.held_out / "labels.parquet")
    _refuse_shared(config, pool, exact, held_out)
    runs: list[dict[str, object]] = []
    with progress("runs", len(ARMS) * config.seeds) as bar:
        for seed in range(config.seeds):
            for arm in ARMS:
                runs += [_run(config, arm, seed, pool, exact, held_out)]
                bar.advance()
    report: dict[str, object] = {
        "sizes": {
            "pool_tasks": len({r.trajectory.task.task_id for r in pool}),
            "exact_tasks": len({r.trajectory.task.task_id for r in exact}),
            "held_out_tasks": len({r.trajectory.task.task_id for r in held_out}),
            "seeds": config.seeds,
            "steps": config.steps,
        },
        "runs": runs,
    }
    with atomic_path(config.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    draw(runs, config.out.with_suffix(".png"))
    show(runs)
    return report


def _read_pool(folder: Path) -> list[LabelledTrajectory]:
    """Read the pool and check that it is large enough."""
    rows = read_labels(folder / "labels.parquet")
    for row in rows:
        usable = [n - f for n, f in zip(row.evidence.rollouts, row.evidence.failed, strict=True)]
        if min(usable[:-1], default=max(MIXED)) < max(MIXED) and row.trajectory.outcome is not None:
            raise InputError(
                f"{folder}: {row.trajectory.trajectory_id} has a state with fewer than "
                f"{max(MIXED)} usable rollouts: label with more --rollouts"
            )
    return [r for r in rows if r.trajectory.outcome is not None and r.trajectory.num_steps]


def _refuse_shared(config: HeadsConfig, *parts: Sequence[LabelledTrajectory]) -> None:
    """Refuse parts that share tasks."""
    ids = [{r.trajectory.task.task_id for r in part} for part in parts]
    if ids[0] & (ids[1] | ids[2]):
        raise InputError(f"{config.labels} shares tasks with --exact or --held-out")


def draw_rows(
    pool: Sequence[LabelledTrajectory], rollouts: str, *, seed: int
) -> list[LabelledTrajectory]:
    """Draw rollouts per state, of as many trajectories as one rollout per state of all would cost.

    Tokens of a trajectory are those it was sampled with, and those of its rollouts in proportion.
    """
    rng = np.random.default_rng(derive_seed("heads", seed, rollouts))
    order = np.random.default_rng(derive_seed("heads-tasks", seed)).permutation(len(pool))
    budget = sum(_cost(row, 1.0) for row in pool)
    rows: list[LabelledTrajectory] = []
    spent = 0.0
    for index in order:
        row = pool[index]
        sizes = _sizes(rollouts, row.trajectory.num_steps, rng)
        cost = _cost(row, float(np.mean(sizes)))
        if spent + cost > budget + 1e-6:
            break
        spent += cost
        rows.append(_subsample(row, sizes, rng))
    return rows


def _sizes(rollouts: str, states: int, rng: np.random.Generator) -> list[int]:
    """Choose how often each state before the end is measured."""
    if "|" in rollouts:
        return [MIXED[int(rng.random() < _MIXED_SHARE)] for _ in range(states)]
    return [int(rollouts)] * states


def _cost(row: LabelledTrajectory, per_state: float) -> float:
    """Estimate the tokens of a trajectory and of some rollouts per state."""
    measured = row.evidence.rollouts[0]
    return row.trajectory.num_generated_tokens + row.evidence.tokens * per_state / measured


def _subsample(
    row: LabelledTrajectory, sizes: Sequence[int], rng: np.random.Generator
) -> LabelledTrajectory:
    """Keep some of the rollouts of each state; the end keeps its outcome as its label."""
    evidence = row.evidence
    correct = [
        int(rng.hypergeometric(c, n - f - c, k))
        for c, n, f, k in zip(
            evidence.correct, evidence.rollouts, evidence.failed, sizes, strict=False
        )
    ]
    zeros = (0,) * (len(sizes) + 1)
    counts = replace(
        evidence,
        rollouts=(*sizes, 0),
        correct=(*correct, 0),
        truncated=zeros,
        failed=zeros,
        reused=(),
    )
    return replace(row, evidence=counts)


def relabel(row: LabelledTrajectory, target: str) -> LabelledTrajectory:
    """Replace the labels by an estimator's; ``counts`` keeps soft ones, which are not used."""
    estimator = ESTIMATORS["soft" if target == "counts" else target]
    pairs = list(zip(row.evidence.rollouts, row.evidence.correct, strict=True))
    found = [estimator(n, c, _LEVEL) if n else None for n, c in pairs]
    outcome = row.trajectory.outcome
    ends = (outcome,) * 3
    columns = zip(*[ends if e is None else (e.value, e.low, e.high) for e in found], strict=True)
    values, low, high = columns
    labels = replace(row.labels, estimator=target, values=values, low=low, high=high)
    return replace(row, labels=labels)


def _run(
    config: HeadsConfig,
    arm: Arm,
    seed: int,
    pool: Sequence[LabelledTrajectory],
    exact: Sequence[LabelledTrajectory],
    held_out: Sequence[LabelledTrajectory],
) -> dict[str, object]:
    """Train and measure one arm, or read what an earlier start measured."""
    folder = config.work / f"{seed}" / f"{arm.rollouts} {arm.name}".replace("|", "-")
    done = folder / "result.json"
    if done.is_file():
        found: dict[str, object] = json.loads(done.read_text())
        return found
    drawn = [relabel(row, arm.target) for row in draw_rows(pool, arm.rollouts, seed=seed)]
    labels = folder / "labels"
    with open_run(labels, kind="label", config={"arm": arm.name, "seed": seed}) as run:
        write_labels(labels / "labels.parquet", drawn)
        run.finish({"trajectories": len(drawn)})
    rendered = render([row.trajectory for row in drawn], open_tokenizer(config.model))
    tokens = sum(len(row.input_ids) for row in rendered)
    train(_train_config(config, arm, seed, folder, tokens=tokens))
    result = {
        "arm": arm.name,
        "rollouts": arm.rollouts,
        "seed": seed,
        "rows": len(drawn),
        "measured_states": sum(r.trajectory.num_steps for r in drawn),
        **measure(Scorer.load(folder / "prm", device="cpu"), exact, held_out),
    }
    with atomic_path(done) as temporary:
        temporary.write_text(json.dumps(result) + "\n")
    return result


def _train_config(
    config: HeadsConfig, arm: Arm, seed: int, folder: Path, *, tokens: int
) -> TrainConfig:
    """Choose the passes so that every arm takes about the same optimizer steps."""
    per_pass = (1 - _HELD_OUT) * tokens / STEP_TOKENS
    return TrainConfig(
        labels=folder / "labels",
        model=config.model,
        out=folder / "prm",
        head=arm.head,
        position=arm.position,
        epochs=max(1, round(config.steps / per_pass)),
        patience=max(2, round(0.3 * config.steps / per_pass)),
        step_tokens=STEP_TOKENS,
        batch_tokens=STEP_TOKENS,
        held_out=_HELD_OUT,
        seed=seed,
        device="cpu",
    )


def measure(
    scorer: Scorer,
    exact: Sequence[LabelledTrajectory],
    held_out: Sequence[LabelledTrajectory],
) -> dict[str, float]:
    """Measure a reward model against exact values and against outcomes."""
    aggregation = scorer.metadata.aggregation
    states = _states(scorer, exact)
    noise = np.mean(states.targets * (1 - states.targets) / states.weights)
    actions = build_sections(
        score_prefixes(held_out, scorer, calibrated=True), aggregation=aggregation
    )
    squared = float(np.mean((states.scores - states.targets) ** 2) - noise)
    return {
        "exact_states": float(len(states)),
        "spearman": spearman(states),
        "rmse": max(0.0, squared) ** 0.5,
        "ece": ece(states),
        "auroc": auroc(actions["actions"].prm),
        "auroc_before_answer": auroc(actions["actions_before_answer"].prm),
    }


def _states(scorer: Scorer, exact: Sequence[LabelledTrajectory]) -> Items:
    """Score the states whose value is known."""
    prefixes = score_prefixes(exact, scorer, calibrated=True)
    return build_sections(prefixes, aggregation=scorer.metadata.aggregation)["states"].prm
