"""Fixtures that every package's tests share."""

import re
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

# Tests that share something costly, or keep both cores busy, run in one process each. (xdist's own
# groups write into node ids, which pytest made read-only in 9.2.)
GROUPS = {
    "vllm": re.compile(r"test_(http_)?vllm\.py|test_engines\.py.*vllm"),
    "hostile": re.compile(r"test_hostile\.py"),
    "ray": re.compile(r"test_ray\.py"),
}

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a group in one process."""
    from xdist.scheduler import LoadGroupScheduling

    class ByGroup(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            found = (name for name, pattern in GROUPS.items() if pattern.search(nodeid))
            return next(found, nodeid)

    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None


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
