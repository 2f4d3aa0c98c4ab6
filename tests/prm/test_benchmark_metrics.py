"""Published metrics against examples computed by hand, one per branch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.benchmarks.arms import Case, execution_arm, position_arm
from prm.benchmarks.metrics import (
    confusion_columns,
    estimate_from_sums,
    first_error,
    prm_score,
    processbench_columns,
    processbench_f1,
    rate,
    right_f1,
)
from prm.benchmarks.pools import canonical_answer
from prm.benchmarks.selection import at_random, by_score, by_score_of, by_vote, oracle
from prm.benchmarks.steps import (
    Bootstrap,
    agentprocessbench,
    common,
    prmbench,
    processbench,
    tune_threshold,
)
from trajectory.records import Observation, Step, StopReason, Task, ToolCall, Trajectory

BOOTSTRAP = Bootstrap(resamples=200, seed=0)


def case(targets, *, task="t", ok=None, **meta) -> Case:
    """A case with short steps; ``ok`` says of each step whether its call ran."""
    steps = []
    for n in range(len(targets)):
        if ok is None:
            steps.append(Step(text=f"step {n}"))
            continue
        observation = Observation(content="x", error=None if ok[n] else "invalid_action")
        call = ToolCall(name="sql", arguments="{}")
        steps.append(Step(text=f"step {n}", calls=(call,), observations=(observation,)))
    return Case(
        trajectory=Trajectory(
            trajectory_id=task,
            task=Task(task_id=task, domain="d", prompt="p", answer=""),
            steps=tuple(steps),
            stop=StopReason.MAX_STEPS,
            meta=meta,
        ),
        targets=tuple(targets),
    )


def solution(label, size, subset="math", task="t") -> Case:
    """A ProcessBench case."""
    targets = [1.0] * size if label < 0 else [1.0] * label + [0.0] + [None] * (size - label - 1)
    return case(targets, task=task, subset=subset, label=label)


def f1(pairs) -> float:
    """F1 of (prediction, label) pairs."""
    columns = processbench_columns([p for p, _ in pairs], [t for _, t in pairs])
    return float(processbench_f1(columns.sum(axis=0)[None])[0])


def test_the_first_error_is_the_first_step_below_the_threshold():
    assert first_error([0.6, 0.4, 0.1], 0.5) == 1
    assert first_error([0.5, 0.9], 0.5) == -1, "exactly at the threshold is not below it"
    assert first_error([], 0.5) == -1
    assert first_error([0.2], 0.5) == 0


def test_processbench_f1_by_hand():
    # Wrong: found exactly 1 of 3 (one step early, one not noticed). Right: passed 2 of 4.
    pairs = [(1, 1), (0, 2), (-1, 0), (-1, -1), (-1, -1), (0, -1), (3, -1)]
    assert processbench_columns(*zip(*pairs, strict=True)).sum(axis=0).tolist() == [1, 3, 2, 4]
    a, b = 1 / 3, 2 / 4
    assert f1(pairs) == pytest.approx(2 * a * b / (a + b)) == pytest.approx(0.4)


def test_processbench_f1_is_one_when_all_is_met_and_zero_when_a_side_is_missed():
    assert f1([(2, 2), (-1, -1)]) == 1.0
    assert f1([(0, 2), (-1, -1)]) == 0.0, "no wrong step found: harmonic mean with 0"
    assert f1([(2, 2), (0, -1)]) == 0.0, "no right solution passed"
    assert f1([(0, 2), (0, -1)]) == 0.0, "both 0: 0, not undefined"


def test_processbench_f1_needs_both_kinds_of_solutions():
    assert np.isnan(f1([(2, 2)]))
    assert np.isnan(f1([(-1, -1)]))


def test_processbench_average_is_plain_whatever_the_sizes():
    # Subset a: F1 1.0 from two solutions. Subset b: F1 0.4 from seven (see above).
    scores, cases = [], []
    for prediction, label in [(2, 2), (-1, -1)]:
        cases.append(solution(label, 4, "a", task=f"a{len(cases)}"))
        scores.append(tuple(0.1 if n == prediction else 0.9 for n in range(4)))
    for prediction, label in [(1, 1), (0, 2), (-1, 0), (-1, -1), (-1, -1), (0, -1), (3, -1)]:
        cases.append(solution(label, 4, "b", task=f"b{len(cases)}"))
        scores.append(tuple(0.1 if n == prediction else 0.9 for n in range(4)))
    figures = processbench(cases, scores, BOOTSTRAP)
    assert figures["a_f1_fixed"].value == pytest.approx(1.0)
    assert figures["b_f1_fixed"].value == pytest.approx(0.4)
    assert figures["b_error_accuracy_fixed"].value == pytest.approx(1 / 3)
    assert figures["b_correct_accuracy_fixed"].value == pytest.approx(0.5)
    assert figures["f1_fixed"].value == pytest.approx(0.7)
    assert figures["tuned_threshold"].value is None, "no subset to tune on, and it says so"
    assert "gsm8k" in str(figures["tuned_threshold"].reason)
    assert "f1_tuned" not in figures


def test_the_threshold_is_tuned_on_gsm8k_and_used_everywhere():
    # All scores lie above 0.5, so the fixed threshold finds nothing; 0.75 parts them.
    cases = [
        solution(1, 2, "gsm8k", "g0"),
        solution(-1, 2, "gsm8k", "g1"),
        solution(0, 2, "math", "m0"),
        solution(-1, 2, "math", "m1"),
    ]
    scores = [(0.9, 0.6), (0.9, 0.9), (0.6, 0.9), (0.9, 0.9)]
    figures = processbench(cases, scores, BOOTSTRAP)
    assert figures["f1_fixed"].value == 0.0
    assert figures["tuned_threshold"].value == pytest.approx(0.75)
    assert figures["f1_tuned"].value == figures["math_f1_tuned"].value == 1.0


def test_a_stretch_of_equally_good_thresholds_gives_its_middle():
    cases = [solution(0, 1, "gsm8k", "g0"), solution(-1, 1, "gsm8k", "g1")]
    assert tune_threshold(cases, [(0.2,), (0.8,)]) == pytest.approx(0.5)


def test_prm_score_by_hand():
    # Right steps: 6 called right, 1 called wrong. Wrong steps: 1 called right, 2 called wrong.
    called = [True] * 6 + [False] + [True] + [False] * 2
    right = [True] * 7 + [False] * 3
    sums = confusion_columns(called, right)[None]
    assert sums.tolist() == [[6, 1, 2, 1]]
    precision, recall = 6 / 7, 6 / 7
    negative_precision, negative_recall = 2 / 3, 2 / 3
    expected = 0.5 * 2 * precision * recall / (precision + recall) + 0.5 * (
        2 * negative_precision * negative_recall / (negative_precision + negative_recall)
    )
    assert prm_score(sums)[0] == pytest.approx(expected)
    assert right_f1(np.array([[3.0, 0, 0, 1]]))[0] == pytest.approx(6 / 7)
    assert np.isnan(prm_score(np.array([[3.0, 0, 0, 0]]))[0]), "no wrong step anywhere"


def test_prmbench_scores_a_class_without_wrong_steps_by_its_right_steps():
    cases = [
        case([1.0, 0.0], task="a", classification="deception"),
        case([1.0, 1.0], task="b", classification="multi_solutions"),
    ]
    figures = prmbench(cases, [(0.9, 0.1), (0.9, 0.2)], BOOTSTRAP)
    assert figures["deception_prm_score"].value == 1.0
    assert figures["multi_solutions_prm_score"].value == pytest.approx(2 / 3)
    # All: TP 2, TN 1, FN 1: F1 of right 4/5, of wrong 2/3.
    assert figures["prm_score"].value == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_agentprocessbench_by_hand():
    # Neutral (None) is a label too: two classes never meet it.
    cases = [case([1.0, 0.0, None], task="a"), case([1.0, 1.0], task="b"), case([0.0], task="c")]
    scores = [(0.9, 0.2, 0.7), (0.4, 0.9), (0.3,)]
    figures = agentprocessbench(cases, scores, BOOTSTRAP)
    assert figures["step_accuracy"].value == pytest.approx(4 / 6)
    assert figures["step_accuracy_without_neutral"].value == pytest.approx(4 / 5)
    # First harmful step: a 1 and met; b none, but 0 was called; c 0 and met.
    assert figures["first_error_accuracy"].value == pytest.approx(2 / 3)


def test_common_figures_by_hand():
    cases = [case([1.0, 0.0], task="a"), case([1.0, None], task="b"), case([0.0], task="c")]
    figures = common(cases, [(0.9, 0.2), (0.8, 0.95), (0.3,)], BOOTSTRAP)
    assert figures["step_auroc"].value == 1.0
    assert figures["step_brier"].value == pytest.approx((0.01 + 0.04 + 0.04 + 0.09) / 4)
    assert figures["lowest_is_last"].value == 0.5, "single steps have no last among several"


def test_the_interval_is_over_problems_not_rows():
    columns = np.array([[1.0, 1]] * 50 + [[0.0, 1]] * 50)
    by_row = estimate_from_sums(columns, [str(n) for n in range(100)], rate)
    by_problem = estimate_from_sums(columns, ["a"] * 50 + ["b"] * 50, rate)
    assert by_row.value == by_problem.value == 0.5
    assert by_row.low is not None
    assert by_row.low > 0.35
    assert (by_problem.low, by_problem.high) == (0.0, 1.0)
    assert estimate_from_sums(columns, ["a"] * 100, rate).reason == "one problem only: no interval"
    assert estimate_from_sums(np.zeros((0, 2)), [], rate).value is None


@given(
    st.lists(
        st.tuples(st.integers(-1, 3), st.integers(-1, 3), st.sampled_from("abc")),
        min_size=1,
        max_size=30,
    )
)
def test_resampled_sums_give_what_the_metric_gives_on_the_resampled_rows(rows):
    columns = processbench_columns([p for p, _, _ in rows], [t for _, t, _ in rows])
    doubled = np.concatenate([columns, columns])
    once, twice = (processbench_f1(c.sum(axis=0)[None])[0] for c in (columns, doubled))
    assert np.isnan(once) == np.isnan(twice)
    assert np.isnan(once) or once == pytest.approx(twice)
    assert np.isnan(once) or 0 <= once <= 1


def test_choosers_by_hand():
    scores, correct = [0.2, 0.9, 0.5, 0.9], [1.0, 0.0, 1.0, 1.0]
    assert by_score(scores, correct) == 0.5, "two share the highest score, one of them is right"
    assert at_random(correct) == 0.75
    assert oracle(correct) == 1.0
    assert oracle([0.0, 0.0]) == 0.0
    # 7 has most votes; 8 has most weight.
    assert by_vote(["7", "7", "8"], [0, 0, 1]) == 0.0
    assert by_vote(["7", "7", "8"], [0, 0, 1], [0.2, 0.3, 0.6]) == 1.0
    assert by_vote([None, None], [0, 0]) == 0.0


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.booleans()), min_size=1, max_size=7),
    st.data(),
)
def test_best_of_a_drawn_subset_is_the_average_over_all_subsets(candidates, data):
    from itertools import combinations

    size = data.draw(st.integers(1, len(candidates)))
    scores, correct = [s for s, _ in candidates], [float(c) for _, c in candidates]
    subsets = list(combinations(range(len(candidates)), size))
    brute = np.mean([by_score([scores[i] for i in s], [correct[i] for i in s]) for s in subsets])
    assert by_score_of(scores, correct, size) == pytest.approx(brute)


def test_answers_are_compared_by_value():
    assert canonical_answer("70,000") == canonical_answer("70000")
    assert canonical_answer(r"15 \text{ liters}") == canonical_answer("15.0")
    assert canonical_answer(r"\frac43") == canonical_answer(r"\dfrac{4}{3}")
    assert canonical_answer(r"\text{Evelyn}") != canonical_answer(r"\text{Angela}")
    assert canonical_answer("12") != canonical_answer("13")


def test_the_execution_arm_learns_from_failed_calls_and_needs_observations():
    cases = [
        case([float(good)] * 2, task=f"t{n}", ok=[good, good])
        for n, good in enumerate([True, False] * 10)
    ]
    arm = execution_arm(cases)
    assert arm is not None
    assert min(arm[0]) > 0.8 > 0.2 > max(arm[1])
    assert execution_arm([solution(0, 2)]) is None
    assert execution_arm(cases[::2]) is None, "no call failed: nothing to go by"


def test_the_position_arm_knows_only_position_and_length():
    cases = [case([1.0, 1.0, 0.0], task=f"t{n}") for n in range(20)]
    arm = position_arm(cases)
    assert arm[0][0] > arm[0][2]
    assert arm[0] == pytest.approx(arm[10])


def test_steps_without_a_target_do_not_move_the_position_arm():
    masked = position_arm([case([1.0, 0.0, None], task=f"t{n}") for n in range(10)])
    filled = position_arm([case([1.0, 0.0, 1.0], task=f"t{n}") for n in range(10)])
    assert masked[0][2] < 0.1, "later steps look wrong, and the masked one does not object"
    assert filled[0][2] > 0.5
