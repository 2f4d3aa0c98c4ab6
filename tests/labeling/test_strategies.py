"""Strategies against states whose values are known: no engine, only dice."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling.strategies import Adaptive, Bisect, Fixed, PathView, StateView, TaskView


def state(n=0, c=0, own=None, parent=None, reached=0, tokens=10.0, closed=False):
    return StateView(
        n=n,
        c=c,
        own=n if own is None else own,
        parent=parent,
        reached=reached,
        tokens=tokens,
        closed=closed,
    )


def chain(*states, right=False):
    """The states of one trajectory, each the child of the one before."""
    linked = tuple(
        state(
            s.n,
            s.c,
            s.own,
            i - 1 if i else None,
            s.reached,
            s.tokens,
            s.closed,
        )
        for i, s in enumerate(states)
    )
    return TaskView(states=linked, paths=(PathView(states=tuple(range(len(states))), right=right),))


def simulate(strategy, values, *, right=False, seed=0, rounds=500):
    """Run a strategy on states with these success probabilities; return their (n, c)."""
    rng, counts = Random(seed), [[0, 0] for _ in values]
    for _ in range(rounds):
        view = chain(*(state(n, c) for n, c in counts), right=right)
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
    adaptive = Adaptive(rollouts=100, most=400, width=0.2, pooled=False)
    # Jeffreys: after 8 failures the 90 % interval is [0, 0.201], after 9 [0, 0.181].
    assert adaptive.goes_on(8, 0)
    assert not adaptive.goes_on(9, 0)
    assert adaptive.goes_on(20, 10)


def test_adaptive_stops_where_the_interval_excludes_the_threshold():
    adaptive = Adaptive(rollouts=4, most=64, width=0.0, threshold=0.5)
    assert adaptive.goes_on(8, 4)
    assert not adaptive.goes_on(8, 0)


def test_adaptive_spends_where_the_posterior_is_widest():
    view = chain(state(8, 8), state(8, 4), state(8, 0), state(8, 8))
    more = [
        w - s.n
        for w, s in zip(
            Adaptive(rollouts=40, most=99, width=0.0).wanted(view), view.states, strict=True
        )
    ]
    assert more[1] == 4
    assert sum(more) == 8


def test_adaptive_prefers_the_cheaper_of_two_equal_states():
    view = chain(state(8, 4, tokens=100), state(8, 4, reached=0, tokens=10))
    wanted = Adaptive(rollouts=40, most=99, width=0.0).wanted(view)
    assert wanted == [8, 12]


def test_a_state_whose_rollouts_come_through_another_gains_from_both():
    alone = chain(state(8, 4, tokens=15), state(8, 4, reached=0, tokens=10))
    through = chain(state(8, 4, tokens=15), state(8, 4, own=0, reached=8, tokens=10))
    adaptive = Adaptive(rollouts=40, most=99, width=0.0)
    assert adaptive.wanted(alone)[0] == 8
    assert adaptive.wanted(through)[0] == 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.booleans(),
)
def test_adaptive_ends_within_its_budget_and_caps(values, seed, pooled):
    adaptive = Adaptive(rollouts=6, most=20, batch=3, width=0.2, pooled=pooled)
    _, counts = simulate(adaptive, values, seed=seed)
    assert all(1 <= n <= 20 for n, _ in counts)
    if pooled:
        assert sum(n for n, _ in counts) <= 6 * len(values)
    else:
        assert all(n == 20 or not adaptive.goes_on(n, c) for n, c in counts)


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
