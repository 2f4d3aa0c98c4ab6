"""The tiny random model, made once, and servers and clients of the http engine."""

import asyncio

import pytest
from transformers import PreTrainedModel

from agent.engines.base import EngineOptions
from agent.engines.http import HttpEngine
from agent.engines.servers import Servers
from tests.agent.engines.loopback import Loopback
from tests.agent.engines.shared_vllm import shared_folder
from tests.agent.engines.tiny import make_llama


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_llama()


@pytest.fixture(scope="session")
def served_folder():
    return str(shared_folder())


@pytest.fixture
def make():
    """Make servers that are closed at the end."""
    made = []

    def server(**settings):
        made.append(Loopback(**settings).start())
        return made[-1]

    yield server
    for one in made:
        one.close()


@pytest.fixture
def connect(served_folder):
    """Make engines that are closed at the end."""
    made = []

    def engine(*servers, max_batch=64, **limits):
        urls = tuple(one if isinstance(one, str) else one.url for one in servers)
        settings = {"patience_s": 5.0, "timeout_s": 20.0, "backoff_s": 0.05, "check_s": 5.0}
        options = EngineOptions(policy=served_folder, max_context=256, max_batch=max_batch)
        made.append(HttpEngine(options, Servers(urls=urls, **(settings | limits))))
        return made[-1]

    yield engine
    for one in made:
        asyncio.run(one.close())
