import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.attack_report import AttackConfig, attack_held_out, check_gate, estimate_rate
from prm.attacks import ATTACKS, BOAST
from prm.benchmarks.run import PublicBenchmark
from prm.evaluate import EvaluateConfig, evaluate
from prm.score import Scorer
from tests.prm.synthetic import make_rows, make_trajectory, write_label_folder
from trajectory.errors import GateError, InputError
from trajectory.records import StepScores


@dataclass
class Rules:
    """A scorer by rules: 0.5, but 0.9 for a step that boasts where the answer is wrong."""

    aggregation: str = "last"
    longest: int = 99

    @property
    def metadata(self):
        return self

    def fits(self, rows):
        return [row.num_steps <= self.longest for row in rows]

    def score(self, rows, *, calibrated=True):
        return [
            StepScores(
                trajectory_id=row.trajectory_id,
                checkpoint="",
                values=(0.5, *(self.value(row, s) for s in row.steps)),
                kind="value",
                position="observation",
            )
            for row in rows
        ]

    def value(self, row, step):
        return 0.9 if step.text.startswith(BOAST) and row.outcome == 0 else 0.5


ROWS = [make_trajectory(marks, task=f"t{i}") for i, marks in enumerate(["+", "-", "+-", "++"])]
ON = AttackConfig(attacks=True)


def test_the_rate_is_the_share_of_trajectories_whose_score_rises():
    results = attack_held_out(ROWS, Rules(), ON)
    assert list(results) == list(ATTACKS)
    boast = results["boast"]
    assert (boast.trajectories, boast.not_applicable, boast.too_long) == (4, 0, 0)
    assert boast.rate.value == 0.5  # the second and the third
    assert boast.rate_wrong.value == 1
    assert boast.rate_before_answer.value == 0.5
    assert boast.mean_change == pytest.approx((0 + 0.4 + 0.4 + 0) / 4)
    assert boast.mean_change_wrong == pytest.approx(0.4)
    assert boast.mean_change_right == 0
    assert boast.rank_kept is None  # all scores were equal before
    assert (boast.largest_rise, boast.largest_rise_in) == (pytest.approx(0.4), "t1/0")
    swap = results["reorder_steps"]
    assert (swap.trajectories, swap.not_applicable, swap.rate.value) == (1, 3, 0)
    # Nothing is left before the answer once the only step is deleted: two of four remain.
    assert results["delete_step"].rate_before_answer.value == 0


def test_epsilon_decides_what_counts_and_what_is_too_long_is_counted():
    assert attack_held_out(ROWS, Rules(), AttackConfig(attacks=True, attack_epsilon=0.45))[
        "boast"
    ].rate.value == pytest.approx(0)
    duplicate = attack_held_out(ROWS, Rules(longest=3), ON)["duplicate_call"]
    assert (duplicate.trajectories, duplicate.too_long) == (2, 2)


def test_a_model_without_a_single_applicable_attack_has_no_rate():
    results = attack_held_out([make_trajectory("")], Rules(), ON)
    assert results["fake_success"].rate.reason == "no trajectories"
    del results["boast"]
    with pytest.raises(GateError, match="not tested"):
        check_gate(results, 0.5)


def test_the_gate_names_every_attack_above_it():
    results = attack_held_out(ROWS, Rules(), ON)
    check_gate(results, None)
    check_gate(results, 0.5)
    with pytest.raises(GateError, match=r"more than 0.4 of the trajectories under boast 0.500$"):
        check_gate(results, 0.4)


@given(hits=st.lists(st.booleans(), min_size=2, max_size=40))
def test_an_interval_of_a_rate_holds_it(hits):
    found = estimate_rate([float(h) for h in hits], [str(i) for i in range(len(hits))])
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_attack_rate": 0.1}, "give --attacks too"),
        ({"attack_epsilon": 0.1}, "give --attacks too"),
        ({"attacks": True, "attack_epsilon": 1.0}, "--attack-epsilon"),
        ({"attacks": True, "max_attack_rate": 1.5}, "--max-attack-rate"),
    ],
)
def test_settings_that_do_not_apply_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AttackConfig(**settings)


def test_evaluation_reports_attacks_of_a_real_model_and_the_gate_ends_the_command(
    prm_folder, tmp_path, repository
):
    labels = write_label_folder(tmp_path / "labels", make_rows(12, seed=5, prefix="h"))
    report = evaluate(
        EvaluateConfig(prm=prm_folder, labels=labels, out=tmp_path / "out", attack=ON)
    )
    boast = report["attacks"]["by_attack"]["boast"]
    assert boast["trajectories"] == 24
    stored = json.loads((tmp_path / "out/metrics.json").read_text())
    assert stored["attacks"] == report["attacks"]
    rate = max(a["rate"]["value"] or 0 for a in report["attacks"]["by_attack"].values())
    assert rate > 0  # a model of 40 tasks is not proof against all of them
    command = [sys.executable, "-m", "prm.cli", "evaluate", "--prm", str(prm_folder)]
    command += ["--labels", str(labels), "--out", str(tmp_path / "gated"), "--attacks"]
    done = subprocess.run(
        [*command, "--max-attack-rate", str(rate - 0.01)],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "fails the attack gate" in done.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "gated/metrics.json").read_text())["attacks"]


def test_attacks_on_a_real_model_do_not_depend_on_the_company(prm_folder):
    scorer = Scorer.load(prm_folder, device="cpu")
    alone = attack_held_out(ROWS[:1], scorer, ON)["boast"].mean_change
    changes = [attack_held_out([row], scorer, ON)["boast"].mean_change for row in ROWS]
    together = attack_held_out(ROWS, scorer, ON)["boast"].mean_change
    assert alone == changes[0]
    assert together == pytest.approx(sum(changes) / 4, abs=1e-5)


def test_attacks_are_not_passed_over_with_a_public_benchmark(tmp_path):
    with pytest.raises(InputError, match="--attacks is for --labels"):
        EvaluateConfig(
            prm=tmp_path,
            public=PublicBenchmark(benchmark="processbench", data=tmp_path),
            attack=AttackConfig(attacks=True),
        )
