"""Fixtures that every package's tests share."""

import signal
import threading
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure, and a failure must come again on the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# A test run that a script starts in its background ignores Ctrl-C, and so would the commands that
# the tests start and interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data sets and tools beside the repository; absent on most machines."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the data folder ../shared beside the repository")
    return folder
