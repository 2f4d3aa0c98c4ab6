"""The command ``policy optimize``: group-based policy optimization with per-action process rewards.

One loop: sample groups of episodes, score every prefix with the PRM, turn outcomes and scores into
one advantage per action, take an optimizer step, log, save. Engine and trainer share one set of
weights, so episodes are always on-policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from rich.console import Console

from agent.engines.base import EngineOptions
from agent.episode import Agent, EpisodeSpec
from agent.setup import AgentConfig, open_agent
from policy.advantages import ADVANTAGES
from policy.credit import assign_credit, batch_metrics
from policy.curve import draw_curve
from policy.learner import Learner, make_learner, save_policy, set_learning_rate
from policy.rollout import episode_specs, load_pool, run_groups, tasks_of_step
from policy.state import STATE, restore_state, save_state
from policy.update import UpdateOptions, update_policy
from prm.score import Scorer
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import StepScores, Task, Trajectory
from trajectory.run import RunFolder, config_dict, open_run
from trajectory.tracking import Tracker, TrackerKind, make_tracker, read_metrics

POLICY = "policy"
"""Subfolder of the final policy."""
_PHASES = ("rollout", "score", "update")


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig:
    """Improve a policy by reinforcement learning, with a process reward model or without."""

    agent: AgentConfig
    """The policy to start from, its tasks and limits."""
    out: Path
    """Folder for policy/, state/, metrics.jsonl, learning_curve.png and manifest.json."""
    steps: int
    """Optimization steps."""
    prm: Path | None = None
    """Folder of a process reward model; without one only outcomes are used."""
    advantage: str | None = None
    """potential or outcome; potential if there is a PRM (with outcome, the PRM only watches)."""
    gae_lambda: float | None = None
    """Of potential, in [0, 1], default 1: the PRM is a baseline and cannot bias. Lower values
    trust the PRM's progress more, with less noise and a bias where it is wrong."""
    tasks_per_step: int = 16
    """Different tasks in a step."""
    group_size: int = 8
    """Episodes per task."""
    learning_rate: float | None = None
    """By size when not given: 1e-4 below 10M parameters, else 2e-5 (LoRA) or 2e-6."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises; constant afterwards."""
    epochs: int = 1
    """Optimizer steps on each batch of episodes."""
    clip_low: float = 0.2
    """How far a token's probability ratio may fall below 1."""
    clip_high: float = 0.28
    """How far it may rise above 1."""
    max_grad_norm: float = 1.0
    """Bound on the gradient's norm."""
    batch_tokens: int = 4096
    """Padded tokens of one forward pass of the trainer; bounds memory, changes nothing else."""
    lora_rank: int = 0
    """Rank of LoRA adapters to train; 0 trains all weights."""
    precision: Literal["auto", "bfloat16"] = "auto"
    """Of the trainer's forward passes: auto is the sampler's own; bfloat16 is faster where the
    processor has it, and only nearly the sampler's. Weights stay as they are."""
    save_every: int = 10
    """Steps between checkpoints."""
    track: TrackerKind = "jsonl"
    """Where curves and trajectory tables go; metrics.jsonl is written in any case."""
    seed: int = 0
    """Makes runs differ."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_estimator(self)
        if self.agent.engine != "transformers":
            raise InputError(
                f"--engine {self.agent.engine} cannot be used to optimize: in this version weights "
                "are updated in place, which needs --engine transformers"
            )
        if self.agent.temperature == 0:
            raise InputError("--temperature 0 samples one episode only: RL needs it above 0")

    @property
    def estimator_name(self) -> str:
        """Row of `ADVANTAGES`."""
        return self.advantage or ("potential" if self.prm else "outcome")


def _check_numbers(config: OptimizeConfig) -> None:
    """Refuse numbers out of range."""
    for name in ("steps", "tasks_per_step", "group_size", "epochs", "batch_tokens", "save_every"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be >= 1")
    for name in ("warmup_steps", "lora_rank"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must be >= 0")
    if config.learning_rate is not None and config.learning_rate <= 0:
        raise InputError("--learning-rate must be > 0")
    if not 0 < config.clip_low < 1 or config.clip_high <= 0 or config.max_grad_norm <= 0:
        raise InputError(
            "--clip-low must be in (0, 1), --clip-high and --max-grad-norm must be > 0"
        )


def _check_estimator(config: OptimizeConfig) -> None:
    """Refuse estimators that are unknown, or whose needs are not met."""
    name = config.estimator_name
    if name not in ADVANTAGES:
        raise InputError(f"unknown --advantage {name!r}: choose from {', '.join(ADVANTAGES)}")
    estimator = ADVANTAGES[name]
    if estimator.needs_values and config.prm is None:
        raise InputError(f"--advantage {name} needs the values of a PRM: give --prm FOLDER")
    if config.group_size < estimator.min_group:
        raise InputError(
            f"--advantage {name} compares episodes of one task: --group-size must be >= "
            f"{estimator.min_group}"
        )
    if config.gae_lambda is not None:
        if not estimator.needs_values:
            raise InputError(f"--gae-lambda does not apply to --advantage {name}: leave it out")
        if not 0 <= config.gae_lambda <= 1:
            raise InputError(f"--gae-lambda must be in [0, 1], not {config.gae_lambda}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizeReport:
    """What an optimization came to."""

    policy: Path
    """Folder of the final policy."""
    steps: int
    first_outcome: float
    """Mean outcome over the first five steps."""
    last_outcome: float
    """Mean outcome over the last five steps (of training tasks under sampling)."""


def optimize(config: OptimizeConfig) -> OptimizeReport:
    """Optimize a policy, or resume doing so.

    Parameters
    ----------
    config : OptimizeConfig
        Resolved flags.

    Returns
    -------
    OptimizeReport

    Raises
    ------
    InputError
        On bad input, or if most episodes of a step failed.
    """
    needed = config.steps * config.tasks_per_step
    tasks = load_pool(config.agent, needed=needed, per_step=config.tasks_per_step)
    scorer = _load_scorer(config)
    parents = [Path(config.agent.policy), *([config.prm] if config.prm else [])]
    with open_run(config.out, kind="optimize", config=config_dict(config), parents=parents) as run:
        if not (run.resumed and (config.out / POLICY).exists()):
            asyncio.run(_optimize(config, tasks, scorer, run))
        report = _report(config)
        run.finish({"steps": config.steps, "tasks": len(tasks)})
    Console().print(
        f"{config.steps} steps: outcome {report.first_outcome:.3f} (first five) -> "
        f"{report.last_outcome:.3f} (last five); policy in {report.policy}",
        soft_wrap=True,
    )
    return report


def _load_scorer(config: OptimizeConfig) -> Scorer | None:
    """Load the PRM and insist that its scores mean what the estimator takes them for."""
    if config.prm is None:
        return None
    scorer = Scorer.load(config.prm, device="cpu" if config.agent.device == "cpu" else "auto")
    if ADVANTAGES[config.estimator_name].needs_values and scorer.kind != "value":
        raise InputError(
            f"{config.prm} scores {scorer.kind!r}, but --advantage {config.estimator_name} needs a "
            "PRM of kind 'value' (the probability of success from here)"
        )
    return scorer


def _report(config: OptimizeConfig) -> OptimizeReport:
    """Summarize the curve."""
    curve = [e.metrics["outcome"] for e in read_metrics(config.out) if "outcome" in e.metrics]
    known = [value for value in curve if value is not None]
    first, last = known[:5], known[-5:]
    return OptimizeReport(
        policy=config.out / POLICY,
        steps=config.steps,
        first_outcome=sum(first) / len(first),
        last_outcome=sum(last) / len(last),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Workshop:
    """What the loop works with."""

    config: OptimizeConfig
    tasks: Sequence[Task]
    scorer: Scorer | None
    learner: Learner
    agent: Agent
    out: Path


async def _optimize(
    config: OptimizeConfig, tasks: Sequence[Task], scorer: Scorer | None, run: RunFolder
) -> None:
    """Load the policy, run the loop from where it stopped, write the curve and the final policy."""
    options = EngineOptions(
        policy=config.agent.policy,
        device=config.agent.device,
        max_batch=config.agent.concurrency,
        max_context=config.agent.max_context,
    )
    learner = make_learner(
        options,
        learning_rate=config.learning_rate,
        lora_rank=config.lora_rank,
        seed=config.seed,
    )
    restored = restore_state(run.path / STATE, model=learner.model, optimizer=learner.optimizer)
    start = restored.step if restored else 0
    _announce(config, learner, start)
    async with open_agent(config.agent, engine=learner.engine, run=run) as agent:
        shop = _Workshop(
            config=config, tasks=tasks, scorer=scorer, learner=learner, agent=agent, out=run.path
        )
        await _loop(shop, start)
        await learner.engine.close()
        draw_curve(run.path)
        save_policy(learner, agent.chat.tokenizer, run.path / POLICY)  # last: marks the end


async def _loop(shop: _Workshop, start: int) -> None:
    """Optimize step by step: rollouts, scores, advantages, update, log, checkpoint."""
    config, learner, agent = shop.config, shop.learner, shop.agent
    estimator = ADVANTAGES[config.estimator_name]
    settings = config_dict(config)
    kind: TrackerKind = "wandb" if config.track == "wandb" else "none"
    update = UpdateOptions(
        batch_tokens=config.batch_tokens,
        temperature=config.agent.temperature,
        pad_id=agent.chat.tokenizer.pad_token_id or 0,
        epochs=config.epochs,
        clip=(config.clip_low, config.clip_high),
        max_grad_norm=config.max_grad_norm,
        bfloat16=config.precision == "bfloat16",
    )
    with (
        closing(make_tracker("jsonl", out=shop.out, name="optimize", config=settings)) as curves,
        closing(make_tracker(kind, out=shop.out, name=shop.out.name, config=settings)) as remote,
        progress("steps", config.steps, done=start) as bar,
    ):
        for step in range(start, config.steps):
            clock = [time.perf_counter()]
            learner.engine.set_revision(f"step-{step}")
            groups = await run_groups(
                agent, _specs(shop, step), concurrency=config.agent.concurrency
            )
            clock.append(time.perf_counter())

            trajectories = [t for group in groups for t in group]
            scores, unscored = _score(shop.scorer, trajectories)
            clock.append(time.perf_counter())

            credit = assign_credit(
                groups, scores, estimator=estimator, gae_lambda=_gae_lambda(config)
            )
            metrics = batch_metrics(trajectories, scores)
            if scores is not None:
                metrics["prm_unscored"] = float(unscored)
            metrics["groups_used"] = credit.groups_used / len(groups)
            metrics["learning_rate"] = set_learning_rate(learner, step, config.warmup_steps)
            if credit.rows:
                metrics |= update_policy(learner.model, learner.optimizer, credit.rows, update)
            clock.append(time.perf_counter())

            for name, (begin, end) in zip(_PHASES, pairwise(clock), strict=True):
                metrics[f"seconds/{name}"] = end - begin
            curves.log(step, metrics)
            remote.log(step, metrics)
            bar.advance(outcome=f"{metrics['outcome']:.3f}", tokens=f"{metrics['tokens']:.0f}")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save_state(
                    shop.out / STATE,
                    step=step + 1,
                    model=learner.model,
                    optimizer=learner.optimizer,
                    run_id=curves.run_id,
                )
                _table(curves if config.track == "jsonl" else remote, groups[0], scores)


def _announce(config: OptimizeConfig, learner: Learner, start: int) -> None:
    """Say what is about to happen, settled defaults included."""
    gae_lambda = _gae_lambda(config)
    name = config.estimator_name
    lines = [
        f"{'resuming at' if start else 'starting with'} step {start + 1} of {config.steps}: "
        f"{config.tasks_per_step} x {config.group_size} episodes a step, advantage {name}, "
        f"learning rate {learner.learning_rate:g}"
    ]
    if not ADVANTAGES[name].is_unbiased(gae_lambda):
        lines.append(
            f"note: lambda {gae_lambda:g} below 1 biases the gradient wherever the PRM is wrong"
        )
    Console(stderr=True).print("\n".join(lines), soft_wrap=True, highlight=False)


def _gae_lambda(config: OptimizeConfig) -> float:
    """Return the lambda in use."""
    return 1.0 if config.gae_lambda is None else config.gae_lambda


def _specs(shop: _Workshop, step: int) -> list[EpisodeSpec]:
    """List the episodes of a step."""
    config = shop.config
    chosen = tasks_of_step(len(shop.tasks), config.tasks_per_step, step=step, seed=config.seed)
    return list(
        episode_specs(
            [shop.tasks[i] for i in chosen],
            group_size=config.group_size,
            step=step,
            seed=config.seed,
        )
    )


def _score(
    scorer: Scorer | None, trajectories: Sequence[Trajectory]
) -> tuple[dict[str, StepScores] | None, int]:
    """Score all trajectories that did not fail; return also how many were too long for that.

    A policy that babbles must not stop its own optimization: a trajectory that does not fit the
    PRM keeps the value of its prompt throughout, so only its outcome tells its steps apart from
    the others of its group.
    """
    if scorer is None:
        return None, 0
    usable = [t for t in trajectories if not t.stop.failed]
    fits = scorer.fits(usable)
    shown = [t if fit else replace(t, steps=()) for t, fit in zip(usable, fits, strict=True)]
    scores = {}
    for trajectory, score in zip(usable, scorer.score(shown), strict=True):
        repeats = trajectory.num_steps + 1 - len(score.values)
        values = score.values + score.values[-1:] * repeats
        scores[trajectory.trajectory_id] = replace(score, values=values)
    return scores, fits.count(False)


def _table(
    tracker: Tracker, group: Sequence[Trajectory], scores: dict[str, StepScores] | None
) -> None:
    """Show one group for reading by eye."""
    usable = [t for t in group if not t.stop.failed]
    rows = None if scores is None else [scores[t.trajectory_id] for t in usable]
    tracker.table("trajectories", usable, rows)
