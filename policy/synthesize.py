"""Turn solutions into interleaved trajectories: think, call, observe, with the tool really run.

Two sources: the gold programs of the arithmetic laboratory, acted out by a demonstrator that may
slip; and written solutions with calculator marks (``<<48/2=24>>``, as in GSM8K), where the text
before a mark becomes the thought and the mark the call. What cannot be turned into a sound
trajectory is dropped and counted by reason.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

from agent.sandbox import AUTO, SandboxProvider
from agent.tasks import parse_tasks
from agent.tasks.arithmetic import TOOL, ArithmeticDomain
from agent.tasks.arithmetic_demonstrator import Weakness, demonstrate
from agent.tasks.base import Split, TaskDomain
from agent.tools import build_tools, tools_hash
from agent.tools.base import Tool
from trajectory.errors import InputError
from trajectory.formats import format_call
from trajectory.progress import progress
from trajectory.records import (
    JsonValue,
    Observation,
    Step,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
)
from trajectory.run import config_dict, open_run
from trajectory.seeds import derive_seed
from trajectory.store import JsonlWriter, atomic_path

TRAJECTORIES = "trajectories.jsonl"
SYSTEM = "system"
"""Key in a trajectory's ``meta``: the system prompt an agent gets for the task."""
_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_FINAL = re.compile(r"\n?####.*\Z", re.DOTALL)
_CONCURRENCY = 8
"""Solutions acted out at a time; bounds the sandbox sessions that are open."""


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Demonstrations from gold programs or written solutions."""

    tasks: str
    """Task source: arithmetic, arithmetic:operations=2-4 or math:FILE.jsonl with solutions."""
    out: Path
    """Folder for trajectories.jsonl and manifest.json."""
    num_tasks: int | None = None
    """How many tasks; all of a file when not given."""
    split: Split = "train"
    """Which part of the source."""
    first_task: int = 0
    """Index of the first task used."""
    tool: str = ""
    """Tool that is called: calculator or python; the domain's own when not given."""
    max_calls: int | None = None
    """Leave out demonstrations with more tool calls."""
    samples: int = 1
    """Demonstrations per task (arithmetic only: a written solution is one)."""
    slip: float | None = None
    """Arithmetic: slip rate at the most difficult operations, 0 for gold; default 0.5."""
    contrast: float | None = None
    """Arithmetic: how much the slip rate depends on the operation, 0 to 1; default 0.95."""
    recovery: float | None = None
    """Arithmetic: how often the turn after a slip repairs it, 0 to 1; default 0.1."""
    system_prompt: str | None = None
    """Instructions an agent gets before every problem; the domain's own when not given."""
    seed: int = 0
    """Fixes the slips."""
    sandbox: str = AUTO
    """Where code runs: auto (the strongest this machine offers) or a backend."""
    allow_unsafe_tools: bool = False
    """Accept a sandbox that runs code without isolation on this machine."""

    def __post_init__(self) -> None:
        for name in ("slip", "contrast", "recovery"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"--{name} must be between 0 and 1, not {value}")
        for name in ("num_tasks", "max_calls", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1, not {value}")
        if self.first_task < 0:
            raise InputError("--first-task must be >= 0")


class Dropped(Exception):
    """A demonstration that is left out; the message is the reason it is counted under."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One calculator mark of a written solution."""

    thought: str
    """Text before it."""
    expression: str
    result: str
    """What the solution says comes out."""


def read_marks(solution: str) -> tuple[list[Mark], str]:
    r"""Split a solution at its calculator marks.

    Parameters
    ----------
    solution : str
        Text with marks ``<<expression=result>>``; a final ``#### answer`` is left out.

    Returns
    -------
    marks : list of Mark
        In order; empty if there are none.
    rest : str
        Text after the last mark.

    Examples
    --------
    >>> read_marks("He has 2*3=<<2*3=6>>6 pens.\n#### 6")
    ([Mark(thought='He has 2*3=', expression='2*3', result='6')], '6 pens.')
    """
    text = _FINAL.sub("", solution)
    marks, end = [], 0
    for found in _MARK.finditer(text):
        thought = text[end : found.start()].strip()
        marks.append(Mark(thought=thought, expression=found[1].strip(), result=found[2].strip()))
        end = found.end()
    return marks, text[end:].strip()


def synthesize(config: SynthesizeConfig) -> Path:
    """Write demonstrations to ``trajectories.jsonl`` of a run folder.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        If the source is missing or malformed, a flag does not apply to it, or nothing is left.
    """
    domain = parse_tasks(config.tasks)
    if config.system_prompt is not None:
        domain.system_prompt = config.system_prompt
    _check(config, domain)
    names = (config.tool,) if config.tool else domain.default_tools[:1]
    sandbox = SandboxProvider(config.sandbox, allow_unsafe=config.allow_unsafe_tools)
    (tool,) = build_tools(names, sandbox)
    tasks = domain.load(split=config.split, first=config.first_task, count=config.num_tasks)
    if not tasks:
        raise InputError(f"{config.tasks!r} gives no task in split {config.split!r}")
    path = config.out / TRAJECTORIES
    with open_run(config.out, kind="synthesize", config=config_dict(config)) as run:
        run.stamp(sandbox.isolation)
        counts = asyncio.run(_act(config, domain, tool, tasks, path, sandbox))
        run.finish(counts)
    if not counts["written"]:
        raise InputError(f"no demonstration was left of {len(tasks)} tasks: {dict(counts)}")
    return path


def _check(config: SynthesizeConfig, domain: TaskDomain) -> None:
    """Refuse flags that do not apply to the source."""
    if isinstance(domain, ArithmeticDomain):
        if config.tool not in ("", TOOL):
            raise InputError(f"--tool {config.tool}: arithmetic is demonstrated with {TOOL}")
        return
    for name in ("slip", "contrast", "recovery"):
        if getattr(config, name) is not None:
            raise InputError(f"--{name} is for --tasks arithmetic, not {config.tasks!r}")
    if config.samples != 1:
        raise InputError(f"--samples is for --tasks arithmetic, not {config.tasks!r}")


def _weakness(config: SynthesizeConfig) -> Weakness:
    """Return the demonstrator's rates, its defaults where no flag was given."""
    default = Weakness()
    return Weakness(
        slip=default.slip if config.slip is None else config.slip,
        contrast=default.contrast if config.contrast is None else config.contrast,
        recovery=default.recovery if config.recovery is None else config.recovery,
    )


async def _act(
    config: SynthesizeConfig,
    domain: TaskDomain,
    tool: Tool,
    tasks: Sequence[Task],
    path: Path,
    sandbox: SandboxProvider,
) -> Counter[str]:
    """Write the demonstrations and end the sandbox."""
    try:
        return await _write(config, domain, tool, tasks, path)
    finally:
        await sandbox.close()


async def _write(
    config: SynthesizeConfig, domain: TaskDomain, tool: Tool, tasks: Sequence[Task], path: Path
) -> Counter[str]:
    """Act out every task and append what is sound, in task order."""
    weakness = _weakness(config)

    async def act(task: Task, sample: int) -> Trajectory:
        if isinstance(domain, ArithmeticDomain):
            rng = Random(derive_seed("slip", config.seed, task.task_id, sample))  # noqa: S311
            steps = await demonstrate(task, tool, weakness=weakness, rng=rng)
            policy = "demonstrator"
        else:
            steps = await follow_solution(task, tool, domain, max_calls=config.max_calls)
            policy = "solution"
        if config.max_calls is not None and len(steps) - 1 > config.max_calls:
            raise Dropped("dropped_too_many_calls")
        return await _trajectory(task, sample, steps, domain=domain, tool=tool, policy=policy)

    jobs = [(task, sample) for task in tasks for sample in range(config.samples)]
    counts: Counter[str] = Counter(tasks=len(tasks), written=0, correct=0)
    with (
        atomic_path(path) as temporary,
        JsonlWriter(temporary) as writer,
        progress("demonstrations", len(jobs)) as bar,
    ):
        async for outcome in _in_order(jobs, act):
            if isinstance(outcome, Dropped):
                counts[str(outcome)] += 1
            else:
                writer.append(outcome)
                counts["written"] += 1
                counts["correct"] += outcome.outcome == 1.0
            bar.advance(written=counts["written"])
    return counts


async def _in_order(
    jobs: Sequence[tuple[Task, int]], act: Callable[[Task, int], Awaitable[Trajectory]]
) -> AsyncIterator[Trajectory | Dropped]:
    """Run jobs a few at a time and yield their results in job order."""

    async def attempt(task: Task, sample: int) -> Trajectory | Dropped:
        try:
            return await act(task, sample)
        except Dropped as reason:
            return reason

    for start in range(0, len(jobs), _CONCURRENCY):
        batch = jobs[start : start + _CONCURRENCY]
        for result in await asyncio.gather(*(attempt(*job) for job in batch)):
            yield result


async def _trajectory(
    task: Task,
    sample: int,
    steps: Sequence[Step],
    *,
    domain: TaskDomain,
    tool: Tool,
    policy: str,
) -> Trajectory:
    """Put steps together with their verdict."""
    answer = domain.extract(steps[-1].text)
    meta: dict[str, JsonValue] = {SYSTEM: domain.system_prompt}
    if isolation := str(getattr(tool, "isolation", "")):
        meta["isolation"] = isolation
    return Trajectory(
        trajectory_id=f"{task.task_id}/demo-{sample}",
        task=task,
        steps=tuple(steps),
        stop=StopReason.MALFORMED if answer is None else StopReason.ANSWERED,
        answer=answer,
        outcome=0.0 if answer is None else await domain.grade(task, answer, steps),
        group=task.task_id,
        policy=policy,
        tools=(tool.name,),
        tools_hash=tools_hash([tool]),
        meta=meta,
    )


async def follow_solution(
    task: Task, tool: Tool, domain: TaskDomain, *, max_calls: int | None = None
) -> tuple[Step, ...]:
    """Act out a written solution with calculator marks, running each one.

    Parameters
    ----------
    task : Task
        With the solution in ``meta["solution"]``.
    tool : Tool
        Calculator or Python.
    domain : TaskDomain
        Checks the final answer.
    max_calls : int, optional
        Longest solution accepted.

    Raises
    ------
    InputError
        If the task has no solution.
    Dropped
        If it has no or too many marks, a result differs from its mark, the final answer is not
        among the results, or the checker rejects the final turn.
    """
    solution = task.meta.get("solution")
    if not isinstance(solution, str):
        raise InputError(
            f"task {task.task_id!r} has no solution to follow: give rows with a 'solution' column"
        )
    marks, rest = read_marks(solution)
    if not marks:
        raise Dropped("dropped_no_marks")
    if max_calls is not None and len(marks) > max_calls:
        raise Dropped("dropped_too_many_calls")
    session = await tool.open(task, 0)
    try:
        steps = []
        for mark in marks:
            call = _call(tool, mark.expression)
            observation = await session.call(json.loads(call.arguments))
            _compare(observation, mark)
            text = f"{mark.thought}\n{format_call(call)}".lstrip()
            # How long the call took says nothing about a demonstration, and would make two runs
            # of the same command differ.
            kept = Observation(content=observation.content)
            steps.append(Step(text=text, calls=(call,), observations=(kept,)))
    finally:
        await session.close()
    if _number(task.answer) not in {_number(step.observations[0].content) for step in steps}:
        raise Dropped("dropped_answer_not_computed")
    final = f"{rest}\nThe answer is \\boxed{{{task.answer}}}.".lstrip()
    answer = domain.extract(final)
    if answer is None or await domain.grade(task, answer, steps) < 1:
        raise Dropped("dropped_answer_rejected")
    return (*steps, Step(text=final))


def _call(tool: Tool, expression: str) -> ToolCall:
    """Write the call that computes an expression with either tool."""
    arguments = (
        {"code": f"print({expression})"} if tool.name == "python" else {"expression": expression}
    )
    return ToolCall(name=tool.name, arguments=json.dumps(arguments))


def _compare(observation: Observation, mark: Mark) -> None:
    """Insist that the tool's result is the mark's."""
    if observation.error is not None:
        raise Dropped("dropped_tool_error")
    expected = _number(mark.result)
    if expected is None or _number(observation.content) != expected:
        raise Dropped("dropped_result_differs")


def _number(text: str) -> Fraction | None:
    """Read a number as solutions write them, or None."""
    try:
        return Fraction(text.strip().replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):
        return None
