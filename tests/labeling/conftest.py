"""A folder with a policy and six tasks, as the labelling command takes them."""

import pytest

from labeling.run import label
from tests.labeling.folders import config
from tests.labeling.walker import WalkerEngine, make_policy, make_tasks


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    make_policy(folder / "policy")
    make_tasks(folder / "tasks.jsonl", 6)
    return folder


@pytest.fixture(scope="session")
def finished(lab, tmp_path_factory):
    """An unbroken run, two trajectories per task."""
    out = tmp_path_factory.mktemp("finished") / "labels"
    report = label(config(lab, out, samples=2), engine=WalkerEngine(lab / "policy"))
    return out, report
