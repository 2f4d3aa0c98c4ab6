"""How fast the engines generate, and how busy a pipeline keeps its engine.

Speed is measured, never asserted in a test: a shared machine varies from minute to minute. So
besides the rate by the clock every table gives what depends less on the neighbours: tokens per
second of processor time (with ``--threads 1`` nearly free of noise), the ratio of that to plain
batched ``model.generate`` of the same model, and, for a pipeline, the ratio to the same engine
fed directly with the same requests at equal concurrency.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from agent.engines import build_engine
from agent.engines.base import Engine, EngineOptions, GenerateRequest
from benchmarks.feeding import Feed, Stopwatch, direct_feed
from trajectory.atomic import atomic_path
from trajectory.errors import InputError
from trajectory.records import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT_TOKENS = (60, 100)
_NEW_TOKENS = (60, 140)


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Measure generated tokens per second at several batch sizes."""

    model: str = ""
    """Model folder or hub id; when not given, a random Llama of the embedded policy's size."""
    engine: str = "transformers"
    """Generation engine: transformers or vllm (which needs a model)."""
    batches: tuple[int, ...] = (1, 16, 64, 256)
    """Concurrent sequences, one row of the table each."""
    repeats: int = 3
    """Measurements of each row; the fastest counts, as noise only slows down."""
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""
    device: str = "auto"
    """auto, cpu, cuda ..."""
    out: Path | None = None
    """Write the rows and the machine's facts to this JSON file too."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InputError("--batches needs numbers >= 1")
        if self.repeats < 1:
            raise InputError("--repeats must be >= 1")
        if self.engine == "vllm" and not self.model:
            raise InputError("--engine vllm needs --model: it loads a folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """One measurement."""

    name: str
    batch: int
    """Concurrent sequences."""
    generated_tokens: int
    seconds: float
    """Wall-clock time."""
    tokens_per_second: float
    tokens_per_cpu_second: float | None
    """The same per second of processor time, all threads; None if other processes do the work."""
    generate_ratio: float | None
    """The rate per processor time divided by that of plain ``model.generate``."""


def machine_facts() -> dict[str, str | int | float]:
    """Return what a reader needs to judge a rate."""
    import transformers

    facts: dict[str, str | int | float] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 2),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def random_requests(
    count: int, *, vocabulary: int, seed: int = 0, sampling: Sampling | None = None
) -> list[GenerateRequest]:
    """Return requests with 60-100 random prompt ids and 60-140 new tokens, no stop ids."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(*_PROMPT_TOKENS, size=count, endpoint=True)
    new_lengths = rng.integers(*_NEW_TOKENS, size=count, endpoint=True)
    return [
        GenerateRequest(
            request_id=f"throughput-{seed}-{i}",
            prompt_ids=tuple(rng.integers(vocabulary, size=prompt_lengths[i]).tolist()),
            sampling=replace(sampling or Sampling(), max_tokens=int(new_lengths[i])),
            seed=i,
            stop_ids=(),
        )
        for i in range(count)
    ]


def embedded_llama() -> PreTrainedModel:
    """Return a random Llama of the embedded policy's shape: 4 layers, width 128, 0.8M weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def measure(config: ThroughputConfig) -> list[Rate]:
    """Run the measurements of a config.

    Returns
    -------
    list of Rate
        Per batch size: the engine, and plain ``model.generate`` where the engine has the model.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    engine, model, vocabulary = _open(config)
    rows = []
    try:
        for batch in config.batches:
            requests = random_requests(max(2 * batch, 8), vocabulary=vocabulary)
            feeds, plain = [], []
            for _ in range(config.repeats):
                feeds.append(asyncio.run(direct_feed(engine, requests, concurrency=batch)))
                if model is not None:
                    plain.append(_generate(model, requests[:batch]).tokens_per_cpu_second)
            per_cpu = max(feed.tokens_per_cpu_second for feed in feeds) if plain else None
            rows.append(
                Rate(
                    name=engine.name,
                    batch=batch,
                    generated_tokens=feeds[0].generated_tokens,
                    seconds=min(feed.seconds for feed in feeds),
                    tokens_per_second=max(feed.tokens_per_second for feed in feeds),
                    tokens_per_cpu_second=per_cpu,
                    generate_ratio=None if per_cpu is None else per_cpu / max(plain),
                )
            )
    finally:
        asyncio.run(engine.close())
    return rows


def _open(config: ThroughputConfig) -> tuple[Engine, PreTrainedModel | None, int]:
    """Make the engine; return it, its model where there is one, and the vocabulary size."""
    from agent.engines.transformers import TransformersEngine

    options = EngineOptions(
        policy=config.model or "random-llama",
        device=config.device,
        max_batch=max(config.batches),
        max_context=512,
    )
    if config.engine == "transformers":
        model = None if config.model else embedded_llama()
        engine = TransformersEngine(options, model=model)
        return engine, engine.model, engine.model.config.get_text_config().vocab_size
    from agent.engines.loading import load_config

    built = build_engine(config.engine, options)
    return built, None, load_config(config.model).get_text_config().vocab_size


def _generate(model: PreTrainedModel, requests: Sequence[GenerateRequest]) -> Feed:
    """Run one left-padded ``model.generate`` over a batch of requests.

    It runs until the longest row is done; only the tokens that were asked for are counted.
    """
    longest = max(len(request.prompt_ids) for request in requests)
    ids = torch.zeros((len(requests), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, longest - len(request.prompt_ids) :] = 1
    watch = Stopwatch()
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(request.sampling.max_tokens for request in requests),
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
    return watch.feed(sum(request.sampling.max_tokens for request in requests))


def print_table(rows: Sequence[Rate]) -> None:
    """Print measurements as a table."""
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    heads = ("engine", "batch", "tokens", "seconds", "tokens/s", "tokens/cpu-s", "x generate")
    table = Table(*heads)
    for row in rows:
        table.add_row(
            row.name,
            str(row.batch),
            str(row.generated_tokens),
            number(row.seconds, ".2f"),
            number(row.tokens_per_second, ",.0f"),
            number(row.tokens_per_cpu_second, ",.0f"),
            number(row.generate_ratio, ".2f"),
        )
    Console().print(table)


def throughput(config: ThroughputConfig) -> None:
    """Measure, print the table, and write the JSON file if one was asked for."""
    facts = machine_facts()
    rows = measure(config)
    print_table(rows)
    print("machine:", ", ".join(f"{key} {value}" for key, value in facts.items()))
    if config.out is not None:
        report = {"machine": facts, "rows": [asdict(row) for row in rows]}
        with atomic_path(config.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
