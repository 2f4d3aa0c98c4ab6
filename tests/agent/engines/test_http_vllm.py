"""The http engine on two real `vllm serve` processes, one of which is killed amid a run."""

import asyncio
import importlib.util
import logging
import threading
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from agent.engines import build_engine
from agent.engines.base import EngineError, EngineOptions
from agent.setup import AgentConfig
from labeling.config import LabelConfig
from labeling.ledger import Rollout
from labeling.run import label
from tests.agent.engines.fleet_vllm import CONTEXT, Serve, save_walker
from tests.agent.engines.tiny import prompts, reference_logprobs, request, run_all
from tests.labeling.folders import evidence, trajectories
from trajectory.store import read_jsonl, read_labels

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("walker")
    save_walker(made)
    return made


@pytest.fixture(scope="module")
def servers(folder, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    started = []
    try:
        started += [Serve(folder, logs / f"{n}.log") for n in range(2)]
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture(scope="module")
def name(servers):
    return "http:" + ",".join(server.url for server in servers)


@pytest.fixture(scope="module")
def engine(name, folder):
    made = build_engine(name, EngineOptions(policy=str(folder), max_context=CONTEXT, max_batch=32))
    yield made
    asyncio.run(made.close())


def test_greedy_turns_equal_those_of_the_engine_in_this_process(engine, folder):
    requests = [request(p, temperature=0.0, stop=(5,)) for p in prompts(8)]
    options = EngineOptions(policy=str(folder), device="cpu", max_context=CONTEXT, max_batch=32)
    inside = build_engine("vllm", replace(options, max_cache_tokens=8192))
    try:
        theirs = run_all(inside, requests)
    finally:
        asyncio.run(inside.close())
    for ours, other in zip(run_all(engine, requests), theirs, strict=True):
        assert (ours.token_ids, ours.finish) == (other.token_ids, other.finish)
        np.testing.assert_allclose(ours.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_plain_forward_pass(engine, folder, temperature):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = prompts(6)
    requests = [request(p, seed=i, temperature=temperature) for i, p in enumerate(texts)]
    for prompt, turn in zip(texts, run_all(engine, requests), strict=True):
        wanted = reference_logprobs(model, prompt, turn.token_ids, temperature=temperature)
        np.testing.assert_allclose(turn.logprobs, wanted, atol=1e-4)


def test_stop_when_ends_a_turn_that_the_server_would_go_on_with(engine):
    free_request = request(prompts(1)[0], temperature=0.0, max_tokens=300)
    (free,) = run_all(engine, [free_request])
    (turn,) = run_all(engine, [replace(free_request, stop_when=lambda ids: len(ids) >= 5)])
    assert turn.token_ids == free.token_ids[:5]
    assert (turn.finish, len(turn.logprobs)) == ("stop", 5)
    np.testing.assert_allclose(turn.logprobs, free.logprobs[:5], atol=1e-4)


def test_a_prefix_of_one_task_is_computed_once(engine):
    prompt = prompts(1, low=300, high=300, seed=9)[0]
    before = engine.stats.cached_prompt_tokens
    for seed in range(3):
        run_all(engine, [replace(request(prompt, seed=seed, max_tokens=1), affinity="task")])
    assert engine.stats.cached_prompt_tokens >= before + 2 * 256


def test_cancelled_requests_end_on_the_servers_too(engine, servers):
    before = count(servers, "generation_tokens_total")

    async def main():
        asking = [
            asyncio.create_task(engine.generate(request([1, 2, n], max_tokens=450)))
            for n in range(32)
        ]
        while count(servers, "num_requests_running") < 8:
            assert not all(task.done() for task in asking), "too fast to be cancelled"
            await asyncio.sleep(0.02)
        done = count(servers, "generation_tokens_total")
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        # The servers count when they compute, so each gets something to do.
        small = [replace(request([3, n]), affinity=str(n)) for n in range(20)]
        return done, await asyncio.gather(*(engine.generate(one) for one in small))

    done, turns = asyncio.run(main())
    assert [len(turn.token_ids) for turn in turns] == [20] * 20
    deadline = time.monotonic() + 60
    while count(servers, "num_requests_running"):
        assert time.monotonic() < deadline, "requests that were cancelled still run"
        time.sleep(0.1)
    # How much was done before the requests were cancelled depends on the machine, not on them.
    left = 32 * 450 - (done - before)
    assert count(servers, "generation_tokens_total") - done - 20 * 20 < left / 2


def count(servers, name: str) -> float:
    """A number that the servers publish, summed over them."""
    total = 0.0
    for server in servers:
        with urllib.request.urlopen(f"{server.url}/metrics") as page:
            for line in page.read().decode().splitlines():
                if line.startswith(f"vllm:{name}{{"):
                    total += float(line.split()[-1])
    return total


def test_a_request_that_vllm_refuses_is_an_error_with_its_sentence(engine):
    with pytest.raises(EngineError, match="refuses request r0: 400 .*out-of-vocab"):
        run_all(engine, [request([1, 2], stop=(10**9,))])


def test_what_streaming_costs(engine):
    """Prints the numbers of docs/fleets.md."""
    whole = [request(p, seed=n, max_tokens=100) for n, p in enumerate(prompts(64, low=20))]
    streamed = [replace(one, stop_when=lambda ids: False) for one in whole]
    for name, requests in [("in one piece", whole), ("streamed", streamed)]:
        began, busy = time.perf_counter(), time.process_time()
        turns = run_all(engine, requests)
        seconds, cpu = time.perf_counter() - began, time.process_time() - busy
        tokens = sum(len(turn.token_ids) for turn in turns)
        assert tokens == 6400
        print(f"{name}: {tokens / seconds:.0f} tokens/s, {1e6 * cpu / tokens:.0f} us/token here")


def test_a_labelling_run_survives_the_death_of_a_server(name, servers, folder, tmp_path, caplog):
    out = tmp_path / "labels"
    agent = AgentConfig(
        tasks="arithmetic",
        num_tasks=8,
        policy=str(folder),
        engine=name,
        max_steps=4,
        max_turn_tokens=40,
        max_context=CONTEXT,
        concurrency=16,
    )

    def kill():
        ledger = out / "evidence.jsonl"
        while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 20):
            time.sleep(0.01)
        servers[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with caplog.at_level(logging.WARNING, "agent.engines"):
        report = label(LabelConfig(agent=agent, out=out, samples=2, rollouts=4, same_state="never"))
    killer.join(timeout=1)
    assert f"{servers[0].url} is out" in caplog.text
    assert f"{servers[1].url} is out" not in caplog.text
    planned = {(t.task.task_id, 0) for t in trajectories(out).values()}
    for found, trajectory in trajectories(out).items():
        planned |= {(found, step) for step in range(1, trajectory.num_steps)}
    keys = [(state, rollout) for state, rollout, _ in evidence(out)]
    assert sorted(keys) == sorted((state, rollout) for state in planned for rollout in range(4))
    assert len(list(read_jsonl(out / "evidence.jsonl", Rollout))) == len(keys) > 60
    assert len(planned) > 12
    assert report.counts["failed"] == 0
    assert len(trajectories(out)) == 16
    assert len(read_labels(out / "labels.parquet")) == 16
