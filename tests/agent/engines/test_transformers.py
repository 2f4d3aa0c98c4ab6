import asyncio
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM as AutoLM
from transformers import (
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaForTokenClassification,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from agent.engines.base import EngineError, EngineOptions
from agent.engines.transformers import TransformersEngine
from tests.agent.engines.tiny import (
    VOCABULARY,
    make_llama,
    prompts,
    reference_logprobs,
    request,
    run_all,
)
from trajectory.errors import InputError


def engine_of(model, **options):
    settings = {"policy": "tiny", "max_context": 512, "max_batch": 64}
    return TransformersEngine(EngineOptions(**(settings | options)), model=model)


def test_greedy_turns_equal_generate(llama):
    engine = engine_of(llama)
    texts = prompts(12)
    turns = run_all(engine, [request(p, temperature=0.0) for p in texts])
    for prompt, turn in zip(texts, turns, strict=True):
        expected = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        assert list(turn.token_ids) == expected[0, len(prompt) :].tolist()
        assert turn.finish == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_plain_forward_pass(llama, temperature):
    engine = engine_of(llama)
    texts = prompts(12)
    requests = [request(p, seed=i, temperature=temperature) for i, p in enumerate(texts)]
    for prompt, turn in zip(texts, run_all(engine, requests), strict=True):
        expected = reference_logprobs(llama, prompt, turn.token_ids, temperature=temperature)
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(num_key_value_heads=1),
        Qwen3Config(num_key_value_heads=2, head_dim=16),
        GemmaConfig(num_key_value_heads=1, head_dim=16),
        MistralConfig(num_key_value_heads=2, sliding_window=512),
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512),
    ],
    ids=lambda config: config.model_type,
)
def test_architectures_give_the_logprobs_of_their_plain_forward_pass(config):
    torch.manual_seed(0)
    if config.model_type != "gpt2":
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 96, 2
        config.num_attention_heads, config.max_position_embeddings = 4, 512
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
    config.vocab_size = VOCABULARY
    model = AutoLM.from_config(config).eval()
    engine = engine_of(model)
    texts = prompts(5)
    requests = [request(p, seed=i) for i, p in enumerate(texts)]
    for prompt, turn in zip(texts, run_all(engine, requests), strict=True):
        expected = reference_logprobs(model, prompt, turn.token_ids, temperature=1.0)
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4)


def test_a_sample_does_not_depend_on_the_batch(llama):
    mixed = [
        request(p, seed=100 + i, max_tokens=5 + 7 * (i % 5), top_k=(0, 8)[i % 2])
        for i, p in enumerate(prompts(40))
    ]
    together = run_all(engine_of(llama, max_batch=16), mixed)
    for one, turn in list(zip(mixed, together, strict=True))[::5]:
        (alone,) = run_all(engine_of(llama), [one])
        assert alone.token_ids == turn.token_ids
        np.testing.assert_allclose(alone.logprobs, turn.logprobs, atol=1e-5)


def test_two_runs_are_equal_to_the_bit(llama):
    async def chat(engine, first):
        """Three turns, each after what the last one said."""
        turns, ids = [], list(first)
        for step in range(3):
            turn = await engine.generate(request(ids, seed=len(first) + step, max_tokens=9))
            turns.append(turn)
            ids += [*turn.token_ids, 5, 6, 7]
        return turns

    async def main(engine):
        return await asyncio.gather(*(chat(engine, p) for p in prompts(30, low=10)))

    runs = []
    for _ in range(2):
        engine = engine_of(llama, max_batch=12)
        runs.append([asyncio.run(main(engine)) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[0][1]  # nor does an engine remember an earlier loop


def test_different_seeds_give_different_samples(llama):
    prompt = prompts(1)[0]
    turns = run_all(engine_of(llama), [request(prompt, seed=s) for s in range(8)])
    assert len({turn.token_ids for turn in turns}) == 8


def test_a_turn_ends_with_the_first_stop_id_included(llama):
    prompt = prompts(1)[0]
    (free,) = run_all(engine_of(llama), [request(prompt, seed=3)])
    stop = free.token_ids[6]
    end = free.token_ids.index(stop) + 1
    (turn,) = run_all(engine_of(llama), [request(prompt, seed=3, stop=(VOCABULARY + 5, stop))])
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

    free, turn = run_all(engine_of(llama), [one, replace(one, stop_when=stop_when)])
    assert turn.token_ids == free.token_ids[:4]
    assert turn.finish == "stop"
    assert asked == [list(free.token_ids[:n]) for n in range(1, 5)]


def test_generation_is_cut_at_the_context(llama):
    engine = engine_of(llama, max_context=30)
    (turn,) = run_all(engine, [request(prompts(1, low=25, high=25)[0], max_tokens=99)])
    assert len(turn.token_ids) == 5
    assert turn.finish == "length"


def test_the_cache_stays_within_its_budget_and_turns_wait_or_are_set_aside(llama):
    engine = engine_of(llama, max_cache_tokens=512, max_context=400)
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
    roomy = run_all(engine_of(llama), requests)
    assert [t.token_ids for t in tight] == [t.token_ids for t in roomy]
    for a, b in zip(tight, roomy, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_rollouts_of_one_prompt_compute_it_once(llama):
    engine = engine_of(llama)
    prompt = prompts(1, low=50, high=50)[0]
    run_all(engine, [request(prompt, seed=s) for s in range(8)])
    assert engine.stats.prompt_tokens == 8 * 50
    assert engine.stats.cached_prompt_tokens == 7 * 49


def test_the_next_turn_of_an_episode_reuses_the_last_ones_cache(llama):
    engine = engine_of(llama)

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
    engine = engine_of(model)
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


def test_the_shared_model_is_left_as_it_was_found():
    model = make_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    digest = hashlib.sha256(model.lm_head.weight.detach().numpy().tobytes()).digest()
    prompt = prompts(1)[0]
    first, second = (run_all(engine_of(model), [request(prompt)]) for _ in range(2))
    assert first == second  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert hashlib.sha256(model.lm_head.weight.detach().numpy().tobytes()).digest() == digest
    model(torch.tensor([prompt])).logits.sum().backward()  # still trainable
    assert model.model.embed_tokens.weight.grad is not None


def test_waiting_on_real_time_does_not_stall_other_episodes(llama):
    engine = engine_of(llama)

    async def main():
        long = asyncio.create_task(engine.generate(request([1, 2], max_tokens=400)))
        await asyncio.sleep(0.01)
        short = await engine.generate(request([3, 4], max_tokens=3))
        assert not long.done()
        assert len(short.token_ids) == 3
        await long

    asyncio.run(main())


def test_a_cancelled_request_leaves_the_batch(llama):
    engine = engine_of(llama)

    async def main():
        doomed = asyncio.create_task(engine.generate(request([1, 2], max_tokens=400)))
        kept = asyncio.create_task(engine.generate(request([3, 4], max_tokens=50)))
        await asyncio.sleep(0.02)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert len(engine._decoder.turns) == 1
        return await kept

    kept = asyncio.run(main())
    (alone,) = run_all(engine_of(llama), [request([3, 4], max_tokens=50)])
    assert kept.token_ids == alone.token_ids


def test_a_loop_that_ends_early_does_not_break_the_next_one(llama):
    engine = engine_of(llama)

    async def abandon():
        asyncio.create_task(engine.generate(request([1, 2], max_tokens=400)))  # noqa: RUF006
        await asyncio.sleep(0.02)

    asyncio.run(abandon())
    (turn,) = run_all(engine, [request([3, 4])])
    assert len(turn.token_ids) == 20


def test_a_broken_forward_pass_fails_every_pending_request_then_the_engine_recovers(llama):
    engine = engine_of(llama)
    runner = engine._decoder._runner
    decode, calls = runner.decode, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return decode(*arguments)

    runner.decode = broken

    async def main():
        requests = [request(p, seed=i) for i, p in enumerate(prompts(4))]
        return await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)

    results = asyncio.run(main())
    assert len(results) == 4
    assert all(isinstance(r, EngineError) and "out of memory" in str(r) for r in results)
    (turn,) = run_all(engine, [request([3, 4])])
    assert len(turn.token_ids) == 20


def test_memory_is_given_back_when_idle(llama):
    engine = engine_of(llama)
    run_all(engine, [request([1, 2])])
    assert engine._decoder._runner._cache is None


def test_options_that_contradict_the_given_model_are_refused(llama):
    with pytest.raises(InputError, match="bfloat16 was asked for"):
        engine_of(llama, dtype="bfloat16")
    with pytest.raises(InputError, match="cannot hold one sequence"):
        engine_of(llama, max_cache_tokens=100)


def test_max_context_is_lowered_to_what_the_model_was_made_for():
    assert engine_of(make_llama(max_position_embeddings=64)).max_context == 64


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            MistralConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=VOCABULARY,
                sliding_window=128,
            ),
            "sliding attention layers of 128 tokens",
        ),
        (
            Gemma2Config(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size=VOCABULARY,
                sliding_window=1024,
                attn_logit_softcapping=0.05,
                initializer_range=0.3,
                attn_implementation="eager",
            ),
            "differ from its plain forward pass",
        ),
    ],
    ids=["sliding window", "soft-capped attention"],
)
def test_models_that_cannot_be_served_exactly_are_refused(config, reason):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=reason):
        engine_of(AutoLM.from_config(config).eval())


def test_a_folder_is_loaded_on_the_cpu_in_float32(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    engine = TransformersEngine(EngineOptions(policy=str(tmp_path), device="cpu"))
    assert engine.model.dtype == torch.float32
    assert not engine.model.training
    one = request(prompts(1)[0])
    assert run_all(engine, [one]) == run_all(engine_of(llama), [one])


@pytest.mark.parametrize("case", ["missing", "empty", "encoder", "classifier", "truncated"])
def test_a_bad_policy_folder_is_one_clear_sentence(llama, tmp_path, case):
    folder = tmp_path / "model"
    if case == "empty":
        folder.mkdir()
    elif case == "encoder":
        BertConfig().save_pretrained(folder)
        (folder / "config.json").write_text('{"model_type": "clip"}')
    elif case == "classifier":
        LlamaForTokenClassification(llama.config).save_pretrained(folder)
    elif case == "truncated":
        llama.save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="model") as caught:
        TransformersEngine(EngineOptions(policy=str(folder), device="cpu"))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no such GPU"):
        TransformersEngine(EngineOptions(policy=str(tmp_path), device="cuda:63"))
