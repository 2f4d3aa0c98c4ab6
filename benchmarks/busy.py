"""``python -m benchmarks feeding``: how busy labelling keeps its engine, and what RL steps take.

Labelling is compared with the same engine fed the same requests directly, at equal concurrency.
The two alternate within one run and the median of the pairs' ratios counts, because a neighbour
on the machine slows whatever it meets.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from agent.engines import build_engine
from agent.engines.base import Engine, EngineOptions
from agent.setup import AgentConfig, load_tasks, open_agent
from benchmarks.feeding import Feed, RecordingEngine, busy_share
from benchmarks.throughput import machine_facts
from labeling.collect import Collector, Plan
from labeling.ledger import Ledger
from labeling.strategies import Fixed
from labeling.trajectories import TrajectoryFile
from policy.optimize import OptimizeConfig, optimize
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import Task
from trajectory.tracking import read_metrics

_PHASES = ("rollout", "score", "update")


@dataclass(frozen=True, kw_only=True)
class BusyConfig:
    """Measure labelling against direct feeding, and the time of optimization steps."""

    agent: AgentConfig
    """Who labels what, with which engine and concurrency."""
    rollouts: int = 4
    """Continuations per state."""
    repeats: int = 5
    """Pairs of labelling and direct feeding."""
    optimize_steps: int = 3
    """Steps of `policy optimize` to time, 16 tasks x 8 episodes each; 0 leaves them out."""
    prm: Path | None = None
    """Process reward model of these steps; without one nothing is scored."""
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""
    out: Path | None = None
    """Write the measurements and the machine's facts to this JSON file too."""

    def __post_init__(self) -> None:
        if self.rollouts < 1 or self.repeats < 1:
            raise InputError("--rollouts and --repeats must be >= 1")
        if self.optimize_steps < 0 or self.threads < 0:
            raise InputError("--optimize-steps and --threads must be >= 0")
        if self.prm is not None and not self.optimize_steps:
            raise InputError("--prm is for the optimization steps: leave it out without them")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One labelling run and the direct run of its requests."""

    labelling: Feed
    direct: Feed

    @property
    def share(self) -> float:
        """Labelling's tokens per second over those of direct feeding; 1 is a full engine."""
        return self.labelling.tokens_per_second / self.direct.tokens_per_second

    @property
    def cpu_share(self) -> float:
        """The same per second of processor time: hardly moved by neighbours, blind to waiting."""
        return self.labelling.tokens_per_cpu_second / self.direct.tokens_per_cpu_second


def measure_pairs(config: BusyConfig) -> list[Pair]:
    """Label and feed directly in turn, on one engine.

    Returns
    -------
    list of Pair
        One per repetition. A pair before them is thrown away: it pays for first allocations.
    """
    tasks = load_tasks(config.agent)
    engine = build_engine(
        config.agent.engine,
        EngineOptions(
            policy=config.agent.policy,
            device=config.agent.device,
            dtype=config.agent.dtype,
            max_batch=config.agent.concurrency,
            max_context=config.agent.max_context,
        ),
    )
    return asyncio.run(_measure_pairs(config, tasks, engine))


async def _measure_pairs(config: BusyConfig, tasks: Sequence[Task], engine: Engine) -> list[Pair]:
    """Run the pairs and close the engine."""
    pairs = []
    try:
        for repeat in range(config.repeats + 1):

            async def pipeline(recorder: RecordingEngine, seed: int = repeat) -> None:
                await _collect(config, tasks, recorder, seed)

            labelling, direct = await busy_share(
                engine, pipeline, concurrency=config.agent.concurrency
            )
            pairs.append(Pair(labelling=labelling, direct=direct))
    finally:
        await engine.close()
    return pairs[1:]


async def _collect(
    config: BusyConfig, tasks: Sequence[Task], engine: RecordingEngine, seed: int
) -> None:
    """Collect evidence as `prm label` does, files included."""
    plan = Plan(strategy=Fixed(rollouts=config.rollouts), rollouts=config.rollouts, seed=seed)
    with TemporaryDirectory() as folder:
        async with open_agent(config.agent, engine=engine) as agent:
            with (
                Ledger(Path(folder) / "evidence.jsonl", completer="benchmark") as ledger,
                TrajectoryFile(Path(folder) / "trajectories.jsonl") as trajectories,
            ):
                collector = Collector(agent, plan, ledger=ledger, trajectories=trajectories)
                collector.prepare(tasks)
                with progress(f"labelling, seed {seed}", collector.planned) as bar:
                    await collector.run(concurrency=config.agent.concurrency, bar=bar)


def measure_steps(config: BusyConfig) -> list[dict[str, float]]:
    """Run `policy optimize` and read what each step took.

    Returns
    -------
    list of dict
        Per step ``seconds``, its parts ``rollout``, ``score`` and ``update``, and ``tokens``, the
        mean number of tokens generated in an episode.
    """
    # Tasks are fresh for every step, as many as it takes.
    agent = replace(config.agent, num_tasks=None, first_task=0)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        optimize(OptimizeConfig(agent=agent, prm=config.prm, steps=config.optimize_steps, out=out))
        steps = []
        for entry in read_metrics(out):
            parts = {phase: float(entry.metrics[f"seconds/{phase}"] or 0) for phase in _PHASES}
            tokens = float(entry.metrics["tokens"] or 0)
            steps.append({"seconds": sum(parts.values()), **parts, "tokens": tokens})
    return steps


def feeding(config: BusyConfig) -> None:
    """Measure, print the tables, and write the JSON file if one was asked for."""
    if config.threads:
        torch.set_num_threads(config.threads)
    facts = machine_facts()
    pairs = measure_pairs(config)
    steps = measure_steps(config) if config.optimize_steps else []
    facts["load_average_at_end"] = round(os.getloadavg()[0], 2)
    report = {
        "machine": facts,
        "concurrency": config.agent.concurrency,
        "busy_share": median(pair.share for pair in pairs),
        "busy_share_by_cpu_time": median(pair.cpu_share for pair in pairs),
        "pairs": [_row(pair) for pair in pairs],
        "step_seconds": median(step["seconds"] for step in steps) if steps else None,
        "steps": steps,
    }
    _print(pairs, steps)
    print("machine:", ", ".join(f"{key} {value}" for key, value in facts.items()))
    if config.out is not None:
        with atomic_path(config.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")


def _row(pair: Pair) -> dict[str, object]:
    """Render a pair for JSON."""
    return {
        "busy_share": pair.share,
        "busy_share_by_cpu_time": pair.cpu_share,
        "labelling": {
            **asdict(pair.labelling),
            "tokens_per_second": pair.labelling.tokens_per_second,
        },
        "direct": {**asdict(pair.direct), "tokens_per_second": pair.direct.tokens_per_second},
    }


def _print(pairs: Sequence[Pair], steps: Sequence[dict[str, float]]) -> None:
    """Print both tables, the medians last."""
    console = Console()
    heads = ("tokens", "labelling, tokens/s", "direct, tokens/s", "busy", "busy by CPU time")
    table = Table(*heads, title="labelling")

    def add(name: str, chosen: Sequence[Pair]) -> None:
        labelling = median(pair.labelling.tokens_per_second for pair in chosen)
        direct = median(pair.direct.tokens_per_second for pair in chosen)
        shares = [median(p.share for p in chosen), median(p.cpu_share for p in chosen)]
        rates = [f"{rate:,.0f}" for rate in (labelling, direct)]
        table.add_row(name, *rates, *(f"{share:.2f}" for share in shares))

    for pair in pairs:
        add(str(pair.labelling.generated_tokens), [pair])
    table.add_section()
    add("median", pairs)
    console.print(table)
    if steps:
        table = Table("seconds", *_PHASES, "tokens per episode", title="policy optimize, per step")
        for step in steps:
            table.add_row(*(f"{value:.2f}" for value in step.values()))
        console.print(table)
