import asyncio
import hashlib

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
    make_engine,
    make_llama,
    prompts,
    reference_logprobs,
    request,
    run_all,
)
from trajectory.errors import InputError


def test_greedy_turns_equal_generate(llama):
    engine = make_engine(llama)
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
    engine = make_engine(llama)
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
    engine = make_engine(model)
    texts = prompts(5)
    requests = [request(p, seed=i) for i, p in enumerate(texts)]
    for prompt, turn in zip(texts, run_all(engine, requests), strict=True):
        expected = reference_logprobs(model, prompt, turn.token_ids, temperature=1.0)
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4)


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
        engine = make_engine(llama, max_batch=12)
        runs.append([asyncio.run(main(engine)) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[0][1]  # nor does an engine remember an earlier loop


def test_different_seeds_give_different_samples(llama):
    prompt = prompts(1)[0]
    turns = run_all(make_engine(llama), [request(prompt, seed=s) for s in range(8)])
    assert len({turn.token_ids for turn in turns}) == 8


def test_the_shared_model_is_left_as_it_was_found():
    model = make_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    digest = hashlib.sha256(model.lm_head.weight.detach().numpy().tobytes()).digest()
    prompt = prompts(1)[0]
    first, second = (run_all(make_engine(model), [request(prompt)]) for _ in range(2))
    assert first == second  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert hashlib.sha256(model.lm_head.weight.detach().numpy().tobytes()).digest() == digest
    model(torch.tensor([prompt])).logits.sum().backward()  # still trainable
    assert model.model.embed_tokens.weight.grad is not None


def test_waiting_on_real_time_does_not_stall_other_episodes(llama):
    engine = make_engine(llama)

    async def main():
        long = asyncio.create_task(engine.generate(request([1, 2], max_tokens=400)))
        await asyncio.sleep(0.01)
        short = await engine.generate(request([3, 4], max_tokens=3))
        assert not long.done()
        assert len(short.token_ids) == 3
        await long

    asyncio.run(main())


def test_a_cancelled_request_leaves_the_batch(llama):
    engine = make_engine(llama)

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
    (alone,) = run_all(make_engine(llama), [request([3, 4], max_tokens=50)])
    assert kept.token_ids == alone.token_ids


def test_a_loop_that_ends_early_does_not_break_the_next_one(llama):
    engine = make_engine(llama)

    async def abandon():
        asyncio.create_task(engine.generate(request([1, 2], max_tokens=400)))  # noqa: RUF006
        await asyncio.sleep(0.02)

    asyncio.run(abandon())
    (turn,) = run_all(engine, [request([3, 4])])
    assert len(turn.token_ids) == 20


def test_a_broken_forward_pass_fails_every_pending_request_then_the_engine_recovers(llama):
    engine = make_engine(llama)
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


def test_options_that_contradict_the_given_model_are_refused(llama):
    with pytest.raises(InputError, match="bfloat16 was asked for"):
        make_engine(llama, dtype="bfloat16")
    with pytest.raises(InputError, match="cannot hold one sequence"):
        make_engine(llama, max_cache_tokens=100)


def test_max_context_is_lowered_to_what_the_model_was_made_for():
    assert make_engine(make_llama(max_position_embeddings=64)).max_context == 64


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
        make_engine(AutoLM.from_config(config).eval())


def test_a_folder_is_loaded_on_the_cpu_in_float32(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    engine = TransformersEngine(EngineOptions(policy=str(tmp_path), device="cpu"))
    assert engine.model.dtype == torch.float32
    assert not engine.model.training
    one = request(prompts(1)[0])
    assert run_all(engine, [one]) == run_all(make_engine(llama), [one])


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
