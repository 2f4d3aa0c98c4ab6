"""One vLLM engine for every test that wants one: loading it takes a minute.

The conformance tests, which run last, close it.
"""

import functools
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from agent.engines.base import EngineOptions
from agent.engines.vllm import VllmEngine
from tests.agent.engines.tiny import make_llama


@functools.cache
def shared_model() -> PreTrainedModel:
    """Heads of 32, the least vLLM's attention takes."""
    return make_llama(hidden_size=128)


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    shared_model().save_pretrained(directory.name)
    return directory


def shared_folder() -> Path:
    """The model on disk; removed when the process ends."""
    return Path(_directory().name)


def shared_options(folder: Path) -> EngineOptions:
    return EngineOptions(
        policy=str(folder), device="cpu", max_context=256, max_cache_tokens=8192, max_batch=64
    )


@functools.cache
def shared_engine() -> VllmEngine:
    return VllmEngine(shared_options(shared_folder()))
