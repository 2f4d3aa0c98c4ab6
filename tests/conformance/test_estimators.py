"""What every row of the estimator table must keep."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling.estimators import ESTIMATORS

NAMES = sorted(ESTIMATORS)
LEVELS = st.one_of(
    st.sampled_from([0.5, 0.9, 0.95]), st.floats(0.5, 0.999, allow_nan=False, exclude_max=True)
)


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(1, 300), data=st.data(), level=LEVELS)
def test_value_lies_in_its_interval_and_the_interval_in_the_unit_range(name, n, data, level):
    c = data.draw(st.integers(0, n))
    value, low, high = ESTIMATORS[name](n, c, level)
    assert 0 <= low <= value <= high <= 1


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(1, 60), level=LEVELS)
def test_everything_rises_with_the_number_of_right_rollouts(name, n, level):
    found = [ESTIMATORS[name](n, c, level) for c in range(n + 1)]
    for less, more in pairwise(found):
        assert less.value <= more.value
        assert less.low <= more.low
        assert less.high <= more.high


@pytest.mark.parametrize("name", NAMES)
def test_order_of_states_is_kept_at_the_extremes(name):
    assert ESTIMATORS[name](8, 0, 0.9).value < 0.1 < 0.9 < ESTIMATORS[name](8, 8, 0.9).value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "c"), [(0, 0), (4, 5), (4, -1)])
def test_impossible_counts_are_refused(name, n, c):
    with pytest.raises(ValueError, match="counts must satisfy"):
        ESTIMATORS[name](n, c, 0.9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 0.49, 1.0, 90.0])
def test_levels_out_of_range_are_refused(name, level):
    with pytest.raises(ValueError, match=r"level must be in \[0.5, 1\)"):
        ESTIMATORS[name](4, 2, level)
