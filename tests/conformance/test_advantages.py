"""Every advantage estimator against the exact policy gradient of an enumerated process.

The process: at each of three turns the policy continues or stops; after continuing it sees a
random observation. Success depends on when it stopped and on what it saw. So the policy chooses
the number of steps, which is what breaks estimators that centre step rewards before summing them.
Expectations over groups are sums over all combinations of trajectories: no sampling noise.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest

from policy.advantages import ADVANTAGES, Group

TURNS = 3
RNG = np.random.default_rng(7)
# A history is the tuple of observations so far; the last turn always stops.
STATES = [h for n in range(TURNS) for h in itertools.product((0, 1), repeat=n)]
FREE = [h for h in STATES if len(h) < TURNS - 1]
THETA = {h: float(t) for h, t in zip(FREE, RNG.normal(size=len(FREE)), strict=True)}
SUCCESS = {h: 0.15 + 0.3 * len(h) + 0.2 * sum(h) / max(len(h), 1) - 0.1 for h in STATES}
OBSERVE_ONE = 0.35


@dataclass(frozen=True)
class Leaf:
    """One possible trajectory."""

    probability: float
    states: tuple  # history before each step
    outcome: float
    scores: np.ndarray  # (S, len(FREE)): gradient of log pi of each step's action


def continue_probability(history):
    return 1 / (1 + math.exp(-THETA[history]))


def score(history, continued):
    gradient = np.zeros(len(FREE))
    if history in THETA:
        gradient[FREE.index(history)] = float(continued) - continue_probability(history)
    return gradient


def leaves():
    found = []
    for final in STATES:
        probability, scores = 1.0, []
        for n in range(len(final)):
            seen = OBSERVE_ONE if final[n] else 1 - OBSERVE_ONE
            probability *= continue_probability(final[:n]) * seen
            scores.append(score(final[:n], True))
        if final in THETA:
            probability *= 1 - continue_probability(final)
        scores.append(score(final, False))
        states = tuple(final[:n] for n in range(len(final) + 1))
        for outcome in (0.0, 1.0):
            judged = SUCCESS[final] if outcome else 1 - SUCCESS[final]
            found.append(Leaf(probability * judged, states, outcome, np.array(scores)))
    return found


LEAVES = leaves()


def true_gradient(reward=lambda leaf: leaf.outcome):
    return sum(leaf.probability * reward(leaf) * leaf.scores.sum(0) for leaf in LEAVES)


def expected_gradient(advantages_of, size):
    """Return E[1/G sum_i sum_k grad log pi(a_ik) A_ik] over all groups of a size."""
    total = np.zeros(len(FREE))
    for members in itertools.product(LEAVES, repeat=size):
        weight = math.prod(m.probability for m in members)
        for leaf, steps in zip(members, advantages_of(members), strict=True):
            total += weight * (np.asarray(steps) @ leaf.scores) / size
    return total


def group_of(members, values=None):
    tables = None
    if values is not None:
        tables = tuple(
            np.array([*(values[h] for h in m.states), values["end", m.states[-1], m.outcome]])
            for m in members
        )
    return Group(
        outcomes=np.array([m.outcome for m in members]),
        num_steps=tuple(len(m.states) for m in members),
        values=tables,
    )


def arbitrary_values(seed):
    rng = np.random.default_rng(seed)
    keys = [*STATES, *(("end", h, o) for h in STATES for o in (0.0, 1.0))]
    return {key: float(v) for key, v in zip(keys, rng.random(len(keys)), strict=True)}


def exact_values():
    values = {}
    for h in reversed(STATES):
        stop = SUCCESS[h]
        if h in THETA:
            ahead = (1 - OBSERVE_ONE) * values[*h, 0] + OBSERVE_ONE * values[*h, 1]
            p = continue_probability(h)
            values[h] = (1 - p) * stop + p * ahead
        else:
            values[h] = stop
    return values | {("end", h, o): o for h in STATES for o in (0.0, 1.0)}


def relative_error(estimate, truth):
    return float(np.linalg.norm(estimate - truth) / np.linalg.norm(truth))


def test_the_process_is_a_distribution_and_its_gradient_is_the_derivative():
    assert sum(leaf.probability for leaf in LEAVES) == pytest.approx(1)
    truth = true_gradient()
    for index, state in enumerate(FREE):
        kept, width = THETA[state], 1e-5
        sides = []
        for step in (width, -width):
            THETA[state] = kept + step
            sides.append(sum(leaf.probability * leaf.outcome for leaf in leaves()))
        THETA[state] = kept
        assert (sides[0] - sides[1]) / (2 * width) == pytest.approx(truth[index], abs=1e-9)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [n for n, e in ADVANTAGES.items() if e.unbiased])
def test_estimators_tagged_unbiased_match_the_exact_gradient_for_any_values(name, size):
    estimator = ADVANTAGES[name]
    assert estimator.is_unbiased(1.0)
    for seed in range(2):
        values = arbitrary_values(seed) if estimator.needs_values else None
        found = expected_gradient(lambda m, v=values: estimator.function(group_of(m, v), 1.0), size)
        np.testing.assert_allclose(found, true_gradient(), atol=1e-12)


@pytest.mark.parametrize("name", [n for n, e in ADVANTAGES.items() if e.needs_values])
def test_lambda_below_one_is_tagged_biased_and_is_biased_for_wrong_values(name):
    estimator = ADVANTAGES[name]
    values = arbitrary_values(0)
    found = expected_gradient(lambda m: estimator.function(group_of(m, values), 0.0), 2)
    assert not estimator.is_unbiased(0.0)
    assert relative_error(found, true_gradient()) > 0.1


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_potential_with_exact_values_is_unbiased_at_any_lambda(gae_lambda):
    values = exact_values()
    found = expected_gradient(
        lambda m: ADVANTAGES["potential"].function(group_of(m, values), gae_lambda), 2
    )
    np.testing.assert_allclose(found, true_gradient(), atol=1e-12)


def test_exact_values_lower_the_variance_below_that_of_the_outcome():
    def second_moment(advantages_of):
        total = 0.0
        for members in itertools.product(LEAVES, repeat=2):
            weight = math.prod(m.probability for m in members)
            gradient = sum(
                np.asarray(steps) @ leaf.scores / 2
                for leaf, steps in zip(members, advantages_of(members), strict=True)
            )
            total += weight * float(gradient @ gradient)
        return total

    values = exact_values()
    outcome = second_moment(lambda m: ADVANTAGES["outcome"].function(group_of(m), 1.0))
    for gae_lambda in (1.0, 0.0):
        potential = second_moment(
            lambda m, lam=gae_lambda: ADVANTAGES["potential"].function(group_of(m, values), lam)
        )
        assert potential < 0.75 * outcome


def test_centring_step_rewards_before_summing_them_would_be_caught():
    step_reward = -0.2

    def rewards(leaf):
        return np.array([step_reward] * (len(leaf.states) - 1) + [leaf.outcome])

    def centred_then_summed(members):
        pooled = np.concatenate([rewards(m) for m in members]).mean()
        return [np.cumsum((rewards(m) - pooled)[::-1])[::-1] for m in members]

    def summed_then_centred(members):
        totals = np.array([rewards(m).sum() for m in members])
        others = (totals.sum() - totals) / (len(members) - 1)
        to_go = [np.cumsum(rewards(m)[::-1])[::-1] for m in members]
        return [g - b for g, b in zip(to_go, others, strict=True)]

    truth = true_gradient(lambda leaf: rewards(leaf).sum())
    assert relative_error(expected_gradient(centred_then_summed, 2), truth) > 0.5
    np.testing.assert_allclose(expected_gradient(summed_then_centred, 2), truth, atol=1e-12)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_every_estimator_gives_one_finite_number_per_step_and_leaves_its_input_alone(name):
    rng = np.random.default_rng(3)
    steps = (1, 4, 0, 2)
    values = tuple(rng.random(s + 1) for s in steps)
    group = Group(outcomes=np.array([1.0, 0.0, 0.0, 1.0]), num_steps=steps, values=values)
    before = [v.copy() for v in values]
    result = ADVANTAGES[name].function(group, 1.0)
    assert [a.shape for a in result] == [(s,) for s in steps]
    assert all(np.all(np.isfinite(a)) for a in result)
    assert all(np.array_equal(a, b) for a, b in zip(values, before, strict=True))
    assert np.array_equal(group.outcomes, [1.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_every_estimator_commutes_with_reordering_the_group(name):
    rng = np.random.default_rng(4)
    steps, order = (3, 1, 2), [2, 0, 1]
    values = [rng.random(s + 1) for s in steps]
    outcomes = np.array([1.0, 0.0, 0.5])

    def run(indices):
        group = Group(
            outcomes=outcomes[indices],
            num_steps=tuple(steps[i] for i in indices),
            values=tuple(values[i] for i in indices),
        )
        return ADVANTAGES[name].function(group, 1.0)

    plain, moved = run([0, 1, 2]), run(order)
    for position, index in enumerate(order):
        np.testing.assert_allclose(moved[position], plain[index])


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_the_smallest_group_is_the_one_the_table_states(name):
    estimator = ADVANTAGES[name]

    def run(size):
        group = Group(
            outcomes=np.ones(size), num_steps=(1,) * size, values=(np.full(2, 0.5),) * size
        )
        return estimator.function(group, 1.0)

    assert len(run(estimator.min_group)) == estimator.min_group
    if estimator.min_group > 1:
        with pytest.raises(ValueError, match="at least"):
            run(estimator.min_group - 1)


@pytest.mark.parametrize("name", [n for n, e in ADVANTAGES.items() if e.needs_values])
def test_missing_values_are_an_error_not_zero(name):
    with pytest.raises(ValueError, match="need the PRM's values"):
        ADVANTAGES[name].function(Group(outcomes=np.array([1.0]), num_steps=(1,)), 1.0)


@pytest.mark.parametrize("name", [n for n, e in ADVANTAGES.items() if not e.keeps_equal_outcomes])
def test_a_group_that_may_be_dropped_has_zero_advantages(name):
    group = Group(outcomes=np.ones(3), num_steps=(1, 2, 3))
    assert all(not a.any() for a in ADVANTAGES[name].function(group, 1.0))
