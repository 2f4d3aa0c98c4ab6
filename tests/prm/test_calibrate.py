import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from prm.calibrate import Calibration, apply, fit


def test_it_recovers_the_scale_and_shift_that_made_the_data():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 4000)
    n = np.full(4000, 8.0)
    c = rng.binomial(8, expit(0.5 * z - 1))
    found = fit(z, c / n, n)
    assert found.scale == pytest.approx(0.5, abs=0.02)
    assert found.shift == pytest.approx(-1, abs=0.03)


def test_it_lowers_ece_and_likelihood_of_an_overconfident_model():
    rng = np.random.default_rng(1)
    z = rng.normal(0, 1, 2000)
    y = (rng.random(2000) < expit(z)).astype(float)
    found = fit(4 * z, y, np.ones(2000))
    assert found.ece_before > 0.1
    assert found.ece_after < 0.03
    assert found.nll_after < found.nll_before


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 8), shift=st.floats(-3, 3))
def test_it_never_changes_the_ranking_nor_raises_the_loss(seed, scale, shift):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, 60)
    n = rng.integers(1, 9, 60).astype(float)
    y = rng.binomial(n.astype(int), expit(scale * z + shift)) / n
    found = fit(z, y, n)
    p = apply(found, np.sort(z))
    assert np.all(np.diff(p) >= 0)
    if found.fitted:
        assert found.nll_after <= found.nll_before + 1e-6


@pytest.mark.parametrize(
    ("targets", "reason"),
    [(np.ones(50), "same outcome"), (np.zeros(50), "same outcome"), (np.ones(5), "only 5")],
)
def test_without_enough_to_fit_it_is_the_identity_with_a_reason(targets, reason):
    found = fit(np.linspace(-1, 1, len(targets)), targets, np.ones(len(targets)))
    assert (found.scale, found.shift, found.fitted) == (1, 0, False)
    assert reason in (found.reason or "")


def test_weightless_positions_play_no_part():
    z, y = np.linspace(-2, 2, 60), np.tile([0.0, 1.0, 1.0], 20)
    weights = np.ones(60)
    weights[40:] = 0
    spoilt = y.copy()
    spoilt[40:] = 1 - spoilt[40:]
    assert fit(z, y, weights) == fit(z, spoilt, weights)


def test_separable_data_stay_within_bounds():
    z = np.concatenate([np.linspace(-2, -1, 30), np.linspace(1, 2, 30)])
    found = fit(z, (z > 0).astype(float), np.ones(60))
    assert found.fitted
    assert 0 < found.scale <= 20.001


def test_the_identity_is_the_sigmoid():
    assert apply(Calibration(), np.array([-1.0, 2.0])) == pytest.approx(expit([-1.0, 2.0]))
