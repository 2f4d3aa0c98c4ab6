"""The embedded engine: any Hugging Face causal language model, batched inside the event loop.

There is no thread and no clock in it. One scheduler task alternates between a unit of work (a
prefill wave, or one token for the whole batch) and handing control back to the loop, long enough
for episodes woken by a finished turn to ask for their next one. If tools are pure functions, the
composition of every batch, hence every bit of every sample, is the same in every run.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from agent.engines.base import (
    EngineError,
    EngineOptions,
    EngineStats,
    GenerateRequest,
    Generation,
)
from agent.engines.checks import check_options, check_request
from agent.engines.decoder import Decoder
from agent.engines.loading import (
    align_weights,
    embedding_weight,
    load_model,
    resolve_device,
    resolve_dtype,
)
from agent.engines.runner import Runner
from agent.engines.turns import Turn
from trajectory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUIET_TURNS = 8
"""Passes of the event loop without a new request after which woken episodes count as settled."""


class TransformersEngine:
    """Continuous batching over a model that a trainer may update in place.

    Parameters
    ----------
    options : EngineOptions
        ``max_context`` is lowered to what the model was made for.
    model : PreTrainedModel, optional
        Use this object (shared, not copied) instead of loading ``options.policy``.
    tokenizer : PreTrainedTokenizerBase, optional
        Kept beside the model for whoever needs it; the engine itself sees only ids.

    Raises
    ------
    InputError
        If the model is missing, is no causal language model, or cannot be served exactly; if an
        option is out of range or contradicts the given model.

    Notes
    -----
    A sample depends on prompt, seed and weights; the other sequences of the batch change its
    log-probabilities only by rounding (about 1e-6 in float32). After updating the weights call
    `set_revision`: it discards the keys and values computed with the old ones.
    """

    name = "transformers"

    def __init__(
        self,
        options: EngineOptions,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_options(options)
        self.policy = options.policy
        self.revision = "0"
        self.stats = EngineStats()
        self.tokenizer = tokenizer
        self.model = load_model(options) if model is None else _agreeing(model, options)
        align_weights(self.model)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_context = min(options.max_context, longest or options.max_context)
        runner = Runner(self.model, name=options.policy, max_context=self.max_context)
        self._vocabulary = runner.vocabulary
        self._decoder = Decoder(
            runner,
            self.stats,
            max_batch=options.max_batch,
            max_cache_tokens=options.max_cache_tokens,
        )
        self._futures: dict[Turn, asyncio.Future[Generation]] = {}
        self._scheduler: asyncio.Task[None] | None = None
        self._arrivals = 0
        self._closed = False

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one turn; see `agent.engines.base.Engine.generate`."""
        if self._closed:
            raise EngineError("the engine is closed")
        check_request(request, max_context=self.max_context, vocabulary=self._vocabulary)
        loop = asyncio.get_running_loop()
        prompt = len(request.prompt_ids)
        turn = Turn(
            request=request,
            limit=min(prompt + request.sampling.max_tokens, self.max_context),
            ids=list(request.prompt_ids),
        )
        self._start_scheduler(loop)
        future: asyncio.Future[Generation] = loop.create_future()
        self._futures[turn] = future
        self._decoder.add(turn)
        self._arrivals += 1
        self.stats.requests += 1
        self.stats.prompt_tokens += prompt
        try:
            return await future
        finally:
            if self._futures.pop(turn, None) is not None:  # the caller was cancelled
                self._decoder.drop(turn)

    def set_revision(self, revision: str) -> None:
        """Name the weights now in `model`; call after every update of them."""
        self.revision = revision
        self._decoder.forget_prefixes()

    async def close(self) -> None:
        """Release the cache; pending requests end with `EngineError`."""
        self._closed = True
        self._fail("the engine was closed")
        if self._scheduler is not None and not self._scheduler.done():
            self._scheduler.cancel()
        self._scheduler = None

    def _start_scheduler(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make sure a scheduler task runs on this loop."""
        if self._scheduler is not None and not self._scheduler.done():
            owner = self._scheduler.get_loop()
            if owner is loop:
                return
            if not owner.is_closed():
                raise EngineError("the engine is in use by another event loop")
            self._fail("its event loop was closed")
        self._scheduler = loop.create_task(self._schedule(), name="transformers-engine")

    async def _schedule(self) -> None:
        """Work while there is work; then give the cache back, so that idle costs no memory."""
        try:
            await self._settle()
            while self._futures:
                started = time.perf_counter()
                finished = self._decoder.step()
                self.stats.busy_seconds += time.perf_counter() - started
                for turn in finished:
                    self._answer(turn)
                if finished:
                    await self._settle()
                else:
                    await asyncio.sleep(0)
            self._decoder.release()
        except asyncio.CancelledError:
            self._fail("the event loop was shut down")
            raise
        except Exception as error:
            self._fail(f"generation broke: {type(error).__name__}: {error}")

    async def _settle(self) -> None:
        """Hand control to the loop until woken episodes have asked for their next turn."""
        quiet = 0
        while quiet < _QUIET_TURNS:
            arrivals = self._arrivals
            await asyncio.sleep(0)
            quiet = quiet + 1 if arrivals == self._arrivals else 0

    def _answer(self, turn: Turn) -> None:
        """Resolve the future of a finished turn."""
        future = self._futures.pop(turn, None)
        if future is None or future.done():
            return
        assert turn.finish is not None
        future.set_result(
            Generation(
                token_ids=tuple(turn.sampled), logprobs=tuple(turn.logprobs), finish=turn.finish
            )
        )

    def _fail(self, reason: str) -> None:
        """End every pending request and forget all state."""
        futures, self._futures = self._futures, {}
        self._decoder.release()
        for future in futures.values():
            if not future.done() and not future.get_loop().is_closed():
                future.set_exception(EngineError(reason))


def _agreeing(model: PreTrainedModel, options: EngineOptions) -> PreTrainedModel:
    """Check that the given model is where and what the options say."""
    weight = embedding_weight(model)
    if options.device != "auto" and resolve_device(options.device).type != weight.device.type:
        raise InputError(f"device {options.device} was asked for, the model is on {weight.device}")
    if options.dtype != "auto" and resolve_dtype(options.dtype, weight.device) != weight.dtype:
        raise InputError(f"dtype {options.dtype} was asked for, the model has {weight.dtype}")
    return model
