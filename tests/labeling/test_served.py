"""Labelling with a policy that servers serve, some of which die while it runs."""

import threading
import time
from dataclasses import replace

import pytest

from agent.engines.base import GenerateRequest
from labeling.run import label
from policy.tiny import make_model, make_tokenizer
from tests.agent.engines.loopback import Loopback, dice
from tests.labeling.folders import config, evidence, timeless
from tests.labeling.walker import WalkerEngine, make_policy, make_tasks
from trajectory.errors import InputError
from trajectory.records import Sampling
from trajectory.run import read_manifest


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_policy(folder / "policy")
    make_model(make_tokenizer(), seed=0).config.save_pretrained(folder / "policy")
    make_tasks(folder / "tasks.jsonl", 6)
    return folder


@pytest.fixture(scope="module")
def whole(lab, tmp_path_factory):
    """The same run without any server."""
    out = tmp_path_factory.mktemp("whole") / "labels"
    label(config(lab, out, samples=2), engine=WalkerEngine(lab / "policy"))
    return out


@pytest.fixture
def servers(lab):
    """Two servers behind which the walker writes the turns."""
    walker = WalkerEngine(lab / "policy", delay_s=0.02)

    async def write(body):
        if body["top_k"] == 1:
            return dice(body)  # the trial of a server
        request = GenerateRequest(
            request_id="behind",
            prompt_ids=tuple(body["prompt"]),
            sampling=Sampling(max_tokens=body["max_tokens"]),
            seed=body["seed"],
            stop_ids=tuple(body["stop_token_ids"]),
        )
        turn = await walker.generate(request)
        return list(turn.token_ids), list(turn.logprobs), turn.finish

    made = [Loopback(write=write, max_model_len=4096).start() for _ in range(2)]
    yield made
    for server in made:
        server.close()


def served(lab, out, servers, *, patience):
    engine = ",".join([*(server.url for server in servers), f"patience={patience}"])
    agent = {"max_context": 2048, "engine": f"http:{engine}"}
    return config(lab, out, samples=2, agent=agent)


def kill_after(count, servers, victims):
    """Stop some servers once all have answered some requests together."""

    def watch():
        while sum(len(server.answered) for server in servers) < count:
            time.sleep(0.001)
        for server in victims:
            server.stop()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def anonymous(out):
    """The ledger without what names the weights."""
    found = evidence(out).items()
    return {key: replace(rollout, completer="", check="") for key, rollout in found}


def written(out):
    found = timeless(out).items()
    return {name: (t.steps, t.stop, t.outcome, t.answer, t.seed) for name, t in found}


def test_a_server_that_dies_amid_the_run_changes_nothing(lab, whole, servers, tmp_path):
    out = tmp_path / "labels"
    killer = kill_after(150, servers, servers[:1])
    report = label(served(lab, out, servers, patience=20))
    killer.join()
    assert anonymous(out) == anonymous(whole)
    assert written(out) == written(whole)
    assert report.counts["failed"] == 0
    assert {rollout.completer for rollout in evidence(out).values()} == {f"{lab}/policy@tiny"}


def test_when_all_servers_die_the_run_stops_and_the_same_command_resumes(
    lab, whole, servers, tmp_path
):
    out = tmp_path / "labels"
    killer = kill_after(150, servers, servers)
    with pytest.raises(InputError) as caught:
        label(served(lab, out, servers, patience=1))
    killer.join()
    said = str(caught.value)
    assert "no server has worked for 1 s" in said
    assert all(server.url in said for server in servers)
    assert "what ended before is saved: repair it and run the same command again" in said
    kept = anonymous(out)
    assert 0 < len(kept) < len(anonymous(whole))
    assert kept.items() <= anonymous(whole).items()
    assert read_manifest(out).status == "interrupted"
    for server in servers:
        server.start()
    label(served(lab, out, servers, patience=1))
    assert anonymous(out) == anonymous(whole)
    assert written(out) == written(whole)
