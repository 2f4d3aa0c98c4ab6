"""A tiny random Llama and helpers to talk to an engine."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agent.engines.base import Engine, EngineOptions, GenerateRequest, Generation
from agent.engines.transformers import TransformersEngine
from trajectory.records import Sampling

VOCABULARY = 96


def make_llama(**changes: object) -> LlamaForCausalLM:
    """A random model whose distributions are neither flat nor peaked."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def request(
    prompt: Sequence[int], *, seed: int = 0, stop: Sequence[int] = (), **sampling: object
) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"r{seed}",
        prompt_ids=tuple(prompt),
        sampling=replace(Sampling(max_tokens=20), **sampling),
        seed=seed,
        stop_ids=tuple(stop),
    )


def prompts(count: int, *, low: int = 1, high: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))] for _ in range(count)
    ]


def run_all(engine: Engine, requests: Sequence[GenerateRequest]) -> list[Generation]:
    async def gather() -> list[Generation]:
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    return asyncio.run(gather())


def reference_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int], *, temperature: float
) -> list[float]:
    """Log-probabilities of the generated ids by one plain forward pass."""
    ids = torch.tensor([[*prompt, *generated]])
    with torch.no_grad():
        logits = model(ids).logits[0].double() / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows[torch.arange(len(generated)), torch.tensor(generated)].tolist()


def make_engine(model: PreTrainedModel, **options: object) -> TransformersEngine:
    """The embedded engine around a model, with limits that suit it."""
    settings: dict[str, object] = {"policy": "tiny", "max_context": 512, "max_batch": 64}
    return TransformersEngine(EngineOptions(**(settings | options)), model=model)
