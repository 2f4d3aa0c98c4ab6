import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from prm.metrics import (
    METRICS,
    Items,
    brier,
    ece,
    equal_mass_bins,
    estimate,
    estimate_difference,
    make_items,
    nll,
)


def items_of(scores, targets, tasks=None, weights=None):
    tasks = tasks or [str(i) for i in range(len(scores))]
    return make_items(list(scores), list(targets), tasks, weights)


def test_auroc_counts_ties_as_half():
    # Pairs (right, wrong): 0.8>0.5, 0.8>0.2, 0.5=0.5, 0.5>0.2 -> 3.5 of 4.
    items = items_of([0.8, 0.5, 0.5, 0.2], [1, 1, 0, 0])
    assert estimate("auroc", items).value == pytest.approx(3.5 / 4)


def test_average_precision_of_a_hand_computed_ranking():
    # Right at ranks 1 and 3: (1/1 + 2/3) / 2.
    items = items_of([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    assert estimate("average_precision", items).value == pytest.approx((1 + 2 / 3) / 2)


def test_brier_and_nll_use_soft_targets_and_weights():
    items = items_of([0.5, 0.8], [0.25, 1.0], weights=[3.0, 1.0])
    assert brier(items) == pytest.approx((3 * 0.0625 + 0.04) / 4)
    assert nll(items) == pytest.approx((3 * np.log(2) - np.log(0.8)) / 4)


def test_ece_is_the_weighted_gap_of_bins():
    # Two groups of equal scores, far more than a bin each: gaps |0.2-0.5| and |0.9-0.8|.
    scores = [0.2] * 10 + [0.9] * 10
    targets = [1, 0] * 5 + [1] * 8 + [0] * 2
    assert ece(items_of(scores, targets)) == pytest.approx(0.5 * 0.3 + 0.5 * 0.1)


def test_perfectly_calibrated_scores_have_no_ece():
    scores = [0.25] * 8 + [0.75] * 8
    targets = [1, 0, 0, 0] * 2 + [1, 1, 1, 0] * 2
    assert ece(items_of(scores, targets)) == pytest.approx(0)


def test_bins_hold_equally_many_items():
    scores = np.random.default_rng(0).random(1500)
    assert np.bincount(equal_mass_bins(scores)).tolist() == [100] * 15


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(4, 25))
def test_weighted_forms_equal_the_libraries(data, size):
    level = st.integers(0, 5)  # few levels, so ties are common
    scores = np.array(data.draw(st.lists(level, min_size=size, max_size=size))) / 5
    targets = np.array(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), float)
    draws = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), float)
    items = items_of(scores, targets)
    repeated = np.repeat(np.arange(size), draws.astype(int))
    found = {name: m.weighted(items, draws[None])[0] for name, m in METRICS.items() if draws.sum()}
    if len(np.unique(targets[repeated])) == 2:
        assert found["auroc"] == pytest.approx(
            roc_auc_score(targets, scores, sample_weight=draws), abs=1e-9
        )
        assert found["average_precision"] == pytest.approx(
            average_precision_score(targets, scores, sample_weight=draws), abs=1e-9
        )
        if np.ptp(scores[repeated]) > 0:
            assert found["spearman"] == pytest.approx(
                spearmanr(scores[repeated], targets[repeated]).statistic, abs=1e-9
            )
    elif draws.sum():
        assert np.isnan(found["auroc"])


@pytest.mark.parametrize(("targets", "reason"), [([1, 1, 1], "same outcome"), ([], "no items")])
def test_undefined_metrics_have_a_reason_instead_of_a_number(targets, reason):
    found = estimate("auroc", items_of([0.1, 0.2, 0.3][: len(targets)], targets))
    assert found.value is None
    assert reason in (found.reason or "")


def test_a_constant_score_has_no_rank_correlation():
    found = estimate("spearman", items_of([0.5] * 5, [0, 0.2, 0.4, 0.6, 1]))
    assert found.value is None
    assert "scores are equal" in (found.reason or "")


def test_one_task_gives_a_value_without_interval():
    found = estimate("brier", items_of([0.1, 0.2], [0, 1], tasks=["a", "a"]))
    assert found.value is not None
    assert (found.low, found.high) == (None, None)
    assert "one task" in (found.reason or "")


def correlated_items(num_tasks: int, copies: int) -> Items:
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, num_tasks)
    scores = np.clip(0.5 + 0.2 * (targets - 0.5) + 0.2 * rng.standard_normal(num_tasks), 0, 1)
    tasks = [str(i) for i in range(num_tasks) for _ in range(copies)]
    return items_of(np.repeat(scores, copies), np.repeat(targets, copies), tasks=tasks)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_copies_within_a_task_do_not_narrow_the_interval(name):
    once, often = correlated_items(60, 1), correlated_items(60, 10)
    widths = [e.high - e.low for e in (estimate(name, once), estimate(name, often))]
    assert widths[1] == pytest.approx(widths[0], rel=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(150):
        items = items_of(np.full(80, 0.3), rng.integers(0, 2, 80).astype(float))
        found = estimate("brier", items, resamples=300, seed=trial)
        hits += found.low <= 0.5 * 0.49 + 0.5 * 0.09 <= found.high
    assert 0.88 <= hits / 150 <= 1.0


def test_the_same_seed_gives_the_same_interval():
    items = correlated_items(30, 2)
    assert estimate("auroc", items, seed=3) == estimate("auroc", items, seed=3)
    assert estimate("auroc", items, seed=3).low != estimate("auroc", items, seed=4).low


def test_the_difference_of_equal_scores_is_zero_without_spread():
    rng = np.random.default_rng(0)
    scores, targets = rng.random(60), rng.integers(0, 2, 60)
    items = make_items(scores, targets, [str(n // 3) for n in range(60)])
    found = estimate_difference("auroc", items, items)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_interval_of_a_difference_is_of_pairs():
    # Scores that differ by little noise: each alone is uncertain, their difference is not.
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, 300)
    scores = targets + rng.normal(0, 2, 300)
    tasks = [str(n // 3) for n in range(300)]
    one, two = (make_items(s, targets, tasks) for s in (scores, scores + rng.normal(0, 0.1, 300)))
    single, found = estimate("auroc", one), estimate_difference("auroc", one, two)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 0.2 * (single.high - single.low)


def test_a_difference_of_something_undefined_has_its_reason():
    items = make_items([0.1, 0.2], [1, 1], ["a", "b"])
    assert estimate_difference("auroc", items, items).reason == estimate("auroc", items).reason
    single = make_items([0.1, 0.2], [1, 0], ["a", "a"])
    found = estimate_difference("auroc", single, single)
    assert (found.value, found.low) == (0, None)
    assert "one task only" in found.reason
