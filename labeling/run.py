"""The command ``prm label``: tasks or trajectories -> evidence ledger and labels."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agent.chat import ChatFormat
from agent.engines import check_engine
from agent.engines.base import Engine
from agent.episode import Agent
from agent.setup import load_tasks, open_agent, sandbox_of
from agent.tasks import parse_tasks
from agent.tools import build_tools, check_tasks
from labeling.backup import backed_up_labels
from labeling.collect import Collector
from labeling.config import FREE_SETTINGS, LabelConfig, parse_shard
from labeling.estimators import BACKED_UP, STOPPED, label_steps
from labeling.given import check_given, copy_given, empty_shard
from labeling.intake import Intake
from labeling.ledger import Ledger
from labeling.ray_runner import check_ray, collect_on_ray
from labeling.setup import completer_of, plan_of, repeatable
from labeling.stopping import stopped_or_unknown
from labeling.trajectories import TrajectoryFile, measured_tasks
from labeling.work import TaskWork
from trajectory.errors import InputError
from trajectory.progress import progress
from trajectory.records import LabelledTrajectory, Sampling, Task, Trajectory
from trajectory.run import MANIFEST, RunFolder, config_dict, open_run, read_manifest
from trajectory.store import JsonlWriter, read_jsonl, repair_tail, write_labels

TRAJECTORIES = "trajectories.jsonl"
EVIDENCE = "evidence.jsonl"
LABELS = "labels.parquet"
CONTINUATIONS = "continuations.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelReport:
    """What a labelling run holds once it is finished."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Everything in the folder, earlier starts of the run included; as in its manifest."""
    seconds: float = 0.0
    """Wall-clock time of this start's collection."""
    tokens: int = 0
    """Generated in this start."""
    busy_seconds: float = 0.0
    """Time the engine computed in this start; 0 where it cannot tell."""
    prompt_tokens: int = 0
    """Tokens given to the engine in this start."""
    cached_prompt_tokens: int = 0
    """Those of them that it had in its cache; 0 also where it cannot tell."""
    workers: int = 1
    """Processes that ran the policy."""
    already_finished: bool = False
    """Whether there was nothing left to do."""


def label(config: LabelConfig, *, engine: Engine | None = None) -> LabelReport:
    """Label trajectories, or resume doing so, and print a summary.

    Parameters
    ----------
    config : LabelConfig
        Resolved flags.
    engine : Engine, optional
        Use this engine, and leave it open, instead of making the one the config names; on a
        cluster every worker uses a copy of it.

    Returns
    -------
    LabelReport
        Counts, tokens and times.

    Raises
    ------
    InputError
        On bad input, or if engine or tools stop working midway; what was collected is kept.
    """
    console = Console()
    tasks = _check_inputs(config)
    finished = _finished_counts(config.out)
    with open_run(
        config.out,
        kind="label",
        config=config_dict(config),
        parents=_parents(config),
        free=FREE_SETTINGS,
    ) as run:
        if finished is not None:
            run.finish(finished)
            console.print(f"{config.out} is finished already: nothing left to do", soft_wrap=True)
            return LabelReport(counts=finished, already_finished=True)
        if config.runner.runner == "ray":
            report = _label_on_ray(config, tasks, run, engine)
        else:
            report = asyncio.run(_label(config, tasks, run, engine))
        run.finish(report.counts)
    _show(report, console, max_tokens=config.max_tokens)
    return report


def _check_inputs(config: LabelConfig) -> list[Task]:
    """Refuse bad input before a folder is made, and return the tasks to sample for."""
    sandbox = sandbox_of(config.agent)
    domain = parse_tasks(config.agent.tasks, sandbox)
    tools = config.agent.tools or domain.default_tools
    build_tools(tools, sandbox)
    check_engine(config.agent.engine)
    if config.runner.runner == "ray":
        check_ray()
    if config.trajectories is not None:
        check_given(config.trajectories, domain.name)
        given = read_jsonl(config.trajectories, Trajectory)
        check_tasks(tools, (trajectory.task for trajectory in given))
        return []
    tasks = load_tasks(config.agent)
    if len({task.task_id for task in tasks}) < len(tasks):
        raise InputError(
            f"{config.agent.tasks!r} gives several tasks with one id: give each its own"
        )
    index, parts = parse_shard(config.shard)
    if index >= len(tasks):
        raise InputError(empty_shard((index, parts), len(tasks)))
    return tasks[index::parts]


def _finished_counts(out: Path) -> Mapping[str, int] | None:
    """Return the counts of a run that needs no more work, else None."""
    if not ((out / MANIFEST).is_file() and (out / LABELS).is_file()):
        return None
    manifest = read_manifest(out)
    return manifest.counts if manifest.status == "finished" else None


def _parents(config: LabelConfig) -> list[Path]:
    """Return the files and folders that the run reads."""
    source = config.agent.tasks
    names = dict.fromkeys([source, source.partition(":")[2], *re.split("[:,=]", source)])
    files = [path for path in map(Path, names) if path.is_file()]
    given = [] if config.trajectories is None else [config.trajectories]
    return [Path(config.agent.policy), *files, *given]


async def _label(
    config: LabelConfig, tasks: Sequence[Task], run: RunFolder, engine: Engine | None
) -> LabelReport:
    """Collect what is missing and freeze the labels."""
    out = run.path
    async with open_agent(config.agent, engine=engine, run=run) as acting:
        agent = repeatable(acting, config)
        path = out / TRAJECTORIES
        cut = repair_tail(path)
        dropped_ids = 0
        if config.trajectories is not None:
            dropped_ids = copy_given(
                config.trajectories, path, agent.chat, shard=parse_shard(config.shard)
            )
        stats = agent.engine.stats
        tokens, busy, started = stats.generated_tokens, stats.busy_seconds, time.monotonic()
        prompt, cached = stats.prompt_tokens, stats.cached_prompt_tokens
        with (
            Ledger(out / EVIDENCE, completer=completer_of(agent)) as ledger,
            TrajectoryFile(path) as trajectories,
        ):
            await _collect(config, tasks, agent, ledger, trajectories)
            seconds = time.monotonic() - started
            counts = freeze(config, ledger, trajectories, out)
    counts["cut_lines"] = cut + ledger.cut_lines
    counts["duplicate_lines"] = ledger.duplicates
    counts["trajectories_reencoded"] = dropped_ids
    return LabelReport(
        counts=counts,
        seconds=seconds,
        prompt_tokens=stats.prompt_tokens - prompt,
        cached_prompt_tokens=stats.cached_prompt_tokens - cached,
        tokens=stats.generated_tokens - tokens,
        busy_seconds=stats.busy_seconds - busy,
    )


def _label_on_ray(
    config: LabelConfig, tasks: Sequence[Task], run: RunFolder, engine: Engine | None
) -> LabelReport:
    """Collect what is missing on a Ray cluster and freeze the labels."""
    out = run.path
    cut, dropped_ids = repair_tail(out / TRAJECTORIES), 0
    if config.trajectories is not None:
        chat = ChatFormat.load(config.agent.policy, tools=(), kind=config.agent.chat_format)
        dropped_ids = copy_given(
            config.trajectories, out / TRAJECTORIES, chat, shard=parse_shard(config.shard)
        )
    with Intake(config, run, (TRAJECTORIES, EVIDENCE, CONTINUATIONS)) as intake:
        started = time.monotonic()
        workers = collect_on_ray(config, tasks, intake, engine=engine)
        seconds = time.monotonic() - started
        counts = freeze(config, intake.ledger, intake.trajectories, out)
        counts["cut_lines"] = cut + intake.cut_lines
        counts["duplicate_lines"] = intake.ledger.duplicates
    counts["trajectories_reencoded"] = dropped_ids
    totals = intake.totals
    return LabelReport(
        counts=counts,
        seconds=seconds,
        prompt_tokens=totals.prompt_tokens,
        cached_prompt_tokens=totals.cached_prompt_tokens,
        tokens=totals.generated_tokens,
        busy_seconds=totals.busy_seconds,
        workers=workers,
    )


async def _collect(
    config: LabelConfig,
    tasks: Sequence[Task],
    agent: Agent,
    ledger: Ledger,
    trajectories: TrajectoryFile,
) -> None:
    """Run every episode that is missing."""
    with ExitStack() as files:
        continuations = None
        if config.keep_continuations:
            kept = config.out / CONTINUATIONS
            repair_tail(kept)
            continuations = files.enter_context(JsonlWriter(kept))
        collector = Collector(
            agent,
            plan_of(config),
            ledger=ledger,
            trajectories=trajectories,
            continuations=continuations,
        )
        collector.prepare(tasks)
        done = ledger.totals.rollouts
        with progress("rollouts", collector.planned, done=done) as bar:
            await collector.run(concurrency=config.agent.concurrency, bar=bar)


def freeze(
    config: LabelConfig, ledger: Ledger, trajectories: TrajectoryFile, out: Path
) -> dict[str, int]:
    """Write the labels of all trajectories.

    Parameters
    ----------
    config : LabelConfig
        Which estimator, limits and sampling.
    ledger : Ledger
        All evidence.
    trajectories : TrajectoryFile
        All trajectories.
    out : Path
        Folder that takes labels.parquet.

    Returns
    -------
    dict
        Counts for the manifest.
    """
    counts = {"trajectories": 0, "trajectories_failed": 0, "trajectories_truncated": 0}
    counts |= {"labelled": 0, "values": 0, "values_unknown": 0, "reused": 0, "abandoned": 0}

    def rows() -> Iterator[LabelledTrajectory]:
        for work in measured_tasks(
            trajectories, ledger, max_steps=config.agent.max_steps, same=config.same_state
        ):
            counts["trajectories_failed"] += work.num_failed
            counts["trajectories"] += work.num_failed + len(work.trajectories)
            counts["reused"] += sum(node.reused.rollouts for node in work.nodes)
            counts["abandoned"] += sum(node.abandoned for node in work.nodes)
            for trajectory in work.trajectories:
                counts["trajectories_truncated"] += trajectory.stop.truncated
                row = _row(config, ledger.completer, work, trajectory)
                counts["labelled"] += 1
                counts["values"] += len(row.labels.values)
                counts["values_unknown"] += row.labels.values.count(None)
                yield row

    write_labels(out / LABELS, rows())
    totals = {name: int(value) for name, value in asdict(ledger.totals).items()}
    counts |= {"states": ledger.num_states, "tokens_of_trajectories": trajectories.tokens}
    return {**counts, **totals}


def _row(
    config: LabelConfig, completer: str, work: TaskWork, trajectory: Trajectory
) -> LabelledTrajectory:
    """Label one trajectory."""
    evidence = work.evidence(
        trajectory,
        rollouts=config.rollouts,
        completer=completer,
        sampling=Sampling(
            temperature=config.agent.temperature, max_tokens=config.agent.max_turn_tokens
        ),
    )
    if config.estimator == BACKED_UP:
        exclude = config.truncated == "exclude"
        labels = backed_up_labels(work, trajectory, level=config.level, exclude_truncated=exclude)
        return LabelledTrajectory(trajectory=trajectory, evidence=evidence, labels=labels)
    special = None
    if config.estimator == STOPPED:
        special = partial(stopped_or_unknown, rule=config.stopping_rule)
    labels = label_steps(
        evidence,
        config.estimator,
        level=config.level,
        truncated=config.truncated,
        special=special,
    )
    return LabelledTrajectory(trajectory=trajectory, evidence=evidence, labels=labels)


def _show(report: LabelReport, console: Console, *, max_tokens: int | None) -> None:
    """Print what came out and what it cost."""
    counts = report.counts
    rollouts = max(1, counts["rollouts"])
    lines = {
        "trajectories": f"{counts['trajectories']} ({counts['trajectories_failed']} failed)",
        "labelled states": f"{counts['values']} ({counts['values_unknown']} unknown)",
        "states rolled out": f"{counts['states']}",
        "rollouts": f"{counts['rollouts']}",
        "counted for a later state too": f"{counts['reused']}",
        "right": f"{counts['correct'] / rollouts:.1%}",
        "truncated": f"{counts['truncated'] / rollouts:.1%}",
        "failed": f"{counts['failed'] / rollouts:.1%}",
        "tokens in rollouts": f"{counts['tokens']}",
        "tokens per label": f"{counts['tokens'] / max(1, counts['values']):.1f}",
        "tool calls": f"{counts['tool_calls']}",
        "seconds, this start": f"{report.seconds:.1f}",
    }
    if max_tokens is not None:
        spent = counts["tokens"] + counts["tokens_of_trajectories"]
        lines["of the budget of tokens"] = f"{spent} of {max_tokens}"
    if report.workers > 1:
        lines["workers"] = f"{report.workers}"
    if report.seconds > 0:
        lines["tokens per second"] = f"{report.tokens / report.seconds:.0f}"
        if report.busy_seconds:
            share = report.busy_seconds / report.seconds / report.workers
            lines["engine busy"] = f"{share:.0%}"
    if report.cached_prompt_tokens:
        share = report.cached_prompt_tokens / report.prompt_tokens
        lines["prompt tokens from the cache"] = f"{share:.0%}"
    table = Table(show_header=False, title="labels")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table)
