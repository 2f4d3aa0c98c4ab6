"""Two processes train to the same weights as one."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from prm.train import train
from tests.prm.synthetic import small_config

TRAIN = """
import sys
from pathlib import Path
from prm.train import train
from tests.prm.synthetic import small_config

base, labels, out = map(Path, sys.argv[1:])
train(small_config(base, labels, out, epochs=1, batch_tokens=300))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_to_the_same_weights_as_one(base, labels, tmp_path, repository):
    single = small_config(base, labels, tmp_path / "one", epochs=1, batch_tokens=300)
    train(single)
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(repository),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(base), str(labels), str(tmp_path / "two")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=300)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], errors
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=2e-4), name
