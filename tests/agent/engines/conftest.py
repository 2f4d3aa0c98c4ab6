"""The tiny random model, made once."""

import pytest
from transformers import PreTrainedModel

from tests.agent.engines.tiny import make_llama


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_llama()
