"""The episode loop: think, act, observe, until an answer or a limit.

State is a list of token ids. Sampled ids are kept as sampled and observations are appended as
ids, so a policy is trained on exactly what it sampled.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace

from agent.chat import BadCall, ChatFormat
from agent.engines.base import Engine, EngineError, GenerateRequest
from agent.restore import RestoredTools, call_arguments, replay, tool_seed
from agent.tasks.base import TaskDomain
from agent.tools.base import ReplayMismatch, SideEffect, Tool, ToolFailure, ToolSession
from trajectory.errors import InputError
from trajectory.records import (
    JsonValue,
    Observation,
    Sampling,
    Step,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
)
from trajectory.seeds import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeLimits:
    """Bounds of one episode."""

    max_steps: int = 16
    """Most assistant turns, >= 1."""
    max_context: int = 4096
    """Most ids in all: prompt, turns and observations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """Everything that acts, made once and shared by all episodes."""

    engine: Engine
    chat: ChatFormat
    tools: tuple[Tool, ...]
    tools_hash: str
    domain: TaskDomain
    sampling: Sampling
    limits: EpisodeLimits
    system_prompt: str
    """Instructions put before every problem; empty for none."""
    isolation: str = ""
    """Isolation of the sandbox behind the tools, stamped into every trajectory; empty if none
    of them runs code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """The state of a trajectory after some of its steps."""

    trajectory: Trajectory
    steps: int
    """Steps kept, 0..S."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSpec:
    """One episode to run."""

    trajectory_id: str
    task: Task
    seed: int
    group: str = ""
    start: Prefix | None = None
    """Continue from here instead of from the task's prompt."""
    restored: RestoredTools | None = None
    """Tool states of ``start``'s trajectory, shared with its other continuations; None: this
    episode repeats the calls itself."""


class _ToolBox:
    """The tool sessions of one episode, opened on first use in the state its prefix left."""

    def __init__(self, agent: Agent, spec: EpisodeSpec) -> None:
        self._tools = {tool.name: tool for tool in agent.tools}
        self._spec = spec
        self._sessions: dict[str, ToolSession] = {}

    async def call(self, call: ToolCall) -> Observation:
        """Run one call; whatever the model did wrong becomes an observation."""
        if call.name not in self._tools:
            known = ", ".join(self._tools) or "none"
            return Observation(
                content=f"Error: there is no tool named {call.name!r}; tools: {known}",
                error="unknown_tool",
            )
        session = self._sessions.get(call.name)
        if session is None:
            session = self._sessions[call.name] = await self._open(self._tools[call.name])
        return await session.call(call_arguments(call))

    async def _open(self, tool: Tool) -> ToolSession:
        """Open a session in the state the prefix left it in."""
        start = self._spec.start
        if start is None:
            return await tool.open(self._spec.task, tool_seed(tool, self._spec.seed))
        if self._spec.restored is not None:
            return await self._spec.restored.open(tool, start.steps)
        session = await tool.open(self._spec.task, tool_seed(tool, start.trajectory.seed))
        if tool.effect is SideEffect.PURE:
            return session
        try:
            await replay(session, tool.name, start.trajectory.steps[: start.steps])
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """Close every session."""
        for session in self._sessions.values():
            await session.close()


async def run_episode(agent: Agent, spec: EpisodeSpec) -> Trajectory:
    """Run one episode, or continue one from a prefix, to its end.

    Parameters
    ----------
    agent : Agent
        Engine, chat format, tools, domain, sampling and limits.
    spec : EpisodeSpec
        Task, seed and, for a continuation, the prefix: its steps are kept as they are and tool
        state is restored (`agent.restore`), checked against the recorded results.

    Returns
    -------
    Trajectory
        The whole trajectory, prefix included. Broken tools or engines end it as
        ``TOOL_FAILURE`` or ``ENGINE_FAILURE`` with the cause in ``meta["failure"]``;
        ``meta["replay_mismatch"]`` is true if the prefix could not be restored as recorded.

    Raises
    ------
    InputError
        If a tool with irreversible effects would have to be re-executed, or the prompt alone
        exceeds ``limits.max_context``.
    """
    prompt_ids, steps = _start(agent, spec)
    toolbox = _ToolBox(agent, spec)
    meta: dict[str, JsonValue] = {"isolation": agent.isolation} if agent.isolation else {}
    answer: str | None = None
    outcome: float | None = None
    try:
        stop, answer = await _interact(agent, spec, prompt_ids, steps, toolbox)
        if stop.judged:
            outcome = 0.0
            if answer is not None:
                outcome = await agent.domain.grade(spec.task, answer, steps)
    except EngineError as error:
        stop, meta["failure"] = StopReason.ENGINE_FAILURE, str(error)
    except ToolFailure as error:
        stop, meta["failure"] = StopReason.TOOL_FAILURE, str(error)
        if isinstance(error, ReplayMismatch):
            meta["replay_mismatch"] = True
    finally:
        await toolbox.close()
    return Trajectory(
        trajectory_id=spec.trajectory_id,
        task=spec.task,
        steps=tuple(steps),
        stop=stop,
        answer=answer,
        outcome=outcome,
        group=spec.group,
        policy=agent.engine.policy,
        policy_revision=agent.engine.revision,
        sampling=agent.sampling,
        seed=spec.seed,
        tools=tuple(tool.name for tool in agent.tools),
        tools_hash=agent.tools_hash,
        prompt_ids=prompt_ids,
        meta=meta,
    )


def _start(agent: Agent, spec: EpisodeSpec) -> tuple[tuple[int, ...], list[Step]]:
    """Return the prompt ids and the steps of the prefix, each with the ids it needs."""
    fresh = agent.chat.prompt_ids(agent.system_prompt, spec.task.prompt)
    if len(fresh) >= agent.limits.max_context:
        raise InputError(
            f"the prompt of task {spec.task.task_id!r} has {len(fresh)} tokens, the limit "
            f"--max-context is {agent.limits.max_context}: raise it or drop the task"
        )
    if spec.start is None or spec.start.steps == 0:
        return fresh, []
    irreversible = [t.name for t in agent.tools if t.effect is SideEffect.IRREVERSIBLE]
    if irreversible:
        raise InputError(
            f"tools {irreversible} have irreversible effects, so no trajectory can be continued "
            "by re-executing them: leave them out of --tools"
        )
    past = spec.start.trajectory
    steps = [_with_ids(agent.chat, step) for step in past.steps[: spec.start.steps]]
    return past.prompt_ids or fresh, steps


def _with_ids(chat: ChatFormat, step: Step) -> Step:
    """Give a step that came as text (another framework's trajectory) its token ids."""
    token_ids = step.token_ids or chat.turn_ids(step.text)
    observation_ids = step.observation_ids
    if observation_ids is None and step.calls:
        observation_ids = chat.observation_ids(_results(step.calls, step.observations))
    return replace(step, token_ids=token_ids, observation_ids=observation_ids)


def _results(
    calls: Iterable[ToolCall], observations: Iterable[Observation]
) -> list[tuple[str, str]]:
    """Pair tool names with contents."""
    return [(c.name, o.content) for c, o in zip(calls, observations, strict=True)]


async def _interact(
    agent: Agent,
    spec: EpisodeSpec,
    prompt_ids: tuple[int, ...],
    steps: list[Step],
    toolbox: _ToolBox,
) -> tuple[StopReason, str | None]:
    """Alternate turns and observations, appending to ``steps``, until the episode ends."""
    spoken_code = any(tool.name == "python" for tool in agent.tools)
    ids = list(prompt_ids)
    for step in steps:
        ids += (*(step.token_ids or ()), *(step.observation_ids or ()))
    while len(steps) < agent.limits.max_steps:
        room = agent.limits.max_context - len(ids)
        if room < 1:
            return StopReason.MAX_TOKENS, None
        generation = await agent.engine.generate(
            GenerateRequest(
                request_id=f"{spec.trajectory_id}#{len(steps)}",
                prompt_ids=tuple(ids),
                sampling=replace(agent.sampling, max_tokens=min(agent.sampling.max_tokens, room)),
                seed=derive_seed("turn", spec.seed, len(steps)),
                stop_ids=agent.chat.stop_ids,
                stop_when=agent.chat.call_complete if spoken_code else None,
                affinity=spec.task.task_id,
            )
        )
        text = agent.chat.decode(generation.token_ids)
        turn = Step(text=text, token_ids=generation.token_ids, logprobs=generation.logprobs)
        steps.append(turn)
        if generation.finish == "length":
            return StopReason.MAX_TOKENS, None
        parsed = agent.chat.parse(text)
        if not parsed:
            answer = agent.domain.extract(text)
            return StopReason.ANSWERED if answer is not None else StopReason.MALFORMED, answer
        calls, observations = [], []
        for item in parsed:
            if isinstance(item, BadCall):
                calls.append(ToolCall(name="", arguments=json.dumps({"text": item.text})))
                content = f"Error: {item.reason}"
                observations.append(Observation(content=content, error="malformed_call"))
            else:
                calls.append(item)
                observations.append(await toolbox.call(item))
        observation_ids = agent.chat.observation_ids(
            _results(calls, observations),
            turn_ended=generation.token_ids[-1] in agent.chat.stop_ids,
        )
        steps[-1] = replace(
            turn,
            calls=tuple(calls),
            observations=tuple(observations),
            observation_ids=observation_ids,
        )
        ids += (*generation.token_ids, *observation_ids)
    return StopReason.MAX_STEPS, None


async def run_episodes(
    agent: Agent, specs: Iterable[EpisodeSpec], *, concurrency: int
) -> AsyncIterator[Trajectory]:
    """Run many episodes, at most ``concurrency`` alive at a time, yielding each as it ends.

    ``specs`` is consumed lazily, so it may be a generator that never ends. Given an engine and
    tools that are deterministic, so is the order. Leaving the loop cancels what is in flight.
    """
    ended: asyncio.Queue[asyncio.Task[Trajectory]] = asyncio.Queue()
    alive: set[asyncio.Task[Trajectory]] = set()
    iterator = iter(specs)
    try:
        while True:
            while len(alive) < concurrency and (spec := next(iterator, None)) is not None:
                episode = asyncio.create_task(run_episode(agent, spec))
                alive.add(episode)
                episode.add_done_callback(ended.put_nowait)
            if not alive:
                return
            finished = await ended.get()
            alive.discard(finished)
            yield finished.result()
    finally:
        for episode in alive:
            episode.cancel()
        await asyncio.gather(*alive, return_exceptions=True)
