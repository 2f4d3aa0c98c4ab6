"""vLLM beside a plain forward pass and beside the transformers engine."""

import asyncio
import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from agent.engines.transformers import TransformersEngine
from agent.engines.vllm import VllmEngine
from tests.agent.engines.shared_vllm import (
    shared_engine,
    shared_folder,
    shared_model,
    shared_options,
)
from tests.agent.engines.tiny import prompts, reference_logprobs, request, run_all
from trajectory.errors import InputError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def folder():
    return shared_folder()


@pytest.fixture(scope="module")
def model():
    return shared_model()


@pytest.fixture(scope="module")
def engine():
    return shared_engine()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_plain_forward_pass(engine, model, temperature):
    texts = prompts(6)
    requests = [request(p, seed=i, temperature=temperature) for i, p in enumerate(texts)]
    for prompt, turn in zip(texts, run_all(engine, requests), strict=True):
        expected = reference_logprobs(model, prompt, turn.token_ids, temperature=temperature)
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4)


def test_truncated_distributions_have_the_logprobs_of_the_transformers_engine(engine, folder):
    greedy = request(prompts(1)[0], temperature=0.0)
    (turn,) = run_all(engine, [greedy])
    sampled = [request(greedy.prompt_ids, seed=s, top_k=3, max_tokens=1) for s in range(40)]
    other = TransformersEngine(shared_options(folder))
    both = [
        {(t.token_ids, round(t.logprobs[0], 3)) for t in run_all(e, sampled)}
        for e in (engine, other)
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 3
    assert sum(np.exp(lp) for _, lp in both[0]) == pytest.approx(1, abs=1e-2)
    assert turn.token_ids[:1] in {ids for ids, _ in both[0]}


def test_greedy_turns_equal_the_transformers_engine(engine, folder):
    requests = [request(p, temperature=0.0) for p in prompts(8)]
    other = run_all(TransformersEngine(shared_options(folder)), requests)
    for ours, theirs in zip(run_all(engine, requests), other, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_the_stop_id_is_part_of_the_turn(engine):
    prompt = prompts(1)[0]
    (free,) = run_all(engine, [request(prompt, temperature=0.0)])
    stop = free.token_ids[6]
    (turn,) = run_all(engine, [request(prompt, temperature=0.0, stop=(stop,))])
    assert turn.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert len(turn.logprobs) == len(turn.token_ids)
    assert (turn.finish, free.finish) == ("stop", "length")


def test_stop_when_ends_the_turn(engine):
    free_request = request(prompts(1)[0], temperature=0.0)
    (free,) = run_all(engine, [free_request])
    (turn,) = run_all(engine, [replace(free_request, stop_when=lambda ids: len(ids) >= 5)])
    assert turn.token_ids == free.token_ids[:5]
    assert turn.finish == "stop"


def test_a_seed_gives_the_same_sample_whatever_else_is_in_the_batch(engine):
    one = request(prompts(1)[0], seed=7)
    (alone,) = run_all(engine, [one])
    crowd = [request(p, seed=i) for i, p in enumerate(prompts(100, seed=1))]
    together = run_all(engine, [*crowd, one])  # more than max_batch at once
    assert together[-1].token_ids == alone.token_ids
    assert len(together) == 101


def test_a_shared_prefix_is_computed_once(engine):
    prompt = prompts(1, low=200, high=200, seed=9)[0]
    before = engine.stats.cached_prompt_tokens
    run_all(engine, [request(prompt, max_tokens=1)])
    assert engine.stats.cached_prompt_tokens == before
    run_all(engine, [request(prompt, max_tokens=1)])
    assert engine.stats.cached_prompt_tokens >= before + 128


def test_a_cancelled_request_does_not_disturb_others(engine):
    async def main():
        doomed = asyncio.create_task(engine.generate(request([1, 2], max_tokens=200)))
        await asyncio.sleep(0.05)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await engine.generate(request([3, 4]))

    assert len(asyncio.run(main()).token_ids) == 20


def test_an_absent_vllm_is_one_clear_sentence(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install this package with the extra 'vllm'"):
        VllmEngine(shared_options(folder))


def test_a_missing_folder_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InputError, match="there is no model folder"):
        VllmEngine(shared_options(tmp_path / "nowhere"))
