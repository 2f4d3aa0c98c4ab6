"""Builds what a labelling run works with from its settings: repeatable tools, names, the plan."""

from __future__ import annotations

from dataclasses import replace

from agent.episode import Agent
from agent.tools.base import SideEffect, Tool
from labeling.collect import Plan
from labeling.config import LabelConfig
from labeling.recorded import RecordedTool, recordings
from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.store import read_jsonl


def repeatable(agent: Agent, config: LabelConfig) -> Agent:
    """Have tools whose calls cannot be repeated answered from the record.

    Parameters
    ----------
    agent : Agent
        With its tools as they are.
    config : LabelConfig
        Whose ``trajectories`` are the record.

    Returns
    -------
    Agent
        The same agent if all its tools can be called again.

    Raises
    ------
    InputError
        If a tool changes the world and there is no record to answer from.
    """
    names = [tool.name for tool in agent.tools if tool.effect is SideEffect.IRREVERSIBLE]
    if not names:
        return agent
    if config.observations == "executed" or config.trajectories is None:
        raise InputError(
            f"tools {', '.join(names)} change the world outside, so no state can be restored to "
            "continue from: leave them out of --tools, or label recorded --trajectories with "
            "--observations recorded"
        )
    tools: list[Tool] = []
    for tool in agent.tools:
        if tool.name in names:
            given = read_jsonl(config.trajectories, Trajectory)
            tools.append(RecordedTool(tool, recordings(given, tool.name)))
        else:
            tools.append(tool)
    return replace(agent, tools=tuple(tools))


def completer_of(agent: Agent) -> str:
    """Name the model and weights behind the rollouts."""
    engine = agent.engine
    return f"{engine.policy}@{engine.revision}" if engine.revision else engine.policy


def plan_of(config: LabelConfig) -> Plan:
    """Return what a run with these settings collects."""
    return Plan(
        strategy=config.strategy,
        rollouts=config.rollouts,
        samples=config.samples,
        seed=config.seed,
        same_state=config.same_state,
        exclude_truncated=config.truncated == "exclude",
        max_tokens=config.max_tokens,
    )
