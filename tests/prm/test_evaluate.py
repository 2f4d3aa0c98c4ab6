import json
from dataclasses import replace

import numpy as np
import pytest

from prm.baseline import cross_fit_logistic
from prm.evaluate import (
    EvaluateConfig,
    ScoredPrefix,
    build_sections,
    distinct_states,
    evaluate,
)
from prm.metrics import make_items
from prm.reliability import draw_reliability
from tests.prm.synthetic import make_rows, write_label_folder
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def report(prm_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [*make_rows(45, rollouts=64, seed=5, prefix="h"), *make_rows(40)]
    labels = write_label_folder(folder / "labels", rows)
    config = EvaluateConfig(prm=prm_folder, labels=labels, out=folder / "out", device="cpu")
    found = evaluate(config)
    return found, folder


def test_it_writes_what_it_returns(report):
    found, folder = report
    assert json.loads((folder / "out/metrics.json").read_text()) == found
    assert (folder / "out/reliability.png").read_bytes().startswith(b"\x89PNG")


def test_trained_tasks_are_left_out_and_counted(report, prm_folder):
    found, _ = report
    split = json.loads((prm_folder / "tasks.json").read_text())
    assert found["counts"]["tasks"] == 45 + len(split["validation"])
    assert found["counts"]["excluded_training_tasks"] == len(split["train"])
    assert found["counts"]["excluded_trajectories"] == 2 * len(split["train"])
    assert found["counts"]["validation_tasks"] == len(split["validation"])


def test_a_model_that_learned_beats_position_and_length(report):
    found, _ = report
    for name in ("actions", "actions_before_answer"):
        section = found["sections"][name]
        prm, baseline = section["prm"]["auroc"], section["baseline"]["auroc"]
        assert prm["low"] > baseline["high"]
        assert prm["low"] <= prm["value"] <= prm["high"]
    assert found["sections"]["trajectories"]["prm"]["auroc"]["value"] > 0.99
    states = found["sections"]["states"]
    assert states["prm"]["nll"]["value"] < states["baseline"]["nll"]["value"]


def test_spearman_is_called_exact_only_for_well_measured_states(report):
    found, _ = report
    assert found["spearman_exact"]["value"] > 0.6
    # The validation tasks have 8 rollouts a state: counted in `spearman`, not in the exact one.
    assert found["rollouts_per_state"]["least"] == 8
    assert 100 <= found["spearman_exact"]["states"] < found["sections"]["states"]["items"]


def test_few_rollouts_give_no_exact_correlation(prm_folder, tmp_path):
    labels = write_label_folder(tmp_path / "labels", make_rows(45, rollouts=63, prefix="f"))
    found = evaluate(
        EvaluateConfig(prm=prm_folder, labels=labels, out=tmp_path / "out", resamples=100)
    )
    assert "spearman_exact" not in found
    assert found["sections"]["states"]["prm"]["spearman"]["value"] is not None
    assert found["rollouts_per_state"]["most"] >= 63


def test_labels_of_training_tasks_only_are_refused(prm_folder, labels, tmp_path):
    tasks = set(json.loads((prm_folder / "tasks.json").read_text())["train"])
    rows = [r for r in make_rows(40) if r.trajectory.task.task_id in tasks]
    folder = write_label_folder(tmp_path / "labels", rows)
    with pytest.raises(InputError, match="no held-out trajectories"):
        evaluate(EvaluateConfig(prm=prm_folder, labels=folder, out=tmp_path / "out"))


def test_outcomes_of_one_class_are_reported_as_undefined(prm_folder, tmp_path):
    rows = make_rows(10, prefix="one")
    rows = [replace(r, trajectory=replace(r.trajectory, outcome=1.0)) for r in rows]
    folder = write_label_folder(tmp_path / "labels", rows)
    found = evaluate(
        EvaluateConfig(prm=prm_folder, labels=folder, out=tmp_path / "out", resamples=100)
    )
    auroc = found["sections"]["actions"]["prm"]["auroc"]
    assert auroc["value"] is None
    assert "same outcome" in auroc["reason"]


def test_too_few_resamples_are_refused(prm_folder, labels):
    with pytest.raises(InputError, match="--resamples"):
        EvaluateConfig(prm=prm_folder, labels=labels, resamples=10)


def prefix(step, *, score=0.5, trajectory=0, last=False, key=(1,), **changes):
    fields = {
        "trajectory": trajectory,
        "task_id": "t",
        "step": step,
        "last": last,
        "tokens": 10 * step,
        "key": key,
        "score": score,
        "outcome": 1.0,
        "rollouts": 4,
        "correct": 2,
    }
    return ScoredPrefix(**(fields | changes))


def test_equal_states_are_merged_but_the_shared_first_one_is_not_added_up():
    states = distinct_states(
        [
            prefix(0, key=(1,), correct=3),
            prefix(0, key=(1,), trajectory=1, correct=3),
            prefix(1, key=(1, 2), correct=1),
            prefix(1, key=(1, 2), trajectory=1, correct=4),
            prefix(1, key=(1, 2), trajectory=2, task_id="other", correct=0),
            prefix(2, key=(1, 2, 3), last=True),
            prefix(1, key=(9,), rollouts=0, correct=0),
        ]
    )
    assert [(s.task_id, s.rollouts, s.correct) for s in states] == [
        ("t", 4, 3),
        ("t", 8, 5),
        ("other", 4, 0),
    ]


def test_sections_hold_the_items_they_say():
    prefixes = [
        prefix(0, score=0.9),
        prefix(1, score=0.8, key=(1, 2)),
        prefix(2, score=0.1, key=(1, 2, 3), last=True),
        prefix(0, score=0.9, trajectory=1, outcome=None),
        prefix(1, score=0.3, trajectory=1, outcome=None, key=(1, 5)),
        prefix(0, score=0.2, trajectory=2, task_id="u", outcome=0.0),
        prefix(1, score=0.6, trajectory=2, task_id="u", outcome=0.0, key=(1, 6), last=True),
    ]
    sections = build_sections(prefixes, aggregation="last")
    assert sections["actions"].prm.scores.tolist() == [0.8, 0.1, 0.6]
    assert sections["actions"].prm.targets.tolist() == [1, 1, 0]
    assert sections["actions_before_answer"].prm.scores.tolist() == [0.8]
    assert sections["trajectories"].prm.scores.tolist() == [0.1, 0.6]
    assert sections["trajectories_before_answer"].prm.scores.tolist() == [0.8]
    assert sections["states"].prm.scores.tolist() == [0.9, 0.8, 0.3, 0.2]
    minimum = build_sections(prefixes, aggregation="min")
    assert minimum["trajectories"].prm.scores.tolist() == [0.1, 0.6]


def test_the_baseline_finds_what_position_tells():
    rng = np.random.default_rng(0)
    features = rng.random((400, 2))
    rate = 1 / (1 + np.exp(-6 * (features[:, 0] - 0.5)))
    weights = np.full(400, 50.0)
    targets = rng.binomial(50, rate) / 50
    groups = [str(i // 4) for i in range(400)]
    guesses = cross_fit_logistic(features, targets, weights=weights, groups=groups)
    assert np.abs(guesses - rate).mean() < 0.03


def test_the_baseline_never_sees_a_task_of_its_own_fold():
    # Within a task the target is constant and its feature unique: leaking would be perfect.
    features = np.repeat(np.arange(20.0), 5)[:, None]
    targets = np.repeat(np.arange(20) % 2, 5).astype(float)
    groups = [str(i) for i in np.repeat(np.arange(20), 5)]
    guesses = cross_fit_logistic(features, targets, weights=np.ones(100), groups=groups)
    assert np.abs(guesses - 0.5).max() < 0.3


def test_the_baseline_without_anything_to_learn_from_is_the_rate():
    ones = np.ones(4)
    features = np.arange(4.0)[:, None]
    same = cross_fit_logistic(features, ones, weights=ones, groups=list("abcd"))
    assert same.tolist() == [1, 1, 1, 1]
    single = cross_fit_logistic(features, np.array([1, 0, 0, 0.0]), weights=ones, groups=["a"] * 4)
    assert single.tolist() == [0.25] * 4


def test_a_diagram_of_nothing_is_still_drawn(tmp_path):
    draw_reliability(tmp_path / "empty.png", {"nothing": make_items([], [], [])})
    assert (tmp_path / "empty.png").stat().st_size > 0
