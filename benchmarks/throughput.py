"""How fast the engines generate, and how busy a pipeline keeps its engine.

Speed is measured, never asserted in a test: a shared machine varies from minute to minute. So
every table gives a ratio besides the rate: an engine beside plain batched ``model.generate`` of
the same model in the same minute, and a pipeline beside the same engine fed directly with the
same requests at equal concurrency.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from agent.engines import build_engine
from agent.engines.base import Engine, EngineOptions, EngineStats, GenerateRequest, Generation
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
    generate_ratio: float | None
    """Rate divided by that of plain ``model.generate``; None where that was not measured."""


class RecordingEngine:
    """An engine that forwards to another one and keeps every request.

    Parameters
    ----------
    engine : Engine
        Does the work.

    Notes
    -----
    ``requests`` and ``generations`` are in order of completion. To ask how busy a pipeline kept
    its engine: run it on a `RecordingEngine`, then `direct_feed` the recorded requests.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name
        self.policy = engine.policy
        self.max_context = engine.max_context
        self.requests: list[GenerateRequest] = []
        self.generations: list[Generation] = []

    @property
    def revision(self) -> str:
        """The weights of the engine behind."""
        return self._engine.revision

    @revision.setter
    def revision(self, value: str) -> None:
        self._engine.revision = value

    @property
    def stats(self) -> EngineStats:
        """The totals of the engine behind."""
        return self._engine.stats

    @stats.setter
    def stats(self, value: EngineStats) -> None:
        self._engine.stats = value

    async def generate(self, request: GenerateRequest) -> Generation:
        """Forward the request and note it when it is answered."""
        generation = await self._engine.generate(request)
        self.requests.append(request)
        self.generations.append(generation)
        return generation

    async def close(self) -> None:
        """Close the engine behind."""
        await self._engine.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """What came of feeding an engine."""

    generated_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall-clock time."""
        return self.generated_tokens / self.seconds


async def direct_feed(
    engine: Engine, requests: Sequence[GenerateRequest], *, concurrency: int
) -> Feed:
    """Keep ``concurrency`` of the given requests in flight until all are answered.

    Parameters
    ----------
    engine : Engine
        Its prompts are all known in advance, so it never waits for a tool or a parser.
    requests : sequence of GenerateRequest
        In the order to be sent.
    concurrency : int
        Requests in flight, >= 1.

    Returns
    -------
    Feed
        Tokens generated by this call and its wall-clock time: the ceiling for any pipeline that
        makes the same requests.
    """
    pending = iter(requests)
    generated = 0

    async def worker() -> None:
        nonlocal generated
        for request in pending:
            generation = await engine.generate(request)
            generated += len(generation.token_ids)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return Feed(generated_tokens=generated, seconds=time.perf_counter() - started)


async def busy_share(
    engine: Engine,
    pipeline: Callable[[RecordingEngine], Awaitable[object]],
    *,
    concurrency: int,
) -> tuple[Feed, Feed]:
    """Run a pipeline on an engine, then feed the engine the same requests directly.

    Parameters
    ----------
    engine : Engine
        Serves both runs, one after the other.
    pipeline : callable
        Gets the recording engine and does its work with it.
    concurrency : int
        Episodes alive in the pipeline, and requests in flight in the direct run.

    Returns
    -------
    pipeline, direct : Feed
        The busy share is the ratio of their ``tokens_per_second``.
    """
    recorder = RecordingEngine(engine)
    started = time.perf_counter()
    await pipeline(recorder)
    seconds = time.perf_counter() - started
    tokens = sum(len(generation.token_ids) for generation in recorder.generations)
    direct = await direct_feed(engine, recorder.requests, concurrency=concurrency)
    return Feed(generated_tokens=tokens, seconds=seconds), direct


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
            feeds = [
                asyncio.run(direct_feed(engine, requests, concurrency=batch))
                for _ in range(config.repeats)
            ]
            best = max(feed.tokens_per_second for feed in feeds)
            plain = None
            if model is not None:
                plain = max(_generate_rate(model, requests[:batch]) for _ in range(config.repeats))
            rows.append(
                Rate(
                    name=engine.name,
                    batch=batch,
                    generated_tokens=feeds[0].generated_tokens,
                    seconds=min(feed.seconds for feed in feeds),
                    tokens_per_second=best,
                    generate_ratio=None if plain is None else best / plain,
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


def _generate_rate(model: PreTrainedModel, requests: Sequence[GenerateRequest]) -> float:
    """Tokens per second of one left-padded ``model.generate`` over a batch of requests.

    It runs until the longest row is done; only the tokens that were asked for are counted.
    """
    longest = max(len(request.prompt_ids) for request in requests)
    ids = torch.zeros((len(requests), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, longest - len(request.prompt_ids) :] = 1
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(request.sampling.max_tokens for request in requests),
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - started
    return sum(request.sampling.max_tokens for request in requests) / seconds


def print_table(rows: Sequence[Rate]) -> None:
    """Print measurements as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("engine", "batch", "tokens", "seconds", "tokens/s", "x model.generate")
    for row in rows:
        ratio = "-" if row.generate_ratio is None else f"{row.generate_ratio:.2f}"
        cells = (row.batch, row.generated_tokens, f"{row.seconds:.2f}")
        table.add_row(row.name, *map(str, cells), f"{row.tokens_per_second:,.0f}", ratio)
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
