"""The command ``policy evaluate``: how often a policy is right, and what it costs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agent.engines.base import Engine
from agent.episode import EpisodeSpec, run_episodes
from agent.setup import HeldOutAgentConfig, load_tasks, open_agent
from policy.rewards import outcome_reward
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import StopReason, Task, Trajectory
from trajectory.run import RunFolder, config_dict, open_run
from trajectory.seeds import derive_seed
from trajectory.store import JsonlWriter, atomic_path, read_jsonl, repair_tail, write_jsonl

TRAJECTORIES = "trajectories.jsonl"
EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a policy's accuracy, tokens and tool use on held-out tasks."""

    agent: HeldOutAgentConfig
    """The policy, its tasks and limits."""
    samples: int = 8
    """Episodes per task."""
    out: Path | None = None
    """Folder for evaluation.json and trajectories.jsonl; nothing is kept when not given."""
    seed: int = 0
    """Makes runs differ; the same seed gives the same episodes."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"--samples must be >= 1, not {self.samples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    accuracy: float
    """avg@k: mean over tasks of the mean outcome of a task's episodes; cut-off episodes count 0."""
    low: float
    """Lower end of its 95 % interval (bootstrap over tasks)."""
    high: float
    pass_at: Mapping[int, float]
    """k -> probability that at least one of k episodes solves a task."""
    num_tasks: int
    """Tasks with at least one usable episode."""
    tasks_without_episodes: int
    """Tasks all of whose episodes failed; in no number above."""
    episodes: int
    """Usable ones."""
    failed: int
    """Episodes ended by broken infrastructure: excluded."""
    truncated: int
    """Episodes cut off by a limit: counted as not solved."""
    tokens: float
    """Generated per episode."""
    steps: float
    """Turns per episode."""
    tool_calls: float
    """Per episode."""
    tool_errors: float
    """Share of tool calls that came back with an error."""
    stops: Mapping[str, int]
    """Stop reason -> episodes, failed ones included."""


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k samples is right.

    Parameters
    ----------
    num : int
        Samples drawn, >= k.
    correct : int
        Right ones among them, 0..num.
    k : int
        >= 1.

    Returns
    -------
    float in [0, 1]

    Notes
    -----
    ``1 - C(n - c, k) / C(n, k)``; Chen et al., arXiv:2107.03374, equation 1.

    Examples
    --------
    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= num or not 0 <= correct <= num:
        raise ValueError(f"pass@{k} of {correct} right in {num} is not defined")
    return 1.0 - comb(num - correct, k) / comb(num, k)


def bootstrap_interval(
    task_means: Sequence[float], *, resamples: int = 4000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over tasks.

    Parameters
    ----------
    task_means : sequence of float
        One number per task. Whole tasks are resampled, because episodes of one task are alike.
    resamples : int, default=4000
    level : float, default=0.95
    seed : int, default=0

    Returns
    -------
    (low, high)
        Of zero width where all tasks are equal: the interval says nothing about other tasks then.

    Examples
    --------
    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.38 < low < 0.42 and 0.58 < high < 0.62
    True
    """
    means = np.asarray(task_means, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = np.array([rng.choice(means, len(means)).mean() for _ in range(resamples)])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(trajectories: Sequence[Trajectory], *, samples: int) -> Evaluation:
    """Compute all numbers of an evaluation from its trajectories.

    Parameters
    ----------
    trajectories : sequence of Trajectory
        At most ``samples`` per task, told apart by ``group``.
    samples : int
        Episodes asked for per task: the largest k of pass@k.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        If no episode is usable.
    """
    rewards: dict[str, list[float]] = {}
    usable = []
    for trajectory in trajectories:
        reward = outcome_reward(trajectory)
        task = rewards.setdefault(trajectory.group, [])
        if reward is not None:
            task.append(reward)
            usable.append(trajectory)
    if not usable:
        reasons = {str(t.meta.get("failure", t.stop.value)) for t in trajectories}
        raise InputError(f"no episode came to an end: {'; '.join(sorted(reasons)) or 'none ran'}")
    judged = [values for values in rewards.values() if values]
    means = [float(np.mean(values)) for values in judged]
    low, high = bootstrap_interval(means)
    calls = [o for t in usable for s in t.steps for o in s.observations]
    stops = Counter(t.stop for t in trajectories)
    return Evaluation(
        accuracy=float(np.mean(means)),
        low=low,
        high=high,
        pass_at=dict(_pass_curve(judged, samples)),
        num_tasks=len(judged),
        tasks_without_episodes=len(rewards) - len(judged),
        episodes=len(usable),
        failed=len(trajectories) - len(usable),
        truncated=sum(t.stop.truncated for t in usable),
        tokens=float(np.mean([t.num_generated_tokens for t in usable])),
        steps=float(np.mean([t.num_steps for t in usable])),
        tool_calls=len(calls) / len(usable),
        tool_errors=sum(o.error is not None for o in calls) / max(1, len(calls)),
        stops={reason.value: stops[reason] for reason in StopReason if stops[reason]},
    )


def _pass_curve(judged: Sequence[Sequence[float]], samples: int) -> Iterator[tuple[int, float]]:
    """Yield pass@k for k = 1, 2, 4 ... and ``samples``, over the tasks with k usable episodes."""
    ks = sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})
    for k in ks:
        enough = [values for values in judged if len(values) >= k]
        if enough:
            solved = [(len(v), sum(r >= 0.5 for r in v)) for v in enough]
            yield k, float(np.mean([pass_at_k(n, c, k) for n, c in solved]))


def evaluate(config: EvaluateConfig, *, engine: Engine | None = None) -> Evaluation:
    """Run the episodes that are missing, print a table and return the numbers.

    Parameters
    ----------
    config : EvaluateConfig
        Resolved flags.
    engine : Engine, optional
        Use this engine and leave it open, instead of making the one the config names.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError
        On bad input, or if every episode failed.
    """
    tasks = load_tasks(config.agent)
    with ExitStack() as stack:
        done: list[Trajectory] = []
        writer, run = None, None
        if config.out is not None:
            run = stack.enter_context(
                open_run(
                    config.out,
                    kind="evaluate",
                    config=config_dict(config),
                    parents=[Path(config.agent.policy)],
                )
            )
            done = _finished(config.out / TRAJECTORIES)
            writer = stack.enter_context(JsonlWriter(config.out / TRAJECTORIES))
        asyncio.run(_sample(config, tasks, done, writer=writer, run=run, engine=engine))
        result = summarize(sorted(done, key=lambda t: t.trajectory_id), samples=config.samples)
        if run is not None:
            with atomic_path(run.path / EVALUATION) as temporary:
                temporary.write_text(json.dumps(asdict(result), indent=2) + "\n")
            run.finish({"episodes": result.episodes, "failed": result.failed})
    show(result, Console(), title=f"{config.agent.policy} on {config.agent.tasks}")
    return result


def _finished(path: Path) -> list[Trajectory]:
    """Read the episodes of an earlier start, leaving out failed ones, which run again."""
    repair_tail(path)
    if not path.exists():
        return []
    kept = [t for t in read_jsonl(path, Trajectory) if not t.stop.failed]
    write_jsonl(path, kept)
    return kept


async def _sample(
    config: EvaluateConfig,
    tasks: Sequence[Task],
    done: list[Trajectory],
    *,
    writer: JsonlWriter | None,
    run: RunFolder | None,
    engine: Engine | None,
) -> None:
    """Run the missing episodes, appending each to ``done`` and to the file as it ends."""
    known = {t.trajectory_id for t in done}
    missing = [s for s in _specs(config, tasks) if s.trajectory_id not in known]
    if not missing:
        return
    async with open_agent(config.agent, engine=engine, run=run) as agent:
        with progress("episodes", len(done) + len(missing), done=len(done)) as bar:
            solved = 0.0
            async for trajectory in run_episodes(
                agent, missing, concurrency=config.agent.concurrency
            ):
                done.append(trajectory)
                if writer is not None:
                    writer.append(trajectory)
                solved += outcome_reward(trajectory) or 0.0
                bar.advance(accuracy=f"{solved / (len(done) - len(known)):.3f}")


def _specs(config: EvaluateConfig, tasks: Sequence[Task]) -> Iterator[EpisodeSpec]:
    """Yield all episodes of the evaluation."""
    for index, task in enumerate(tasks):
        group = f"{index:06d}:{task.task_id}"
        for sample in range(config.samples):
            yield EpisodeSpec(
                trajectory_id=f"evaluate/{group}/{sample:03d}",
                task=task,
                seed=derive_seed("evaluate", config.seed, task.task_id, sample),
                group=group,
            )


def show(result: Evaluation, console: Console, *, title: str) -> None:
    """Print an evaluation as a table."""
    k = max(result.pass_at, default=0)
    lines = {
        f"avg@{k}": f"{result.accuracy:.3f}  (95 % {result.low:.3f} .. {result.high:.3f}, "
        f"{result.num_tasks} tasks)",
        **{f"pass@{n}": f"{value:.3f}" for n, value in result.pass_at.items()},
        "tokens per episode": f"{result.tokens:.1f}",
        "turns per episode": f"{result.steps:.2f}",
        "tool calls per episode": f"{result.tool_calls:.2f} ({result.tool_errors:.1%} errors)",
        "ended": ", ".join(f"{name} {count}" for name, count in result.stops.items()),
        "truncated (not solved)": str(result.truncated),
        "failed (left out)": f"{result.failed} episodes, {result.tasks_without_episodes} tasks",
    }
    table = Table(show_header=False, title=title)
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table)
