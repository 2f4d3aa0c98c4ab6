import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prm.losses import binomial_nll, ranking_loss, soft_cross_entropy


def test_binomial_nll_of_hand_computed_counts():
    # p = 0.75: 3 of 4 right, and 0 of 2 right.
    z = math.log(3)
    loss = binomial_nll(
        torch.tensor([z, z]),
        correct_P=torch.tensor([3.0, 0.0]),
        rollouts_P=torch.tensor([4.0, 2.0]),
    )
    expected = -(3 * math.log(0.75) + 1 * math.log(0.25)) - 2 * math.log(0.25)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_binomial_nll_stays_finite_for_extreme_logits():
    loss = binomial_nll(
        torch.tensor([1e4, -1e4]),
        correct_P=torch.tensor([0.0, 3.0]),
        rollouts_P=torch.tensor([2.0, 3.0]),
    )
    assert loss.item() == pytest.approx(2e4 + 3e4)


def test_more_rollouts_weigh_more():
    z = torch.zeros(2, requires_grad=True)
    binomial_nll(
        z, correct_P=torch.tensor([4.0, 64.0]), rollouts_P=torch.tensor([4.0, 64.0])
    ).backward()
    assert z.grad is not None
    assert z.grad[1] / z.grad[0] == pytest.approx(16)


def test_masked_positions_have_neither_loss_nor_gradient():
    z = torch.tensor([5.0, -3.0], requires_grad=True)
    loss = binomial_nll(z, correct_P=torch.zeros(2), rollouts_P=torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert z.grad.tolist() == [0, 0]


def test_binomial_nll_is_least_at_the_measured_rate():
    correct, rollouts = torch.tensor([3.0]), torch.tensor([8.0])
    at = {
        p: binomial_nll(
            torch.tensor([math.log(p / (1 - p))]), correct_P=correct, rollouts_P=rollouts
        ).item()
        for p in (0.2, 0.375, 0.6)
    }
    assert min(at, key=lambda p: at[p]) == 0.375


def test_soft_cross_entropy_of_hand_computed_targets():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [9.0, -9.0]])
    loss = soft_cross_entropy(
        logits, targets_P=torch.tensor([0.6, 1.0, 0.5]), weights_P=torch.tensor([1.0, 1.0, 0.0])
    )
    expected = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25)) + math.log(2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@given(
    rows=st.lists(
        st.tuples(st.floats(-8, 8), st.integers(0, 16), st.floats(0, 1)), min_size=1, max_size=12
    ),
    cut=st.integers(0, 12),
)
def test_two_class_loss_on_counts_equals_the_binomial_loss(rows, cut):
    # With logits (0, z), n copies of a soft target c/n have the binomial likelihood, and sums
    # over parts equal the sum over the whole.
    z = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    n = torch.tensor([float(r[1]) for r in rows], dtype=torch.float64)
    y = torch.tensor([r[2] for r in rows], dtype=torch.float64)
    pairs = torch.stack([torch.zeros_like(z), z], dim=1)
    binomial = binomial_nll(z, correct_P=y * n, rollouts_P=n)
    parts = [
        soft_cross_entropy(pairs[part], targets_P=y[part], weights_P=n[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert sum(p.item() for p in parts) == pytest.approx(binomial.item(), abs=1e-9)


def rank(logits, targets, *, weights=None, rows=None, margin=4.0):
    return ranking_loss(
        torch.as_tensor(logits, dtype=torch.double),
        targets_P=torch.tensor(targets, dtype=torch.double),
        weights_P=torch.ones(len(targets)) if weights is None else torch.tensor(weights),
        rows_P=torch.zeros(len(targets), dtype=torch.long) if rows is None else torch.tensor(rows),
        margin=margin,
    ).item()


def test_ranking_loss_by_hand():
    # Right 1, wrong -2, right 3; zeta 1. The wrong one weighs e^(-2+1) in every denominator.
    w = math.exp(-1)
    zero = -math.log(1 / (1 + w))
    first = -math.log(math.e / (1 + math.e + w))
    third = -math.log(math.exp(3) / (1 + math.e + math.exp(3) + w))
    found = rank([1.0, -2.0, 3.0], [1.0, 0.2, 0.5], margin=1.0)
    assert found == pytest.approx(zero + first + third, abs=1e-12)


def test_ranking_loss_of_only_wrong_or_no_labels():
    assert rank([1.0, 2.0], [0.0, 0.0], margin=0.0) == pytest.approx(
        math.log(1 + math.e + math.exp(2))
    )
    assert rank([1.0, 2.0], [0.0, 1.0], weights=[0.0, 0.0]) == 0


def test_ranking_loss_compares_the_steps_of_one_trajectory_only():
    a, b = ([1.0, -2.0, 3.0], [1.0, 0.0, 1.0]), ([0.5, 0.1], [0.0, 1.0])
    together = rank(a[0] + b[0], a[1] + b[1], rows=[0, 0, 0, 4, 4])
    assert together == pytest.approx(rank(*a) + rank(*b), abs=1e-12)


@given(
    logits=st.lists(st.floats(-30, 30), min_size=2, max_size=6),
    marks=st.lists(st.booleans(), min_size=6, max_size=6),
    which=st.integers(0, 5),
)
def test_ranking_loss_is_finite_falls_with_no_wrong_score_and_not_below_zero(logits, marks, which):
    targets = [float(m) for m in marks[: len(logits)]]
    z = torch.tensor(logits, dtype=torch.double, requires_grad=True)
    loss = ranking_loss(
        z,
        targets_P=torch.tensor(targets),
        weights_P=torch.ones(len(targets)),
        rows_P=torch.zeros(len(targets), dtype=torch.long),
    )
    loss.backward()
    assert loss.item() >= 0
    assert torch.isfinite(z.grad).all()
    wrong = torch.tensor(targets) == 0
    assert (z.grad[wrong] >= 0).all()  # raising a wrong score never helps
    last_right = max((i for i, t in enumerate(targets) if t), default=None)
    if last_right is not None:
        assert z.grad[last_right] <= 1e-12  # raising the last right score never harms
