import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from prm.calibrate import Calibration, apply, cross_fit, fit


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


def test_isotonic_pools_neighbours_that_are_in_the_wrong_order():
    # Ten positions at each of four log-odds: rates 0.2, 0.6, 0.4, 0.9 of weights 1, 1, 3, 1. The
    # middle two are pooled: (0.6 * 1 + 0.4 * 3) / 4 = 0.45.
    z = np.repeat([-2.0, -1.0, 1.0, 2.0], 10)
    y = np.repeat([0.2, 0.6, 0.4, 0.9], 10)
    w = np.repeat([1.0, 1.0, 3.0, 1.0], 10)
    found = fit(z, y, w, method="isotonic")
    assert found.knots == (-2, -1, 1, 2)
    assert found.levels == pytest.approx((0.2, 0.45, 0.45, 0.9))
    assert apply(found, np.array([-1.0, 0.0, 1.0])) == pytest.approx([0.45] * 3)  # a tie
    assert apply(found, np.array([-9.0, 1.5, 9.0])) == pytest.approx([0.2, 0.675, 0.9])


def test_isotonic_never_says_never():
    z = np.linspace(-2, 2, 60)
    found = fit(z, (z > 0).astype(float), np.ones(60), method="isotonic")
    assert (min(found.levels), max(found.levels)) == pytest.approx((1 / 62, 61 / 62))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), method=st.sampled_from(["platt", "isotonic", "none"]))
def test_no_method_ever_swaps_two_scores(seed, method):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, 80)
    n = rng.integers(1, 9, 80).astype(float)
    found = fit(z, rng.binomial(n.astype(int), expit(np.sin(3 * z))) / n, n, method=method)
    p = apply(found, np.linspace(-9, 9, 200))
    assert np.all(np.diff(p) >= 0)
    assert np.all((p >= 0) & (p <= 1))


def test_cross_fitting_shows_what_the_sample_hides():
    rng = np.random.default_rng(2)
    z = rng.normal(0, 1, 400)
    y = (rng.random(400) < expit(z)).astype(float)
    tasks = [f"t{i // 4}" for i in range(400)]
    found = fit(z, y, np.ones(400), method="isotonic", groups=tasks)
    assert found.ece_after < 0.01 < found.ece_cross_fitted
    assert found.nll_after < found.nll_before < found.nll_cross_fitted
    mended = fit(4 * z, y, np.ones(400), method="platt", groups=tasks)
    assert mended.ece_cross_fitted < 0.6 * mended.ece_before


def test_cross_fitting_keeps_a_task_out_of_its_own_map():
    # Task a is all right, task b all wrong, at the same log-odds: each is told the other's rate.
    z, y = np.zeros(80), np.repeat([1.0, 0.9, 0.0, 0.1], 20)
    tasks = ["a"] * 40 + ["b"] * 40
    p = cross_fit(z, y, np.ones(80), method="isotonic", groups=tasks)
    assert p == pytest.approx(np.repeat([0.05, 0.95], 40))
    assert cross_fit(z, y, np.ones(80), method="platt", groups=["a"] * 80) is None


def test_none_measures_and_changes_nothing():
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2, 200)
    found = fit(z, expit(z / 2), np.ones(200), method="none", groups=[str(i) for i in range(200)])
    assert apply(found, z) == pytest.approx(expit(z))
    assert found.ece_before == found.ece_after == found.ece_cross_fitted > 0.01


def test_a_calibration_of_schema_1_0_still_loads():
    old = '{"scale": 0.5, "shift": 0.1, "fitted": true, "reason": null, "positions": 50}'
    assert Calibration.model_validate_json(old).method == "platt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (0.6, 0.4)}, "must not decrease"),
        ({"knots": (1.0, 1.0)}, "must increase"),
        ({"levels": (0.5,)}, "2 knots with 1"),
        ({"levels": (0.5, 1.0)}, "within"),
        ({"method": "platt"}, "belong to"),
    ],
)
def test_a_map_that_would_swap_scores_is_refused(changes, message):
    good = {"method": "isotonic", "fitted": True, "knots": (0.0, 1.0), "levels": (0.4, 0.6)}
    with pytest.raises(ValueError, match=message):
        Calibration.model_validate(good | changes)
