"""Strategies against states whose values are known: no engine, only dice."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling.strategies import Adaptive, Bisect, Fixed, PathView, StateView, TaskView


def state(n=0, c=0, own=None, parent=None, reached=0, right=0, tokens=10.0, closed=False):
    return StateView(
        n=n,
        c=c,
        own=n if own is None else own,
        parent=parent,
        reached=reached,
        reached_right=right,
        tokens=tokens,
        closed=closed,
    )


def chain(*states, right=False, shares=True):
    """The states of one trajectory, each the child of the one before."""
    linked = tuple(
        state(
            s.n,
            s.c,
            s.own,
            i - 1 if i else None,
            s.reached,
            s.reached_right,
            s.tokens,
            s.closed,
        )
        for i, s in enumerate(states)
    )
    path = PathView(states=tuple(range(len(states))), right=right)
    return TaskView(states=linked, paths=(path,), shares=shares)


def simulate(strategy, values, *, right=False, seed=0, rounds=500, shares=False):
    """Run a strategy on states with these success probabilities; return their (n, c)."""
    rng, counts = Random(seed), [[0, 0] for _ in values]
    for _ in range(rounds):
        view = chain(*(state(n, c) for n, c in counts), right=right, shares=shares)
        wanted = strategy.wanted(view)
        if wanted == [n for n, _ in counts]:
            return view, counts
        for entry, value, total in zip(counts, values, wanted, strict=True):
            assert total >= entry[0]
            while entry[0] < total:
                entry[0] += 1
                entry[1] += rng.random() < value
    raise AssertionError("the strategy never ends")


def test_fixed_gives_every_state_the_same():
    assert Fixed(rollouts=4).wanted(chain(state(), state(1, 0), state(6, 2))) == [4, 4, 6]


def test_no_strategy_asks_for_rollouts_of_a_state_that_cannot_be_restored():
    view = chain(state(2, 2), state(2, 0, closed=True))
    assert Fixed(rollouts=4).wanted(view) == [4, 2]
    assert Adaptive(rollouts=4, most=16).wanted(view)[1] == 2
    assert Bisect(rollouts=4).wanted(view)[1] == 2


def test_adaptive_stops_where_the_interval_is_narrow():
    adaptive = Adaptive(rollouts=100, most=400, width=0.2)
    # Jeffreys: after 8 failures the 90 % interval is [0, 0.201], after 9 [0, 0.181].
    assert adaptive.goes_on(8, 0)
    assert not adaptive.goes_on(9, 0)
    assert adaptive.goes_on(20, 10)


def test_adaptive_stops_where_the_interval_excludes_the_threshold():
    adaptive = Adaptive(rollouts=32, most=64, threshold=0.5)
    assert adaptive.goes_on(8, 4)
    assert not adaptive.goes_on(8, 0)


def test_adaptive_gives_a_state_its_share_of_the_error():
    # By hand, K = 32: the 32nd rollout of a state of value 1/2 lowers the posterior variance by
    # 16.5^2 / (33^2 34^2) = 2.16e-4; the 13th of a state that never succeeded by
    # 0.5 * 12.5 / (13^2 14^2) = 1.89e-4, the 12th by 0.5 * 11.5 / (12^2 13^2) = 2.36e-4.
    adaptive = Adaptive(rollouts=32, most=64)
    assert adaptive.goes_on(32, 16)
    assert not adaptive.goes_on(33, 16)
    assert adaptive.goes_on(11, 0)
    assert not adaptive.goes_on(12, 0)


def test_adaptive_gives_the_better_half_a_batch_that_grows():
    view = chain(state(8, 8), state(8, 4), state(8, 0), state(18, 9), shares=False)
    assert Adaptive(rollouts=64, most=256, batch=4).wanted(view) == [8, 12, 8, 27]
    assert list(Adaptive(rollouts=9, most=30, batch=4).batch_ends()) == [4, 8, 12, 18, 27, 30]


def test_adaptive_prefers_the_cheaper_of_two_equal_states():
    view = chain(state(8, 4, tokens=100), state(8, 4, reached=0, tokens=10))
    assert Adaptive(rollouts=40, most=99).wanted(view) == [8, 16]


def test_a_state_whose_rollouts_come_through_another_gains_from_both():
    alone = chain(state(8, 4, tokens=15), state(8, 4, reached=0, tokens=10))
    through = chain(state(8, 4, tokens=15), state(8, 4, own=0, reached=8, tokens=10))
    adaptive = Adaptive(rollouts=40, most=99)
    assert adaptive.wanted(alone)[0] == 8
    assert adaptive.wanted(through)[0] == 16


def test_with_backup_a_later_state_gains_from_what_it_tells_of_the_earlier_one():
    view = chain(state(8, 4, tokens=10), state(8, 4, own=0, reached=8, right=4, tokens=10))
    assert Adaptive(rollouts=40, most=99).wanted(view) == [16, 0]
    # All rollouts of the first go on to the second: measuring that one says all there is to know.
    assert Adaptive(rollouts=40, most=99, backs_up=True).wanted(view) == [8, 8]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.booleans(),
)
def test_adaptive_ends_within_its_caps(values, seed, shares):
    adaptive = Adaptive(rollouts=6, most=20, batch=3, backs_up=shares)
    _, counts = simulate(adaptive, values, seed=seed, shares=shares)
    assert all(1 <= n <= 20 for n, _ in counts)
    if not shares:
        assert not any(adaptive.goes_on(n, c) for n, c in counts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data(), st.integers(0, 1000))
def test_bisect_finds_the_first_error_where_nothing_recovers(length, data, seed):
    first = data.draw(st.integers(1, length))
    values = [1.0] * first + [0.0] * (length - first)
    bisect = Bisect(rollouts=8)
    view, counts = simulate(bisect, values, seed=seed)
    assert bisect.found(view.states, view.paths[0].states) == first
    assert sum(n > 0 for n, _ in counts) <= 3 + length.bit_length()


def test_bisect_measures_nothing_of_a_right_trajectory():
    assert simulate(Bisect(rollouts=8), [1.0, 1.0], right=True)[1] == [[0, 0], [0, 0]]


def test_bisect_gives_up_where_the_task_itself_is_never_solved():
    view, counts = simulate(Bisect(rollouts=8), [0.0, 1.0, 0.0])
    assert counts == [[8, 0], [0, 0], [0, 0]]
    assert Bisect(rollouts=8).found(view.states, (0, 1, 2)) is None


def test_bisect_without_a_probe_is_fooled_by_a_recovery_and_with_one_it_is_not():
    values = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    blind = Bisect(rollouts=8, probe=False)
    view, _ = simulate(blind, values)
    assert blind.found(view.states, view.paths[0].states) == 2
    careful = Bisect(rollouts=8)
    view, counts = simulate(careful, values)
    assert careful.found(view.states, view.paths[0].states) == 7
    assert all(n for n, _ in counts)


def test_bisect_does_not_go_on_for_ever_where_tools_fail():
    view = chain(state(0, 0, own=16), state())
    assert Bisect(rollouts=8).wanted(view) == [16, 0]


def test_bisect_knows_nothing_where_a_state_it_needs_cannot_be_restored():
    view = chain(state(4, 4), state(0, 0, closed=True), state(0, 0, closed=True), state())
    bisect = Bisect(rollouts=4)
    assert bisect.wanted(view) == [4, 0, 0, 0]
    assert bisect.found(view.states, (0, 1, 2, 3)) is None


@pytest.mark.parametrize("strategy", [Fixed(rollouts=3), Adaptive(rollouts=3, most=9)])
def test_the_same_view_gives_the_same_decision(strategy):
    view = chain(state(3, 1), state(2, 2), state())
    assert strategy.wanted(view) == strategy.wanted(view)
