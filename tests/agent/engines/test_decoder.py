"""Continuous batching, seen through the engine: stopping, reuse of keys, and the cache's budget."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from agent.engines.turns import group_by_length
from tests.agent.engines.tiny import (
    VOCABULARY,
    make_engine,
    make_llama,
    prompts,
    reference_logprobs,
    request,
    run_all,
)


def test_the_cache_stays_within_its_budget_and_turns_wait_or_are_set_aside(llama):
    engine = make_engine(llama, max_cache_tokens=512, max_context=400)
    sizes = []
    original = engine._decoder._lay_out

    def observed(**shape):
        original(**shape)
        cache = engine._decoder._runner.cache
        sizes.append(cache.num_slots * cache.width)

    engine._decoder._lay_out = observed
    requests = [
        request(p, seed=i, max_tokens=90) for i, p in enumerate(prompts(10, low=20, high=60))
    ]
    tight = run_all(engine, requests)
    assert max(sizes) <= 512
    roomy = run_all(make_engine(llama), requests)
    assert [t.token_ids for t in tight] == [t.token_ids for t in roomy]
    for a, b in zip(tight, roomy, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_rollouts_of_one_prompt_compute_it_once(llama):
    engine = make_engine(llama)
    prompt = prompts(1, low=50, high=50)[0]
    run_all(engine, [request(prompt, seed=s) for s in range(8)])
    assert engine.stats.prompt_tokens == 8 * 50
    assert engine.stats.cached_prompt_tokens == 7 * 49


def test_the_next_turn_of_an_episode_reuses_the_last_ones_cache(llama):
    engine = make_engine(llama)

    async def episode():
        others = asyncio.create_task(engine.generate(request([1, 2, 3], max_tokens=60)))
        first = await engine.generate(request(prompt, seed=1, max_tokens=10))
        longer = [*prompt, *first.token_ids, 7, 8, 9]
        second = await engine.generate(request(longer, seed=2, max_tokens=10))
        await others
        return longer, second

    prompt = prompts(1, low=40, high=40)[0]
    longer, second = asyncio.run(episode())
    assert engine.stats.cached_prompt_tokens == 49  # the last sampled id was never fed
    expected = reference_logprobs(llama, longer, second.token_ids, temperature=1.0)
    np.testing.assert_allclose(second.logprobs, expected, atol=1e-4)


def test_new_weights_are_used_at_once_and_old_keys_are_not():
    model = make_llama()
    engine = make_engine(model)
    prompt = prompts(1, low=40, high=40)[0]

    async def main():
        others = asyncio.create_task(engine.generate(request([1, 2, 3], max_tokens=60)))
        before = await engine.generate(request(prompt, seed=1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        engine.set_revision("1")
        after = await engine.generate(request(prompt, seed=1))
        await others
        return before, after

    before, after = asyncio.run(main())
    assert engine.revision == "1"
    assert engine.stats.cached_prompt_tokens == 0
    assert before.token_ids != after.token_ids
    expected = reference_logprobs(model, prompt, after.token_ids, temperature=1.0)
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-4)


def test_memory_is_given_back_when_idle(llama):
    engine = make_engine(llama)
    run_all(engine, [request([1, 2])])
    assert engine._decoder._runner._cache is None


def test_generation_is_cut_at_the_context(llama):
    engine = make_engine(llama, max_context=30)
    (turn,) = run_all(engine, [request(prompts(1, low=25, high=25)[0], max_tokens=99)])
    assert len(turn.token_ids) == 5
    assert turn.finish == "length"


def test_a_turn_ends_with_the_first_stop_id_included(llama):
    prompt = prompts(1)[0]
    (free,) = run_all(make_engine(llama), [request(prompt, seed=3)])
    stop = free.token_ids[6]
    end = free.token_ids.index(stop) + 1
    (turn,) = run_all(make_engine(llama), [request(prompt, seed=3, stop=(VOCABULARY + 5, stop))])
    assert turn.token_ids == free.token_ids[:end]
    assert turn.logprobs == free.logprobs[:end]
    assert turn.finish == "stop"


def test_stop_when_is_asked_with_the_generated_ids_only(llama):
    prompt = prompts(1)[0]
    one = request(prompt, seed=3)
    asked = []

    def stop_when(ids):
        asked.append(list(ids))
        return len(ids) == 4

    free, turn = run_all(make_engine(llama), [one, replace(one, stop_when=stop_when)])
    assert turn.token_ids == free.token_ids[:4]
    assert turn.finish == "stop"
    assert asked == [list(free.token_ids[:n]) for n in range(1, 5)]


def test_a_sample_does_not_depend_on_the_batch(llama):
    mixed = [
        request(p, seed=100 + i, max_tokens=5 + 7 * (i % 5), top_k=(0, 8)[i % 2])
        for i, p in enumerate(prompts(40))
    ]
    together = run_all(make_engine(llama, max_batch=16), mixed)
    for one, turn in list(zip(mixed, together, strict=True))[::5]:
        (alone,) = run_all(make_engine(llama), [one])
        assert alone.token_ids == turn.token_ids
        np.testing.assert_allclose(alone.logprobs, turn.logprobs, atol=1e-5)


def test_a_long_turn_among_short_ones_widens_the_slots_without_a_trace(llama):
    requests = [request(p, seed=i, max_tokens=8) for i, p in enumerate(prompts(12, high=20))]
    requests.append(request([1, 2, 3], seed=99, max_tokens=300))
    together = run_all(make_engine(llama), requests)
    (alone,) = run_all(make_engine(llama), requests[-1:])
    assert together[-1].token_ids == alone.token_ids
    expected = reference_logprobs(llama, [1, 2, 3], alone.token_ids, temperature=1.0)
    np.testing.assert_allclose(together[-1].logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("budget", [512, 700, 1500, 4096])
def test_nested_prefixes_sampled_many_times_are_exact_under_any_budget(llama, budget):
    """The load of labelling: several rollouts from every prefix of one trajectory."""
    whole = prompts(1, low=150, high=150)[0]
    requests = [
        request(whole[:cut], seed=100 * cut + k, max_tokens=25)
        for cut in (40, 75, 110, 150)
        for k in range(4)
    ]
    engine = make_engine(llama, max_cache_tokens=budget, max_batch=10)
    for one, turn in zip(requests, run_all(engine, requests), strict=True):
        expected = reference_logprobs(llama, one.prompt_ids, turn.token_ids, temperature=1.0)
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4)
    assert engine.stats.cached_prompt_tokens > 0


def test_prefill_groups_have_similar_lengths_and_cover_everything_once():
    rng = np.random.default_rng(0)
    missing = {
        slot: (int(rng.integers(2)) * 7, [0] * int(rng.integers(1, 200))) for slot in range(60)
    }
    groups = group_by_length(missing)
    assert sorted(slot for group in groups for slot in group) == sorted(missing)
    for group in groups:
        lengths = [len(missing[slot][1]) for slot in group]
        assert max(lengths) <= 1.25 * min(lengths) + 8
        assert len({missing[slot][0] for slot in group}) == 1
