"""Kappa and the disagreement report by hand-computed examples."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from labeling.consensus import (
    Evidence,
    combine,
)
from labeling.disagreement import ANSWERS, compare, kappa, report, table_kappas
from tests.examples import make_labelled


def says(rollouts, judge, oracle, lost=None):
    return Evidence(rollouts=rollouts, judge=judge, oracle=oracle, lost_at=lost)


def test_kappa_by_hand():
    """7 of 10 agree; by chance .5 * .6 + .5 * .4 = .5: kappa (.7 - .5) / .5 = .4."""
    first = [1] * 5 + [-1] * 5
    second = [1, 1, 1, 1, -1, 1, 1, -1, -1, -1]
    tasks = [str(i) for i in range(10)]
    found = kappa(first, second, tasks, 0)
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.4 < found.high


def test_kappa_is_undefined_with_a_reason_where_it_is():
    assert kappa([], [], [], 0).reason == "no step on which both spoke"
    assert kappa([1, 1], [1, 1], ["a", "b"], 0).reason == "both always say the same"
    one = kappa([1, -1], [1, -1], ["a", "a"], 0)
    assert (one.value, one.low, one.reason) == (1.0, None, "one task only: no interval")
    assert kappa([1, 1, 1], [1, -1, 1], ["a", "b", "c"], 0).value == 0.0


@given(st.lists(st.tuples(*[st.sampled_from([-1, 0, 1])] * 2), min_size=2, max_size=30))
def test_kappa_of_a_table_is_scikit_learns(pairs):
    first, second = zip(*pairs, strict=True)
    if len({*first, *second}) == 1:
        return
    table = np.zeros((1, 3, 3))
    for a, b in pairs:
        table[0, a + 1, b + 1] += 1
    expected = cohen_kappa_score(first, second, labels=[-1, 0, 1])
    assert table_kappas(table)[0] == pytest.approx(expected)


def test_steps_of_one_task_are_drawn_together():
    """Ten copies of a step in one task know no more than one: the interval stays as wide."""
    said = ([1, -1, 1, -1, 1, -1], [1, -1, -1, 1, 1, -1])
    tasks = ["a", "b", "c", "d", "e", "f"]
    once = kappa(*said, tasks, 0)
    often = kappa(said[0] * 10, said[1] * 10, tasks * 10, 0)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_a_table_counts_every_step_and_its_abstentions():
    rows = [says((1, None, -1), (1, 1, 0), (None, 0, -1))]
    steps = [step for row in rows for step in combine("a", row, "majority").steps]
    pair = compare(steps, ["t"] * 3, first="rollouts", second="judge", seed=0)
    assert ANSWERS == (-1, 0, 1, None)
    assert pair.table == ((0, 1, 0, 0), (0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 1, 0))
    assert (pair.both_spoke, pair.same) == (2, 1)


def test_the_report_lists_the_widest_contradictions_first():
    row = make_labelled(4)
    evidence = says((None, 1, None, 1), (1, -1, 0, -1), (1, None, 1, None), lost=0)
    values = (0.0, 0.0, 0.25, 0.25, 1.0)
    row = replace(row, labels=replace(row.labels, values=values, low=(0.0,) * 5, high=(1.0,) * 5))
    one = combine(row.trajectory.trajectory_id, evidence, "unanimous")
    found = report([row], [one], policy="unanimous", votes={}, examples=9, seed=0)
    assert [c.step for c in found.contradictions] == [4, 2, 3]
    first = found.contradictions[0]
    assert (first.rollouts, first.judge, first.oracle) == (1, -1, None)
    assert (first.value_before, first.value_after) == (0.25, 1.0)
    assert found.sources["judge"] == {"-1": 2, "0": 1, "+1": 1, "none": 0}
    assert (found.first_errors.both_known, found.first_errors.same) == (1, 0)
    few = report([row], [one], policy="unanimous", votes={}, examples=1, seed=0)
    assert few.contradictions == found.contradictions[:1]
