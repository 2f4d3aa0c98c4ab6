"""Advantages: worked examples and algebraic properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.advantages import (
    Group,
    has_outcome_variance,
    outcome_advantages,
    potential_advantages,
    scale_advantages,
)

UNIT = st.floats(0, 1, allow_subnormal=False)


@st.composite
def groups(draw, min_size=1):
    steps = draw(st.lists(st.integers(1, 5), min_size=min_size, max_size=5))
    first = draw(UNIT)  # all trajectories of a group share the prompt, hence V(s_0)
    values = tuple(np.array([first, *draw(st.lists(UNIT, min_size=s, max_size=s))]) for s in steps)
    outcomes = np.array(draw(st.lists(UNIT, min_size=len(steps), max_size=len(steps))))
    return Group(outcomes=outcomes, num_steps=tuple(steps), values=values)


TWO = Group(
    outcomes=np.array([1.0, 0.0]),
    num_steps=(2, 1),
    values=(np.array([0.4, 0.7, 0.9]), np.array([0.4, 0.1])),
)


def test_outcome_is_the_difference_to_the_mean_of_the_others():
    group = Group(outcomes=np.array([1.0, 0.0, 1.0, 0.0]), num_steps=(2, 1, 0, 3))
    a, b, c, d = outcome_advantages(group)
    assert a == pytest.approx([2 / 3, 2 / 3])
    assert b == pytest.approx([-2 / 3])
    assert c.shape == (0,)
    assert d == pytest.approx([-2 / 3] * 3)


def test_potential_at_lambda_one_trusting_the_prm_alone_is_reward_minus_value():
    first, second = potential_advantages(TWO, 1.0, prior=np.inf)
    assert first == pytest.approx([0.6, 0.3])
    assert second == pytest.approx([-0.4])


def test_potential_at_lambda_zero_is_the_progress_of_each_step():
    first, second = potential_advantages(TWO, 0.0, prior=np.inf)
    assert first == pytest.approx([0.7 - 0.4, 1.0 - 0.7])
    assert second == pytest.approx([0.0 - 0.4])


def test_potential_at_lambda_one_half():
    first, _ = potential_advantages(TWO, 0.5, prior=np.inf)
    assert first == pytest.approx([0.3 + 0.5 * 0.3, 0.3])


def test_potential_shrinks_the_prompt_value_to_the_outcomes_of_the_others():
    # prior 4: b = (4 * 0.4 + R_other) / 5, so 0.32 for the first and 0.52 for the second
    first, second = potential_advantages(TWO, 1.0)
    assert first == pytest.approx([1 - 0.32, 1 - (0.7 - 0.4 + 0.32)])
    assert second == pytest.approx([0 - 0.52])


@given(groups(min_size=2))
def test_outcome_advantages_sum_to_zero_over_the_group(group):
    assert sum(a[0] for a in outcome_advantages(group)) == pytest.approx(0, abs=1e-12)


@given(groups())
def test_potential_at_lambda_one_telescopes(group):
    for values, advantages in zip(group.values, potential_advantages(group), strict=True):
        np.testing.assert_allclose(-np.diff(advantages), np.diff(values[:-1]), atol=1e-12)


@given(groups(), UNIT)
def test_potential_equals_its_definition_term_by_term(group, gae_lambda):
    result = potential_advantages(group, gae_lambda, prior=np.inf)
    for reward, values, advantages in zip(group.outcomes, group.values, result, strict=True):
        after = [*values[1:-1], reward]
        deltas = [u - v for u, v in zip(after, values[:-1], strict=True)]
        for k in range(len(deltas)):
            want = sum(gae_lambda**n * delta for n, delta in enumerate(deltas[k:]))
            assert advantages[k] == pytest.approx(want, abs=1e-9)


@given(groups(min_size=2), st.floats(-1, 1), UNIT)
def test_without_a_prior_only_differences_of_values_matter(group, shift, gae_lambda):
    moved = Group(
        outcomes=group.outcomes,
        num_steps=group.num_steps,
        values=tuple(v + shift for v in group.values),
    )
    before = potential_advantages(group, gae_lambda, prior=0.0)
    after = potential_advantages(moved, gae_lambda, prior=0.0)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@given(groups(min_size=2), UNIT)
def test_a_constant_value_without_a_prior_gives_the_outcome_advantages(group, constant):
    flat = Group(
        outcomes=group.outcomes,
        num_steps=group.num_steps,
        values=tuple(np.full(s + 1, constant) for s in group.num_steps),
    )
    for a, b in zip(potential_advantages(flat, prior=0.0), outcome_advantages(flat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@given(groups(), UNIT)
def test_the_value_after_the_last_step_is_not_used(group, gae_lambda):
    cut = tuple(np.append(v[:-1], 0.123) for v in group.values)
    other = Group(outcomes=group.outcomes, num_steps=group.num_steps, values=cut)
    before = potential_advantages(group, gae_lambda)
    after = potential_advantages(other, gae_lambda)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_scaling_divides_by_the_size_about_zero_and_subtracts_nothing():
    scaled = scale_advantages([np.array([1.0, 1.0]), np.array([1.0])])
    assert [a.tolist() for a in scaled] == [[1.0, 1.0], [1.0]]


def test_scaling_gives_unit_root_mean_square():
    scaled = scale_advantages([np.array([0.3, -0.1]), np.array([0.7])])
    assert np.mean(np.concatenate(scaled) ** 2) == pytest.approx(1)


@pytest.mark.parametrize("reward_range", [1.0, 100.0])
def test_scaling_does_not_blow_up_noise_that_is_small_for_the_reward_scale(reward_range):
    noise = [np.array([1e-4, -1e-4]) * reward_range]
    scaled = scale_advantages(noise, reward_range=reward_range)
    assert np.abs(scaled[0]).max() == pytest.approx(0.005)


def test_scaling_an_empty_batch_gives_an_empty_batch():
    assert scale_advantages([]) == ()
    assert [a.tolist() for a in scale_advantages([np.zeros(0)])] == [[]]


def test_outcome_variance_has_a_tolerance():
    def group(*outcomes):
        return Group(outcomes=np.array(outcomes), num_steps=(1,) * len(outcomes))

    assert has_outcome_variance(group(0.0, 1.0))
    assert not has_outcome_variance(group(0.3, 0.3 + 1e-12))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outcomes": np.array([1.0]), "num_steps": (1, 2)}, "one outcome per trajectory"),
        ({"outcomes": np.zeros(0), "num_steps": ()}, "one outcome per trajectory"),
        ({"outcomes": np.array([np.nan]), "num_steps": (1,)}, "not finite"),
        (
            {"outcomes": np.ones(1), "num_steps": (2,), "values": (np.ones(2),)},
            "values of shapes",
        ),
        (
            {"outcomes": np.ones(1), "num_steps": (1,), "values": (np.array([0.5, np.nan]),)},
            "missing score is never 0",
        ),
    ],
)
def test_malformed_groups_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Group(**fields)


@pytest.mark.parametrize(("gae_lambda", "prior"), [(-0.1, 4.0), (1.1, 4.0), (1.0, -1.0)])
def test_potential_refuses_parameters_out_of_range(gae_lambda, prior):
    with pytest.raises(ValueError, match=r"must be"):
        potential_advantages(TWO, gae_lambda, prior=prior)


def test_outcome_has_no_lambda():
    with pytest.raises(ValueError, match="no lambda"):
        outcome_advantages(TWO, 0.5)
