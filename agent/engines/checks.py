"""What every engine refuses before it does any work."""

from __future__ import annotations

from agent.engines.base import EngineOptions, GenerateRequest
from trajectory.errors import InputError


def check_options(options: EngineOptions) -> None:
    """Refuse impossible options.

    Raises
    ------
    InputError
        If a limit is not positive, the cache cannot hold one sequence, or the dtype is unknown.
    """
    for name in ("max_batch", "max_cache_tokens", "max_context"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} must be at least 1, not {getattr(options, name)}")
    if options.max_cache_tokens < options.max_context:
        raise InputError(
            f"max_cache_tokens {options.max_cache_tokens} cannot hold one sequence of "
            f"max_context {options.max_context} tokens: raise it or lower max_context"
        )
    if options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(
            f"unknown dtype {options.dtype!r}: choose auto, float32, bfloat16 or float16"
        )


def check_request(request: GenerateRequest, *, max_context: int, vocabulary: int | None) -> None:
    """Refuse a request that cannot be run.

    Parameters
    ----------
    request : GenerateRequest
    max_context : int
        Longest prompt plus generation, tokens.
    vocabulary : int or None
        Number of ids the model knows; None if any id will do.

    Raises
    ------
    ValueError
        If the prompt is empty, leaves no room for a token, or holds ids outside the vocabulary.
    """
    prompt = request.prompt_ids
    if not prompt:
        raise ValueError(f"request {request.request_id}: the prompt is empty")
    if len(prompt) >= max_context:
        raise ValueError(
            f"request {request.request_id}: a prompt of {len(prompt)} tokens leaves no room in a "
            f"context of {max_context}"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"request {request.request_id}: ids {low}..{high} are outside the vocabulary of "
            f"{vocabulary}"
        )
