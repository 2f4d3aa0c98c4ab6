"""A folder with a policy and six tasks, as the labelling command takes them."""

import pytest

from tests.labeling.walker import make_policy, make_tasks


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    make_policy(folder / "policy")
    make_tasks(folder / "tasks.jsonl", 6)
    return folder
