"""A two-layer policy that knows four problems, more or less."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agent.setup import AgentConfig
from policy.synthesize import SynthesizeConfig, synthesize
from policy.tiny import make_tokenizer
from policy.warmup import WarmupConfig, warmup

TASKS = "arithmetic:operations=2"


def make_small_policy(root: Path) -> Path:
    """A small model that was shown solutions of four problems, a third of their calls wrong."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(root / "random")
    tokenizer.save_pretrained(root / "random")
    synthesize(
        SynthesizeConfig(
            tasks=TASKS,
            num_tasks=4,
            samples=12,
            slip=0.35,
            contrast=0.0,
            recovery=0.0,
            out=root / "data",
        )
    )
    warmup(
        WarmupConfig(
            data=root / "data",
            model=str(root / "random"),
            out=root / "policy",
            epochs=40,
            learning_rate=1e-2,
            step_tokens=1024,
            held_out=0.0,
            device="cpu",
        )
    )
    return root / "policy"


def agent_config(policy, **changes):
    fields = {
        "tasks": TASKS,
        "policy": str(policy),
        "num_tasks": 4,
        "max_steps": 4,
        "max_turn_tokens": 30,
        "max_context": 300,
        "concurrency": 64,
        "device": "cpu",
    }
    return AgentConfig(**(fields | changes))
