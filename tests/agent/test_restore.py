"""Restored tool states: each made once, checked against the record, then branched."""

import asyncio
import json
from dataclasses import dataclass, field

import pytest

from agent.restore import RestoredTools, num_calls
from agent.tools.base import ReplayMismatch, SideEffect
from trajectory.records import Observation, Step, StopReason, Task, ToolCall, Trajectory

TASK = Task(task_id="t", domain="jsonl", prompt="?", answer="1")


@dataclass
class Journal:
    """What was done to the sessions of a tool."""

    opened: int = 0
    called: list[str] = field(default_factory=list)
    branched: int = 0
    open_now: int = 0


class NotebookSession:
    """Remembers every word it was told."""

    def __init__(self, tool, words):
        self.tool, self.words = tool, words
        self.closed = False
        tool.journal.open_now += 1

    async def call(self, arguments):
        await asyncio.sleep(0)
        self.words = [*self.words, arguments["word"]]
        self.tool.journal.called.append(arguments["word"])
        return Observation(content=" ".join(self.words) + self.tool.suffix)

    async def branch(self):
        self.tool.journal.branched += 1
        return NotebookSession(self.tool, self.words)

    async def close(self):
        self.tool.journal.open_now -= not self.closed
        self.closed = True


class Notebook:
    """A tool with a state."""

    name = "notebook"
    description = "Remembers."
    parameters: dict = {}  # noqa: RUF012
    effect = SideEffect.STATEFUL

    def __init__(self, suffix=""):
        self.journal, self.suffix = Journal(), suffix

    async def open(self, task, seed):
        self.journal.opened += 1
        return NotebookSession(self, [])


def step(*words, before=()):
    said = list(before)
    observations = []
    for word in words:
        said.append(word)
        observations.append(Observation(content=" ".join(said)))
    calls = tuple(ToolCall(name="notebook", arguments=json.dumps({"word": w})) for w in words)
    return Step(text=f"I say {words}.", calls=calls, observations=tuple(observations))


def trajectory():
    """Five steps: a call, two calls, a call of nothing that exists, a call, the answer."""
    stray = Step(
        text="?",
        calls=(ToolCall(name="notebok", arguments="{}"),),
        observations=(Observation(content="no such tool", error="unknown_tool"),),
    )
    steps = (
        step("a"),
        step("b", "c", before=["a"]),
        stray,
        step("d", before=["a", "b", "c"]),
        Step(text="Done."),
    )
    return Trajectory(
        trajectory_id="t/0", task=TASK, steps=steps, stop=StopReason.ANSWERED, outcome=1.0, seed=3
    )


async def said(session):
    return (await session.call({"word": "x"})).content


def test_every_prefix_is_restored_with_each_call_made_once():
    async def run():
        tool = Notebook()
        restored = RestoredTools(trajectory())
        texts = {}
        for steps in (4, 1, 2, 3, 1, 4):
            sessions = [await restored.open(tool, steps) for _ in range(3)]
            texts[steps] = {await said(session) for session in sessions}
            for session in sessions:
                await session.close()
        assert texts == {1: {"a x"}, 2: {"a b c x"}, 3: {"a b c x"}, 4: {"a b c d x"}}
        replayed = [word for word in tool.journal.called if word != "x"]
        assert len(replayed) == 4 + 1 + 2  # all of 4; then 1; 2 from 1; 3 is as 2
        await restored.close()
        assert tool.journal.open_now == 0

    asyncio.run(run())


def test_in_order_every_call_of_a_trajectory_is_repeated_once():
    async def run():
        tool = Notebook()
        restored = RestoredTools(trajectory())
        for steps in (1, 2, 3, 4):
            await restored.open(tool, steps)
        assert tool.journal.called == ["a", "b", "c", "d"]
        assert tool.journal.opened == 1

    asyncio.run(run())


def test_rollouts_that_begin_at_once_wait_for_one_restoration():
    async def run():
        tool = Notebook()
        restored = RestoredTools(trajectory())
        sessions = await asyncio.gather(*(restored.open(tool, 4) for _ in range(8)))
        assert tool.journal.called == ["a", "b", "c", "d"]
        await sessions[0].call({"word": "mine"})
        assert await said(sessions[1]) == "a b c d x"

    asyncio.run(run())


def test_a_tool_that_was_not_called_is_opened_afresh():
    async def run():
        tool = Notebook()
        restored = RestoredTools(trajectory())
        session = await restored.open(tool, 0)
        assert await said(session) == "x"
        assert tool.journal.branched == 0

    asyncio.run(run())


def test_a_tool_that_answers_differently_is_a_mismatch_from_there_on():
    async def run():
        tool = Notebook(suffix="!")
        restored = RestoredTools(trajectory())
        for steps in (2, 4, 2):
            with pytest.raises(ReplayMismatch, match="recorded was 'a'"):
                await restored.open(tool, steps)
        assert tool.journal.called == ["a"]  # later prefixes contain the same call
        assert tool.journal.open_now == 0

    asyncio.run(run())


def test_calls_that_reached_a_tool_are_counted():
    assert num_calls("notebook", trajectory().steps) == 4
    assert num_calls("calculator", trajectory().steps) == 0
