"""Builds an agent and its tasks from the flags that all commands share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from agent.chat import ChatFormat, ChatKind
from agent.engines import build_engine
from agent.engines.base import Engine, EngineOptions
from agent.episode import Agent, EpisodeLimits
from agent.sandbox import AUTO, SandboxProvider
from agent.tasks import parse_tasks
from agent.tasks.base import Split
from agent.tools import build_tools, check_tasks, tools_hash
from trajectory.errors import InputError
from trajectory.records import Sampling, Task
from trajectory.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Who acts on what: tasks, policy, tools and limits."""

    tasks: str
    """Task source: arithmetic, arithmetic:operations=2-4, math:FILE.jsonl, code:FILE.jsonl,
    sql:FILE.jsonl, planning:blocksworld:FILE.jsonl or FILE.jsonl."""
    policy: str
    """Model that acts: hub id or folder."""
    split: Split = "train"
    """Which part of the source."""
    first_task: int = 0
    """Index of the first task used."""
    num_tasks: int | None = None
    """How many tasks; all of a file when not given."""
    tools: tuple[str, ...] = ()
    """Tools on offer; the domain's own when not given."""
    engine: str = "transformers"
    """Generation engine: transformers, vllm or http:URL[,URL...] (vLLM servers)."""
    chat_format: ChatKind = "auto"
    """The tokenizer's own template, or the built-in chatml."""
    system_prompt: str | None = None
    """Instructions put before every problem; the domain's own when not given."""
    temperature: float = 1.0
    """Softmax temperature, >= 0."""
    max_steps: int = 16
    """Most assistant turns in an episode."""
    max_turn_tokens: int = 512
    """Most new tokens in a turn."""
    max_context: int = 4096
    """Most tokens in an episode, prompt and observations included."""
    concurrency: int = 256
    """Episodes alive at a time, and most sequences in a batch."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the policy; auto is float32 on CPU and bfloat16 on GPU."""
    sandbox: str = AUTO
    """Where code of the policy runs: auto (the strongest this machine offers) or a backend."""
    allow_unsafe_tools: bool = False
    """Accept a sandbox that runs code without isolation on this machine."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_turn_tokens", "max_context", "concurrency"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1")
        if self.num_tasks is not None and self.num_tasks < 1:
            raise InputError("--num-tasks must be >= 1: an empty task set makes nothing")
        if self.first_task < 0:
            raise InputError("--first-task must be >= 0")
        if self.temperature < 0:
            raise InputError("--temperature must be >= 0")


@dataclass(frozen=True, kw_only=True)
class HeldOutAgentConfig(AgentConfig):
    """The same, on held-out tasks unless another split is named."""

    split: Split = "test"
    """Which part of the source."""


def load_tasks(config: AgentConfig) -> list[Task]:
    """Return the tasks that a config names.

    Raises
    ------
    InputError
        If the source is unknown, missing, malformed or gives no task, or a task lacks what a
        tool needs.
    """
    domain = parse_tasks(config.tasks)
    tasks = list(domain.load(split=config.split, first=config.first_task, count=config.num_tasks))
    if not tasks:
        raise InputError(f"{config.tasks!r} gives no task in split {config.split!r}")
    check_tasks(config.tools or domain.default_tools, tasks)
    return tasks


def sandbox_of(config: AgentConfig) -> SandboxProvider:
    """Return the provider of the sandbox that a config names."""
    return SandboxProvider(config.sandbox, allow_unsafe=config.allow_unsafe_tools)


@asynccontextmanager
async def open_agent(
    config: AgentConfig, *, engine: Engine | None = None, run: RunFolder | None = None
) -> AsyncIterator[Agent]:
    """Build the agent of a config and release its engine at the end.

    Parameters
    ----------
    config : AgentConfig
        Resolved flags.
    engine : Engine, optional
        Use this engine and leave it open, instead of making one.
    run : RunFolder, optional
        The run whose manifest is to say under which isolation code was run.
    """
    sandbox = sandbox_of(config)
    domain = parse_tasks(config.tasks, sandbox)
    tools = build_tools(config.tools or domain.default_tools, sandbox)
    if run is not None:
        run.stamp(sandbox.isolation)
    chat = ChatFormat.load(config.policy, tools=tools, kind=config.chat_format)
    made = engine or build_engine(
        config.engine,
        EngineOptions(
            policy=config.policy,
            device=config.device,
            dtype=config.dtype,
            max_batch=config.concurrency,
            max_context=config.max_context,
        ),
    )
    try:
        yield Agent(
            engine=made,
            chat=chat,
            tools=tools,
            tools_hash=tools_hash(tools),
            domain=domain,
            sampling=Sampling(temperature=config.temperature, max_tokens=config.max_turn_tokens),
            limits=EpisodeLimits(max_steps=config.max_steps, max_context=config.max_context),
            system_prompt=(
                domain.system_prompt if config.system_prompt is None else config.system_prompt
            ),
            isolation=sandbox.isolation,
        )
    finally:
        await sandbox.close()
        if engine is None:
            await made.close()
