import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.backup import Moments, beta_moments, moment_interval, tree_posterior
from labeling.estimators import smoothed
from labeling.strategies import StateView


def state(n, c, parent=None, reached=0, right=0):
    return StateView(
        n=n, c=c, own=n - reached, parent=parent, reached=reached, reached_right=right, tokens=1.0
    )


def sampled_moments(states, draws=400_000):
    """The same posterior by drawing every unknown."""
    rng = np.random.default_rng(0)
    values = [None] * len(states)
    for i in reversed(range(len(states))):
        children = [k for k, s in enumerate(states) if s.parent == i]
        n = states[i].n - sum(states[k].reached for k in children)
        c = states[i].c - sum(states[k].reached_right for k in children)
        q = rng.beta(c + 0.5, n - c + 0.5, draws)
        moves = rng.dirichlet([n + 0.5, *(states[k].reached + 0.5 for k in children)], draws)
        values[i] = moves[:, 0] * q if children else q
        for column, k in enumerate(children, start=1):
            values[i] = values[i] + moves[:, column] * values[k]
    return [(v.mean(), v.var()) for v in values]


def test_by_hand():
    # Four rollouts of the prompt: three come through state 1 (two of them right), one goes
    # elsewhere and fails; one more begins in state 1 and is right.
    states = [state(4, 2), state(4, 3, parent=0, reached=3, right=2)]
    root, child = tree_posterior(states)
    assert child.mean == pytest.approx(3.5 / 5)
    # E[w] = 3.5 / 5 through the child and 1.5 / 5 elsewhere, where q = 0.5 / 2.
    assert root.mean == pytest.approx(0.7 * 0.7 + 0.3 * 0.25)


def test_moments_agree_with_draws_on_a_tree():
    states = [
        state(20, 9),
        state(14, 7, parent=0, reached=10, right=5),
        state(6, 1, parent=0, reached=4, right=1),
        state(9, 6, parent=1, reached=8, right=6),
    ]
    for found, (mean, variance) in zip(
        tree_posterior(states), sampled_moments(states), strict=True
    ):
        assert found.mean == pytest.approx(mean, abs=1e-3)
        assert found.variance == pytest.approx(variance, rel=0.02)


@given(st.integers(0, 60), st.data())
def test_a_state_without_later_ones_has_the_posterior_of_its_counts(n, data):
    c = data.draw(st.integers(0, n))
    (found,) = tree_posterior([state(n, c)])
    assert found == beta_moments(c + 0.5, n - c + 0.5)
    if n:
        assert list(moment_interval(found, 0.9)) == pytest.approx(list(smoothed(n, c, 0.9)))


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.95))
def test_an_interval_holds_its_value(mean, share):
    value, low, high = moment_interval(Moments(mean, share * mean * (1 - mean)), 0.9)
    assert 0 <= low <= value <= high <= 1


def test_backing_up_lowers_the_error_and_its_own_account_of_it_is_right():
    rng, errors, plain, claimed, covered = Random(1), [], [], [], []
    stays, elsewhere, child = 0.8, 0.1, 0.6
    truth = stays * child + (1 - stays) * elsewhere
    for _ in range(400):
        reached = right = c = 0
        for _ in range(30):
            through = rng.random() < stays
            success = rng.random() < (child if through else elsewhere)
            reached += through
            right += through and success
            c += success
        own = sum(rng.random() < child for _ in range(30))
        states = [state(30, c), state(30 + reached, own + right, 0, reached, right)]
        root = tree_posterior(states)[0]
        errors.append((root.mean - truth) ** 2)
        plain.append((c / 30 - truth) ** 2)
        claimed.append(root.variance)
        _, low, high = moment_interval(root, 0.9)
        covered.append(low <= truth <= high)
    assert np.mean(errors) < 0.75 * np.mean(plain)
    assert np.mean(errors) == pytest.approx(np.mean(claimed), rel=0.2)
    assert np.mean(covered) == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 400))
