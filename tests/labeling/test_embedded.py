"""The command itself on the embedded policy with its own engine, and on a tool with state."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from agent.setup import AgentConfig
from labeling.config import LabelConfig
from labeling.ledger import Rollout
from labeling.run import label
from policy.tiny import make_model, make_tokenizer
from tests.labeling.walker import WalkerEngine, agent_config
from trajectory.records import StopReason, ToolCall, Trajectory
from trajectory.run import read_manifest
from trajectory.store import read_jsonl, read_labels


def evidence(out):
    return {(r.state, r.rollout): r for r in read_jsonl(out / "evidence.jsonl", Rollout)}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The embedded policy with random weights: it babbles, but its turns are really sampled."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, seed=5).save_pretrained(folder)
    return folder


@pytest.fixture
def one_thread():
    """Keep torch to one thread: two that wait for each other crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_and_resumed_on_the_embedded_engine_gives_the_same_ledger(
    policy, tmp_path, repository, capsys
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    agent = AgentConfig(
        tasks="arithmetic",
        num_tasks=8,
        policy=str(policy),
        max_turn_tokens=60,
        concurrency=8,
        device="cpu",
    )
    config = LabelConfig(agent=agent, out=whole, rollouts=12, samples=2)
    label(config)
    unbroken = evidence(whole)
    states = {state for state, _ in unbroken}
    assert len(states) >= 8  # more where a random policy happens to write a call
    assert len(unbroken) == 12 * len(states)
    printed = capsys.readouterr().out
    assert "tokens per label" in printed
    assert "engine busy" in printed

    flags = f"--tasks arithmetic --num-tasks 8 --policy {policy} --rollouts 12 --out {broken}"
    limits = "--max-turn-tokens 60 --samples 2 --concurrency 8 --device cpu"
    process = subprocess.Popen(
        [sys.executable, "-m", "prm.cli", "label", *flags.split(), *limits.split()],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ledger = broken / "evidence.jsonl"
    while process.poll() is None and not (
        ledger.exists() and ledger.read_bytes().count(b"\n") > 20
    ):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(ledger.read_bytes().splitlines()) < len(unbroken)

    resumed = label(replace(config, out=broken))
    assert evidence(broken) == unbroken
    assert resumed.counts["rollouts"] == len(unbroken)
    assert 0 < resumed.tokens < resumed.counts["tokens"]
    assert read_manifest(broken).starts == 2
    rows = read_labels(broken / "labels.parquet")
    assert len(rows) == 16
    assert {row.trajectory.policy for row in rows} == {str(policy)}


class NotebookEngine(WalkerEngine):
    """Sets a variable to a random digit, reads it back in the next turn, and answers with it."""

    def _turn(self, prompt, rng):
        turns = prompt.count("<|im_start|>assistant") - 1
        if turns == 2:
            shown = prompt.rpartition("<|im_start|>tool\n")[2].split()[0]
            return f"Done.\nAnswer: {shown.removesuffix('<|im_end|>')}"
        code = f"x = {rng.randrange(5, 9)}" if turns == 0 else "print(x)"
        call = ToolCall(name="python", arguments=json.dumps({"code": code}))
        body = json.dumps({"name": call.name, "arguments": json.loads(call.arguments)})
        return f"I compute.\n<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize("sandbox", ["unsafe", "forkjail"])
def test_continuations_find_the_tool_in_the_state_the_prefix_left_it(lab, tmp_path, sandbox):
    out = tmp_path / "labels"
    config = LabelConfig(
        agent=agent_config(
            lab,
            tools=("python",),
            sandbox=sandbox,
            allow_unsafe_tools=sandbox == "unsafe",
            num_tasks=3,
            concurrency=4,
        ),
        out=out,
        rollouts=2,
    )
    label(config, engine=NotebookEngine(lab / "policy"))
    kept = {t.trajectory_id: t for t in read_jsonl(out / "trajectories.jsonl", Trajectory)}
    rollouts = evidence(out)
    assert {prefix for (_, prefix), _ in rollouts} == {0, 1, 2}
    for ((name, prefix), _), rollout in rollouts.items():
        assert rollout.stop is StopReason.ANSWERED
        if prefix:
            assert rollout.answer == kept[name].answer
            assert rollout.tool_calls == 2 - prefix
    (isolation,) = {t.meta["isolation"] for t in kept.values()}
    assert (isolation == "none") == (sandbox == "unsafe")
    assert read_manifest(out).isolation == (isolation,)
