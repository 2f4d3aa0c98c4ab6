"""What every row of the engine table must do; vLLM runs under its own marker."""

import asyncio
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from agent.engines import ENGINES, build_engine
from agent.engines.base import EngineError, EngineOptions
from tests.agent.engines.loopback import Loopback, policy_behind
from tests.agent.engines.shared_vllm import shared_engine, shared_folder, shared_options
from tests.agent.engines.tiny import prompts, request, run_all
from trajectory.errors import InputError

MARKS = {
    "vllm": [
        pytest.mark.vllm,
        pytest.mark.slow,
        pytest.mark.timeout(900),
        pytest.mark.skipif(
            importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
        ),
    ]
}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=MARKS.get(n, ())) for n in ENGINES])
def engine(request):
    server = None
    if request.param == "vllm":
        made = shared_engine()
    elif request.param == "http":
        server = Loopback(write=policy_behind(shared_options(shared_folder()))).start()
        options = replace(shared_options(shared_folder()), device="auto")
        made = build_engine(f"http:{server.url}", options)
    else:
        policy = "scripted" if request.param == "scripted" else str(shared_folder())
        made = build_engine(request.param, replace(shared_options(Path()), policy=policy))
    yield made
    asyncio.run(made.close())
    if server is not None:
        server.close()


def test_it_says_which_row_it_is_and_what_it_serves(engine):
    assert engine.name in ENGINES
    assert engine.policy
    assert engine.revision
    assert engine.max_context == 256


def test_ids_and_logprobs_align_and_limits_hold(engine):
    requests = [request(p, seed=i, max_tokens=1 + i % 7) for i, p in enumerate(prompts(30))]
    before = engine.stats.requests, engine.stats.generated_tokens
    turns = run_all(engine, requests)
    for one, turn in zip(requests, turns, strict=True):
        assert 1 <= len(turn.token_ids) == len(turn.logprobs) <= one.sampling.max_tokens
        assert all(lp <= 0 for lp in turn.logprobs)
        assert all(type(i) is int for i in turn.token_ids)
        assert all(type(lp) is float for lp in turn.logprobs)
    assert engine.stats.requests == before[0] + 30
    assert engine.stats.generated_tokens == before[1] + sum(len(t.token_ids) for t in turns)


def test_the_same_request_gives_the_same_ids_in_another_event_loop(engine):
    requests = [request(p, seed=i) for i, p in enumerate(prompts(5))]
    first, second = run_all(engine, requests), run_all(engine, requests[::-1])[::-1]
    assert [t.token_ids for t in first] == [t.token_ids for t in second]


def test_a_stop_id_ends_the_turn_and_is_kept(engine):
    one = request(prompts(1, low=5)[0], seed=3, max_tokens=6)
    (free,) = run_all(engine, [one])
    stop = free.token_ids[2]
    (turn,) = run_all(engine, [request(one.prompt_ids, seed=3, max_tokens=6, stop=(stop,))])
    assert turn.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert turn.finish == "stop"


def test_impossible_prompts_are_value_errors(engine):
    for prompt in ([], [1] * 256, [-1]):
        with pytest.raises(ValueError, match="request r0"):
            run_all(engine, [request(prompt)])


def test_closing_ends_pending_requests_and_every_process(engine):
    """Runs last: it closes the shared engine."""
    before = descendants()

    async def main():
        pending = asyncio.create_task(engine.generate(request([1, 2], max_tokens=200)))
        await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await pending
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(request([1, 2]))

    asyncio.run(main())
    after = descendants()
    if engine.name == "vllm":
        shared_engine.cache_clear()  # tests that are named after this one get a new engine
        assert any("VLLM" in command for command in before)
        assert not any("VLLM" in command or command == "zombie" for command in after)
    assert len(after) <= len(before)


def descendants() -> list[str]:
    """Command lines of this process's children and theirs."""
    found, parents = [], ["self"]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            for pid in children.read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(command or "zombie")
                parents.append(pid)
    return found


def test_an_unknown_engine_is_refused_with_the_list():
    with pytest.raises(InputError, match="'tgi': choose one of transformers, vllm, scripted"):
        build_engine("tgi", EngineOptions(policy="x"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_context": 0}, "max_context must be at least 1"),
        ({"max_cache_tokens": 10}, "cannot hold one sequence"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
@pytest.mark.parametrize("name", ENGINES)
def test_impossible_options_are_refused_before_anything_loads(name, change, reason):
    with pytest.raises(InputError, match=reason):
        build_engine(name, EngineOptions(**({"policy": "scripted"} | change)))
