"""The narrow interface to a language model: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trajectory.records import Sampling


class EngineError(Exception):
    """Generation broke (out of memory, dead server, bad reply); the episode ends undecided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What every engine is built from."""

    policy: str
    """Hub id or folder of the model."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:0`` ..."""
    dtype: str = "auto"
    """``auto`` (float32 on CPU, bfloat16 on GPU), ``float32``, ``bfloat16``, ``float16``."""
    max_batch: int = 256
    """Most sequences decoded together, >= 1."""
    max_cache_tokens: int = 131_072
    """Bound on tokens held in the key-value cache, all sequences together."""
    max_context: int = 4096
    """Longest prompt plus generation of one sequence, tokens."""
    seed: int = 0
    argument: str = ""
    """What follows the colon in the engine's name: for ``http``, the servers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One turn to sample."""

    request_id: str
    """Unique and stable: a retried request carries the same id."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    """The sample depends on this seed and the prompt, not on what else is in the batch."""
    stop_ids: tuple[int, ...]
    """Generation ends with (and includes) the first of these ids."""
    stop_when: Callable[[Sequence[int]], bool] | None = None
    """Asked after every new token, with the ids generated so far; true ends the turn there."""
    affinity: str = ""
    """Requests with equal ones share a prefix, so an engine with several caches sends them to one;
    empty: the beginning of the prompt tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One sampled turn."""

    token_ids: tuple[int, ...]
    """Sampled ids, the stop id included when one was hit."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each id under the distribution it was drawn from
    (after temperature, top-p and top-k); at temperature 0, under the untempered softmax."""
    finish: Literal["stop", "length"]
    """``stop``: a stop id or ``stop_when`` ended it; ``length``: the token limit did."""


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """Running totals since the engine was made."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Prompt tokens whose computation a prefix cache saved."""
    busy_seconds: float = 0.0
    """Time spent inside model forwards (0 where the engine cannot tell)."""


class Engine(Protocol):
    """A language model that continues token ids."""

    name: str
    """Row of the table it was made from."""
    policy: str
    """Hub id or folder of the model."""
    revision: str
    """Which weights are loaded; changes when weights are updated."""
    max_context: int
    """Longest prompt plus generation of one sequence, tokens."""
    stats: EngineStats

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one turn; many calls may be in flight and are batched by the engine.

        Raises
        ------
        EngineError
            If generation broke for a reason that is not the request's content.
        ValueError
            If the prompt is empty or does not fit ``max_context``.
        """
        ...

    async def close(self) -> None:
        """Release the model; pending requests end with `EngineError`."""
        ...
