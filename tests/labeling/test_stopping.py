from functools import partial
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.estimators import label_steps
from labeling.stopping import StoppingRule, stopped, stopped_or_unknown
from labeling.strategies import Adaptive, Bisect
from trajectory.records import Sampling, StepEvidence


def every(batch, most=100):
    return frozenset(range(batch, most, batch))


def rule_of(strategy):
    return StoppingRule(goes_on=strategy.goes_on, ends=frozenset(strategy.batch_ends()))


RULES = {
    "first success, one by one": (StoppingRule(goes_on=lambda n, c: c == 0, ends=every(1)), 6),
    "first success, in threes": (StoppingRule(goes_on=lambda n, c: c == 0, ends=every(3)), 9),
    "two of a kind": (StoppingRule(goes_on=lambda n, c: abs(n - 2 * c) < 2, ends=every(1)), 8),
    "adaptive": (rule_of(Adaptive(rollouts=4, most=10, batch=2)), 10),
    "bisect": (rule_of(Bisect(rollouts=8, batch=4)), 8),
}


def expectation(rule, most, probability):
    """Sum over all result sequences of the rule: the mean of the estimate, and of c / n."""
    mean = naive = 0.0
    for results in product((0, 1), repeat=most):
        n = c = 0
        while n < most and (n not in rule.ends or rule.goes_on(n, c)):
            c += results[n]
            n += 1
        weight = probability ** sum(results) * (1 - probability) ** (most - sum(results))
        mean += weight * stopped(n, c, 0.9, rule).value
        naive += weight * c / n
    return mean, naive


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("probability", [0.05, 0.4, 0.9])
def test_the_estimate_is_unbiased_over_every_way_sampling_can_go(name, probability):
    rule, most = RULES[name]
    mean, _ = expectation(rule, most, probability)
    assert mean == pytest.approx(probability, abs=1e-12)


def test_the_share_of_successes_is_not():
    rule, most = RULES["first success, one by one"]
    assert expectation(rule, most, 0.4)[1] > 0.45


def test_by_hand():
    # Stop at a success, asked after every second rollout. To n = 4, c = 1 lead 0001 and 0010, to
    # c = 2 only 0011; none begins with a success. To n = 2, c = 1 lead 01 and 10.
    rule = StoppingRule(goes_on=lambda n, c: c == 0, ends=every(2))
    assert stopped(4, 1, 0.9, rule).value == 0
    assert stopped(4, 2, 0.9, rule).value == 0
    assert stopped(2, 1, 0.9, rule).value == 0.5


def test_counts_that_the_rule_cannot_lead_to_are_refused():
    rule = StoppingRule(goes_on=lambda n, c: c == 0, ends=every(1))
    with pytest.raises(ValueError, match="cannot lead to n = 5, c = 3"):
        stopped(5, 3, 0.9, rule)
    counts = {
        "rollouts": (5, 5, 5),
        "correct": (3, 1, 5),
        "truncated": (0,) * 3,
        "failed": (0,) * 3,
    }
    evidence = StepEvidence(
        trajectory_id="a", completer="m", sampling=Sampling(), tokens=9, **counts
    )
    special = partial(stopped_or_unknown, rule=rule)
    assert label_steps(evidence, "stopped", special=special).values == (None, 0.0, 1.0)


@given(st.integers(1, 30), st.data())
def test_without_a_rule_it_is_the_share_of_successes(n, data):
    c = data.draw(st.integers(0, n))
    value, low, high = stopped(n, c, 0.9, StoppingRule(goes_on=lambda n, c: True, ends=every(4)))
    assert value == pytest.approx(c / n)
    assert 0 <= low <= value <= high <= 1
