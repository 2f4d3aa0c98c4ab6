"""The study of labels, on a policy whose values are known."""

import json

import pytest

from benchmarks.label_pool import load_pool
from benchmarks.labels import LabelStudyConfig, study
from labeling.run import label
from labeling.strategies import Adaptive, Fixed
from tests.labeling.folders import config
from tests.labeling.walker import BAD, GOOD, START, WalkerEngine, make_policy, make_tasks
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    make_policy(folder / "policy")
    make_tasks(folder / "tasks.jsonl", 4)
    out = folder / "pool"
    settings = config(folder, out, rollouts=200, same_state="text")
    label(settings, engine=WalkerEngine(folder / "policy", ramble=0.5))
    return out


def load(folder, drawable=64):
    return load_pool(
        folder, drawable=drawable, max_steps=6, completer=str(folder.parent / "policy")
    )


def test_the_truth_is_measured_without_what_may_be_drawn(pool_folder):
    pools = load(pool_folder)
    assert all(len(r) == 64 for pool in pools for r in pool.rollouts.values())
    for pool in pools:
        good = "1+1" in pool.trajectories[0].steps[0].text
        for (_, prefix), truth in pool.truth.items():
            value = START if prefix == 0 else GOOD if good else BAD
            assert truth.n >= 136
            assert truth.value == pytest.approx(value, abs=4 * (0.25 / truth.n) ** 0.5)


def test_a_simulated_run_counts_what_a_real_one_would(pool_folder):
    pools = load(pool_folder)
    runs = [p.simulate(Fixed(rollouts=8), same="never", seed=1) for p in pools]
    assert all(node.own.rollouts == 8 for work in runs for node in work.nodes)
    again = pools[0].simulate(Fixed(rollouts=8), same="never", seed=1)
    assert [n.own for n in again.nodes] == [n.own for n in runs[0].nodes]
    other = pools[0].simulate(Fixed(rollouts=8), same="never", seed=2)
    assert [n.own.tokens for n in other.nodes] != [n.own.tokens for n in runs[0].nodes]


def test_a_pool_that_is_too_small_is_refused(pool_folder):
    with pytest.raises(InputError, match="too small"):
        load(pool_folder)[0].simulate(Fixed(rollouts=65), same="never", seed=0)
    with pytest.raises(InputError, match="at most 300 rollouts"):
        load(pool_folder, drawable=300)
    adaptive = Adaptive(rollouts=16, most=64, width=0.0)
    assert load(pool_folder)[0].simulate(adaptive, same="text", seed=0).nodes


def test_the_study_reports_falling_errors_and_intervals_that_cover(pool_folder, tmp_path, capsys):
    report = study(
        LabelStudyConfig(pool=pool_folder, out=tmp_path / "labels", drawable=64, seeds=4)
    )
    assert json.loads((tmp_path / "labels.json").read_text()) == report
    assert (tmp_path / "labels.png").stat().st_size > 5000
    fixed = {
        r["budget"]: r for r in report["arms"] if (r["arm"], r["estimator"]) == ("fixed", "soft")
    }
    assert fixed[16]["rmse"] < 0.75 * fixed[2]["rmse"]
    assert fixed[16]["tokens"] == pytest.approx(8 * fixed[2]["tokens"], rel=0.2)
    assert 0.75 < fixed[16]["coverage"] <= 1
    reuse = [r for r in report["arms"] if (r["arm"], r["budget"]) == ("fixed, reuse", 16)]
    assert all(r["rmse"] < fixed[16]["rmse"] * 1.05 for r in reuse if r["estimator"] == "soft")
    assert 0 < report["cost_of_best_allocation"] <= 1
    assert {r["method"] for r in report["first_error"]} == {
        "scan",
        "bisect without probe",
        "bisect",
    }
    assert "coverage" in capsys.readouterr().out


def test_another_kind_of_folder_is_refused(pool_folder, tmp_path):
    with pytest.raises(InputError, match="manifest.json does not exist"):
        study(LabelStudyConfig(pool=tmp_path, out=tmp_path / "x"))
