import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.estimators import ESTIMATORS, hard, label_steps, smoothed, soft, usable_counts
from trajectory.records import Sampling, StepEvidence

LEVELS = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


@st.composite
def counts(draw):
    n = draw(st.integers(1, 200))
    return n, draw(st.integers(0, n))


def evidence(rollouts, correct, truncated, failed):
    return StepEvidence(
        trajectory_id="t",
        rollouts=rollouts,
        correct=correct,
        truncated=truncated,
        failed=failed,
        completer="m",
        sampling=Sampling(),
        tokens=0,
    )


def test_soft_is_the_share_with_wilsons_interval():
    # z^2 = 3.841459: middle .490091, half width 1.959964 * sqrt(.0234375 + .0150057) = .384289,
    # both over 1 + z^2 / 8 = 1.480182.
    value, low, high = soft(8, 2, 0.95)
    assert value == 0.25
    assert low == pytest.approx(0.105802 / 1.480182, abs=2e-6)
    assert high == pytest.approx(0.874380 / 1.480182, abs=2e-6)


@pytest.mark.parametrize(("n", "bound"), [(8, 0.32), (16, 0.19), (32, 0.11), (64, 0.06)])
def test_upper_wilson_bound_of_no_success(n, bound):
    assert soft(n, 0, 0.95).high == pytest.approx(bound, abs=0.006)


def test_smoothed_is_the_jeffreys_posterior():
    # Beta(1/2, 1/2 + n) for c = 0, Beta(3/2, 3/2) for c = 1 of 2 (symmetric about one half).
    assert smoothed(8, 0, 0.9).value == pytest.approx(0.5 / 9)
    value, low, high = smoothed(2, 1, 0.9)
    assert value == 0.5
    assert low + high == pytest.approx(1)
    # At x = sin^2(theta) the CDF of Beta(3/2, 3/2) is (2 theta - sin(4 theta) / 2) / pi.
    theta = math.asin(math.sqrt(low))
    assert (2 * theta - math.sin(4 * theta) / 2) / math.pi == pytest.approx(0.05, abs=1e-9)


def test_smoothed_interval_reaches_the_edge_it_stands_at():
    assert smoothed(8, 0, 0.9).low == 0
    assert smoothed(8, 8, 0.9).high == 1
    assert smoothed(8, 1, 0.9).low > 0


def test_hard_needs_one_success():
    assert hard(64, 0, 0.9) == (0, 0, 1)
    assert hard(64, 1, 0.9) == (1, 1, 1)


@given(counts(), LEVELS)
def test_soft_interval_is_symmetric_in_right_and_wrong(pair, level):
    n, c = pair
    one, other = soft(n, c, level), soft(n, n - c, level)
    assert one.low == pytest.approx(1 - other.high, abs=1e-12)


@pytest.mark.parametrize(("name", "least"), [("soft", 0.93), ("smoothed", 0.93)])
def test_interval_covers_the_truth_at_its_level(name, least):
    """Averaged over the true value; pointwise, 95 % intervals of a binomial may dip below."""
    draw, trials, hits = Random(7), 4000, 0
    cached = {c: ESTIMATORS[name](16, c, 0.95) for c in range(17)}
    for _ in range(trials):
        truth = draw.random()
        found = cached[sum(draw.random() < truth for _ in range(16))]
        hits += found.low <= truth <= found.high
    assert least <= hits / trials <= 0.98


@pytest.mark.parametrize("truth", [0.02, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["soft", "smoothed"])
def test_coverage_never_dips_far_at_a_single_value(name, truth):
    """Exact: the probability of the counts whose 90 % interval holds the truth."""
    covered = sum(
        math.comb(16, c) * truth**c * (1 - truth) ** (16 - c)
        for c in range(17)
        if ESTIMATORS[name](16, c, 0.9).low <= truth <= ESTIMATORS[name](16, c, 0.9).high
    )
    assert covered >= 0.82


def test_truncated_rollouts_count_as_wrong_or_not_at_all():
    found = evidence((8, 8), (2, 0), (2, 8), (1, 0))
    assert usable_counts(found, "wrong") == ((7, 2), (8, 0))
    assert usable_counts(found, "exclude") == ((5, 2), (0, 0))


def test_label_is_unknown_where_no_rollout_is_usable():
    labels = label_steps(evidence((4, 4, 4), (2, 0, 0), (0, 4, 0), (0, 0, 4)), truncated="exclude")
    assert labels.values == (0.5, None, None)
    assert labels.low[1:] == labels.high[1:] == (None, None)
    assert labels.estimator == "soft"


def test_a_wider_level_gives_a_wider_interval():
    narrow = label_steps(evidence((8,), (3,), (0,), (0,)), "smoothed", level=0.8)
    wide = label_steps(evidence((8,), (3,), (0,), (0,)), "smoothed", level=0.95)
    assert wide.low[0] < narrow.low[0] < narrow.values[0] < narrow.high[0] < wide.high[0]
