"""Labelling with tools whose infrastructure breaks."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest

import agent.tools
from agent.tools.base import SideEffect, ToolFailure
from agent.tools.calculator import CalculatorSession, CalculatorTool
from labeling.config import LabelConfig
from labeling.ledger import Rollout
from labeling.run import label
from tests.labeling.walker import WalkerEngine, agent_config, make_tasks
from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.store import read_jsonl, read_labels


class FragileCalculator(CalculatorTool):
    """A calculator that cannot be reached whenever `broken` says so."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    async def open(self, task, seed):
        tool = self

        class FragileSession(CalculatorSession):
            async def call(self, arguments):
                if tool.broken(task):
                    raise ToolFailure("the calculator is out of reach")
                return await super().call(arguments)

        return FragileSession()


@pytest.fixture
def run(lab, tmp_path, monkeypatch):
    """Label with a fragile calculator."""

    def run(broken, *, effect=SideEffect.PURE, tasks=None, **changes):
        tool = FragileCalculator(broken)
        tool.effect = effect
        monkeypatch.setitem(agent.tools.TOOLS, "calculator", lambda sandbox: tool)
        settings = {"samples": 2, "rollouts": 4, "same_state": "never", **changes}
        config = LabelConfig(
            agent=agent_config(lab, concurrency=4, **({"tasks": str(tasks)} if tasks else {})),
            out=tmp_path / "labels",
            **settings,
        )
        return label(config, engine=WalkerEngine(lab / "policy"))

    return run


def rollouts(folder):
    return list(read_jsonl(folder / "labels" / "evidence.jsonl", Rollout))


def test_a_tool_that_never_works_stops_the_run_with_nothing_written(run, tmp_path):
    with pytest.raises(InputError, match=r"a tool stopped working.*out of reach.*resume"):
        run(lambda task: True)
    assert not (tmp_path / "labels").exists()


def test_a_tool_that_dies_midway_stops_the_run_and_costs_no_rollout(run, tmp_path):
    calls = Counter()
    tasks = make_tasks(tmp_path / "many.jsonl", 20)

    def dies(task):
        calls["all"] += 1
        return calls["all"] > 40

    with pytest.raises(InputError, match="a tool stopped working"):
        run(dies, tasks=tasks)
    assert len(rollouts(tmp_path)) > 10
    report = run(lambda task: False, tasks=tasks)
    assert report.counts["labelled"] == 40
    stops = Counter(r.stop for r in rollouts(tmp_path))
    assert stops[StopReason.ANSWERED] == report.counts["rollouts"] - report.counts["failed"]
    assert report.counts["failed"] == 0


def test_trouble_with_one_task_does_not_stop_the_others(run, tmp_path):
    report = run(lambda task: task.task_id == "t3")
    assert report.counts["trajectories_failed"] == 2
    assert report.counts["labelled"] == 10
    assert report.counts["failed"] == sum(r.task_id == "t3" for r in rollouts(tmp_path)) / 2
    assert all(r.stop.failed == (r.task_id == "t3") for r in rollouts(tmp_path))


def test_a_call_that_fails_now_and_then_is_repeated(run, tmp_path):
    calls = Counter()

    def hiccup(task):
        calls["all"] += 1
        return calls["all"] % 9 == 0

    report = run(hiccup)
    lines = rollouts(tmp_path)
    first = {(r.state, r.rollout) for r in lines if r.stop is StopReason.TOOL_FAILURE}
    again = {(r.state, r.rollout) for r in lines if r.attempt == 1}
    assert first
    assert first == again
    assert report.counts["retried"] == len(first)
    assert all(r.failure for r in lines if r.stop is StopReason.TOOL_FAILURE)


def test_a_last_rollout_that_always_fails_does_not_keep_a_run_from_finishing(run, tmp_path):
    finished = run(lambda task: False, rollouts=4)
    folder = tmp_path / "labels"
    lines = (folder / "evidence.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"task_id":"t0"' not in line]
    (folder / "evidence.jsonl").write_bytes(b"".join(kept))
    (folder / "labels.parquet").unlink()
    report = run(lambda task: True, rollouts=4)
    assert report.counts["rollouts"] == finished.counts["rollouts"]
    assert report.counts["failed"] > 0


def test_states_of_a_tool_that_answers_differently_are_abandoned(lab, tmp_path, monkeypatch):
    calls = Counter()

    class Fickle(CalculatorTool):
        """Answers every call of one task with its number."""

        async def open(self, task, seed):
            class FickleSession(CalculatorSession):
                async def call(self, arguments):
                    observation = await super().call(arguments)
                    calls[task.task_id] += 1
                    if task.task_id != "t3":
                        return observation
                    return replace(observation, content=f"{calls[task.task_id]}")

                async def branch(self):
                    return FickleSession()

            return FickleSession()

    tool = Fickle()
    tool.effect = SideEffect.STATEFUL
    monkeypatch.setitem(agent.tools.TOOLS, "calculator", lambda sandbox: tool)
    out = tmp_path / "labels"
    settings = {"same_state": "never", "samples": 2, "rollouts": 4}
    walker = WalkerEngine(lab / "policy", ramble=0.9)
    report = label(LabelConfig(agent=agent_config(lab), out=out, **settings), engine=walker)
    abandoned = {r.state for r in rollouts(tmp_path) if r.mismatch}
    assert abandoned
    assert report.counts["abandoned"] == len(abandoned)
    for row in read_labels(out / "labels.parquet"):
        name = row.trajectory.trajectory_id
        for prefix, value in enumerate(row.labels.values):
            assert (value is None) == ((name, prefix) in abandoned)
    assert {name.partition("/")[0] for name, _ in abandoned} == {"t3"}


def test_tools_that_change_the_world_can_be_answered_from_the_record(run, tmp_path):
    run(lambda task: False)
    given = tmp_path / "given.jsonl"
    (tmp_path / "labels" / "trajectories.jsonl").rename(given)
    shutil.rmtree(tmp_path / "labels")
    settings = {"trajectories": given, "observations": "recorded", "samples": 1}
    report = run(lambda task: True, effect=SideEffect.IRREVERSIBLE, **settings)
    lines = rollouts(tmp_path)
    assert report.counts["labelled"] == 12
    assert 0 < report.counts["failed"] < report.counts["rollouts"]  # t has 1+1 and 1+2, or not
    failures = {r.failure for r in lines if r.stop is StopReason.TOOL_FAILURE}
    assert failures == {"no call of calculator with these arguments was recorded for the task"}


def test_tools_that_change_the_world_are_refused(run):
    with pytest.raises(InputError, match=r"tools calculator change the world outside.*--tools"):
        run(lambda task: False, effect=SideEffect.IRREVERSIBLE)
