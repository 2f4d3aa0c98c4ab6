"""Labelling as a process that is killed or interrupted."""

import multiprocessing
import os
import signal
import time
from random import Random

import pytest

from labeling.ledger import Rollout
from labeling.run import label
from tests.labeling import walker
from tests.labeling.folders import config, evidence, timeless
from tests.labeling.walker import WalkerEngine
from trajectory.run import read_manifest
from trajectory.store import read_jsonl, read_labels


@pytest.fixture(scope="module")
def start(lab):
    """Start the command as a process of its own, forked from one that has loaded the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.labeling.walker", "transformers.models.auto.tokenization_auto", "datasets"]
    )

    def start(out, errors):
        flags = f"--tasks {lab}/tasks.jsonl --policy {lab}/policy --out {out} --rollouts 4"
        plan = "--same-state never --samples 2 --concurrency 16"
        limits = "--max-steps 6 --max-turn-tokens 200"
        arguments = (0.3, f"{flags} {plan} {limits}".split(), errors)
        process = context.Process(target=walker.command, args=arguments)
        process.start()
        return process

    return start


def wait_for_lines(path, count, process):
    """Wait until a file has at least ``count`` lines, or the process has ended."""
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= count):
        time.sleep(0.005)


def read_whole(path):
    """Complete lines of a file that a killed process may have left."""
    return list(read_jsonl(path, Rollout, tail="drop")) if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("run", range(int(os.environ.get("KILLED_RUNS", "5"))))
def test_a_run_killed_anywhere_ends_as_an_unbroken_one(lab, finished, tmp_path, start, run):
    out, dice = tmp_path / "labels", Random(100 + run)
    whole = evidence(finished[0])
    process = start(out, tmp_path / "errors")
    wait_for_lines(out / "evidence.jsonl", dice.randrange(len(whole)), process)
    time.sleep(dice.random() * 0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors").read_text()
    label(config(lab, out, samples=2), engine=WalkerEngine(lab / "policy"))
    lines = read_whole(out / "evidence.jsonl")
    assert len(lines) == len(whole)
    assert evidence(out) == whole


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_doubles_nothing(lab, finished, tmp_path, start):
    out, dice = tmp_path / "labels", Random(3)
    for kill in range(6):
        # The first kills fall into the sampling of trajectories, the others anywhere later.
        path = out / ("trajectories.jsonl" if kill < 2 else "evidence.jsonl")
        have = path.read_bytes().count(b"\n") if path.exists() else 0
        process = start(out, tmp_path / "errors")
        wait_for_lines(path, have + 1, process)
        time.sleep(dice.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors").read_text()
    left = len(read_whole(out / "evidence.jsonl"))
    assert 0 < left < len(evidence(finished[0]))
    label(config(lab, out, samples=2), engine=WalkerEngine(lab / "policy"))
    assert len(read_whole(out / "evidence.jsonl")) == len(evidence(out))
    assert evidence(out) == evidence(finished[0])
    assert timeless(out) == timeless(finished[0])
    ours, theirs = (
        {r.trajectory.trajectory_id: (r.evidence, r.labels) for r in read_labels(f)}
        for f in (out / "labels.parquet", finished[0] / "labels.parquet")
    )
    assert ours == theirs
    assert read_manifest(out).starts == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_ctrl_c_and_sigterm_end_in_one_sentence_and_a_resumable_folder(
    lab, finished, tmp_path, start, number, code, how
):
    out, errors = tmp_path / "labels", tmp_path / "errors"
    process = start(out, errors)
    wait_for_lines(out / "evidence.jsonl", 3, process)
    os.kill(process.pid, number)
    process.join(60)
    lines = errors.read_text().strip().splitlines()
    assert process.exitcode == code, lines
    assert lines[-1] == f"prm: {how}; run the same command again to resume"
    assert not any("Traceback" in line for line in lines)
    assert read_manifest(out).status == "interrupted"
    label(config(lab, out, samples=2), engine=WalkerEngine(lab / "policy"))
    assert evidence(out) == evidence(finished[0])
