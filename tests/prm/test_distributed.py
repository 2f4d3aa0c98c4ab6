"""Two processes train to the weights of one, with the model copied (DDP) or sharded (FSDP2)."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from prm.card import PublishConfig
from prm.checkpoint import load_metadata
from prm.recipe import RecipeConfig
from prm.train import STATE, train
from tests.prm.synthetic import small_config
from trajectory.tracking import read_metrics

# accelerate 1.15 ignores its FSDP plugin where there is no GPU (state.py asks for one of the device
# kinds, and the CPU is none of them), so the switch it would make is made here. The sharding,
# gathering and reducing that follow are accelerate's and torch's own, over gloo.
TRAIN = """
import sys
from pathlib import Path
import accelerate
import prm.train
from prm import fit
from prm.card import PublishConfig
from prm.recipe import RecipeConfig
from tests.prm.synthetic import small_config

base, labels, out = map(Path, sys.argv[1:4])
how, head, stop_after = sys.argv[4], sys.argv[5], int(sys.argv[6])

def sharding(**settings):
    accelerator = accelerate.Accelerator(**settings)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator

if how == "fsdp2":
    prm.train.Accelerator = sharding
saved = []
keep = fit.Fitter._save

def save(self, *, better):
    assert self._sharded == (how == "fsdp2")
    keep(self, better=better)
    saved.append(better)
    if len(saved) == stop_after:
        raise SystemExit(7)

fit.Fitter._save = save
prm.train.train(
    small_config(
        base, labels, out, head=head, epochs=2, patience=0, batch_tokens=300,
        publish=PublishConfig(track="jsonl"), recipe=RecipeConfig(head_first=int(head == "value")),
    )
)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_in_two_processes(repository, base, labels, out, how, head, *, stop_after=0):
    """Run TRAIN twice, as one job, and return the exit codes and what was written to stderr."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(repository),
    }
    settings = (base, labels, out, how, head, stop_after)
    command = [sys.executable, "-c", TRAIN, *map(str, settings)]
    processes = [
        subprocess.Popen(
            command,
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
    return [p.returncode for p in processes], errors


@pytest.fixture(scope="module", params=["value", "implicit"])
def head(request):
    return request.param


@pytest.fixture(scope="module")
def single(base, labels, head, tmp_path_factory):
    """The folder of the same training in one process."""
    out = tmp_path_factory.mktemp("single") / "one"
    recipe = RecipeConfig(head_first=int(head == "value"))
    train(
        small_config(
            base,
            labels,
            out,
            head=head,
            epochs=2,
            patience=0,
            batch_tokens=300,
            publish=PublishConfig(track="jsonl"),
            recipe=recipe,
        )
    )
    return out


def assert_same_training(one, two):
    curves = [[(e.step, e.metrics) for e in read_metrics(folder)] for folder in (one, two)]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    for (_, ours), (_, theirs) in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=4e-4), name
    losses = [load_metadata(folder).training["held_out_loss"] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_and_weights_of_one(
    single, base, labels, head, tmp_path, repository
):
    codes, errors = train_in_two_processes(repository, base, labels, tmp_path / "two", "ddp", head)
    assert codes == [0, 0], errors
    assert_same_training(single, tmp_path / "two")


@pytest.mark.slow
def test_a_sharded_run_interrupted_and_continued_has_the_loss_curve_and_weights_of_one(
    single, base, labels, head, tmp_path, repository
):
    out = tmp_path / "two"
    codes, errors = train_in_two_processes(
        repository, base, labels, out, "fsdp2", head, stop_after=2
    )
    assert codes == [7, 7], errors
    assert (out / STATE / "latest.pt").is_file()
    codes, errors = train_in_two_processes(repository, base, labels, out, "fsdp2", head)
    assert codes == [0, 0], errors
    assert_same_training(single, out)
