"""Checkpoints: exact restoration, two kept, the old one safe when the disk gives out."""

import random
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from policy.learner import make_optimizer
from policy.state import restore_state, save_state
from trajectory.errors import InputError


def make(seed, width=8):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))
    return model, make_optimizer(model.parameters(), 1e-2)


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = model(torch.randn(3, 4)).square().sum() * random.random() * np.random.rand()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def save(folder, step, pair):
    return save_state(folder, step=step, model=pair[0], optimizer=pair[1], run_id="r")


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    whole = make(0)
    train(*whole, 3)
    save(tmp_path, 3, whole)
    train(*whole, 4)
    again = make(1)
    restored = restore_state(tmp_path, model=again[0], optimizer=again[1])
    assert (restored.step, restored.run_id) == (3, "r")
    train(*again, 4)
    assert torch.equal(weights(whole[0]), weights(again[0]))


def test_the_newest_counts_and_two_are_kept(tmp_path):
    pair = make(0)
    for step in (1, 2, 10):
        save(tmp_path, step, pair)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002.pt", "step-000010.pt"]
    assert restore_state(tmp_path, model=pair[0], optimizer=pair[1]).step == 10


def test_parameters_without_a_gradient_are_not_saved(tmp_path):
    model, _ = make(0)
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model[1].parameters(), 1e-2)
    path = save_state(tmp_path, step=1, model=model, optimizer=optimizer, run_id="")
    saved = torch.load(path, weights_only=True)["parameters"]
    assert set(saved) == {"1.weight", "1.bias"}


def test_nothing_to_restore_is_step_zero(tmp_path):
    model, optimizer = make(0)
    assert restore_state(tmp_path / "none", model=model, optimizer=optimizer) is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1, make(0))
    model, optimizer = make(0, width=9)
    with pytest.raises(InputError, match="another model"):
        restore_state(tmp_path, model=model, optimizer=optimizer)


@contextmanager
def files_up_to(size):
    """Make every write beyond a file size fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path):
    pair = make(0)
    for step in (1, 2):
        save(tmp_path, step, pair)
    before = weights(pair[0])
    train(*pair, 1)
    with files_up_to(2000), pytest.raises((OSError, RuntimeError)):
        save(tmp_path, 3, pair)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001.pt", "step-000002.pt"]
    again = make(1)
    assert restore_state(tmp_path, model=again[0], optimizer=again[1]).step == 2
    assert torch.equal(weights(again[0]), before)
