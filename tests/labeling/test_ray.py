"""Labelling on a Ray cluster of two nodes on this machine, one CPU each."""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from labeling.config import RunnerConfig
from labeling.ledger import Rollout
from labeling.run import label
from tests.labeling import walker
from tests.labeling.folders import config, evidence, timeless
from tests.labeling.walker import WalkerEngine
from trajectory.errors import InputError
from trajectory.run import read_manifest
from trajectory.store import read_jsonl

pytestmark = [
    pytest.mark.slow,
    # Ray warns of settings of its own, and leaves sockets to the end of the process.
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def start(lab, cluster):
    """Start the command as a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.labeling.walker"])

    def start(out, errors):
        flags = f"--tasks {lab}/tasks.jsonl --policy {lab}/policy --out {out} --rollouts 4"
        plan = "--same-state never --samples 2 --concurrency 16"
        limits = "--max-steps 6 --max-turn-tokens 200"
        spread = f"--runner ray --ray-address {cluster.address} --ray-tasks-per-batch 1"
        arguments = (1.0, f"{flags} {plan} {limits} {spread}".split(), errors)
        process = context.Process(target=walker.command, args=arguments)
        process.start()
        return process

    return start


def on(cluster, **settings):
    return RunnerConfig(runner="ray", ray_address=cluster.address, **settings)


def wait_for_lines(path, count, goes_on):
    """Wait until a file has some lines, or what writes it has ended."""
    while goes_on() and not (path.exists() and path.read_bytes().count(b"\n") >= count):
        time.sleep(0.01)


def assert_is(out, whole):
    """Compare a folder with that of one unbroken process: nothing lost, nothing doubled."""
    assert evidence(out) == evidence(whole)
    assert len(list(read_jsonl(out / "evidence.jsonl", Rollout))) == len(evidence(whole))
    assert timeless(out) == timeless(whole)


def test_clusters_that_are_not_there_or_too_small_are_refused(lab, cluster, tmp_path):
    few = config(lab, tmp_path / "labels", runner=on(cluster, ray_workers=3))
    with pytest.raises(InputError, match="room for 2 workers of 1 CPUs, not for 3"):
        label(few)
    for address, why in (("127.0.0.1:1", "Connection refused"), ("ray://a:1", "give HOST:PORT")):
        nowhere = replace(few, runner=RunnerConfig(runner="ray", ray_address=address))
        with pytest.raises(InputError, match=f"cannot reach the Ray cluster .*{address}: .*{why}"):
            label(nowhere)
    assert not (tmp_path / "labels").exists()


def test_a_killed_driver_resumes_on_two_nodes_and_gives_the_run_of_one_process(
    lab, finished, cluster, start, tmp_path, capsys
):
    whole, report = finished
    out = tmp_path / "labels"
    process = start(out, tmp_path / "errors")
    wait_for_lines(out / "evidence.jsonl", 8, process.is_alive)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors").read_text()
    had = (out / "evidence.jsonl").read_bytes()
    assert 8 <= had.count(b"\n") < len(evidence(whole))
    settings = config(lab, out, samples=2, runner=on(cluster))
    spread = label(settings, engine=WalkerEngine(lab / "policy"))
    assert (out / "evidence.jsonl").read_bytes().startswith(had[: had.rfind(b"\n") + 1])
    assert_is(out, whole)
    assert {**spread.counts, "cut_lines": 0} == report.counts
    assert 0 < spread.tokens < report.tokens
    assert spread.workers == 2
    assert "workers" in capsys.readouterr().out


def test_ctrl_c_ends_in_one_sentence_and_the_run_resumes_in_one_process(
    lab, finished, start, tmp_path
):
    out, errors = tmp_path / "labels", tmp_path / "errors"
    process = start(out, errors)
    wait_for_lines(out / "evidence.jsonl", 8, process.is_alive)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    lines = errors.read_text().strip().splitlines()
    assert process.exitcode == 130, lines
    assert lines[-1] == "prm: interrupted; run the same command again to resume"
    assert not any("Traceback" in line for line in lines)
    assert read_manifest(out).status == "interrupted"
    label(config(lab, out, samples=2), engine=WalkerEngine(lab / "policy"))
    assert_is(out, finished[0])


def test_a_node_that_dies_amid_a_run_is_made_up_for_by_the_other(lab, finished, cluster, tmp_path):
    """The last test here: the cluster has one node less afterwards."""
    out = tmp_path / "labels"
    (second,) = cluster.worker_nodes
    done = threading.Event()

    def kill():
        wait_for_lines(out / "evidence.jsonl", 8, lambda: not done.is_set())
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    settings = config(lab, out, samples=2, runner=on(cluster, ray_tasks_per_batch=1))
    try:
        label(settings, engine=WalkerEngine(lab / "policy", delay_s=1.0))
    finally:
        done.set()
        killer.join()
    assert_is(out, finished[0])
