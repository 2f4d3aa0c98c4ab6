import json

import pytest

from benchmarks.demo import DemoConfig, report
from trajectory.errors import InputError


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "reason": None}


def demo_folder(folder):
    for name, accuracy in (("before", 0.4), ("after", 0.6)):
        (folder / name).mkdir()
        body = {"accuracy": accuracy, "low": 0.3, "high": 0.7, "num_tasks": 500}
        (folder / name / "evaluation.json").write_text(json.dumps(body))
    (folder / "prm/evaluation").mkdir(parents=True)
    (folder / "held-out/evaluation").mkdir(parents=True)
    sections = {
        "actions": {"prm": {"auroc": estimate(0.9), "ece": estimate(0.2)}},
        "trajectories": {"prm": {"auroc": estimate(0.8)}},
    }
    exact = {"sections": {}, "spearman_exact": estimate(0.7)}
    (folder / "held-out/evaluation/metrics.json").write_text(json.dumps({"sections": sections}))
    (folder / "prm/evaluation/metrics.json").write_text(json.dumps(exact))
    (folder / "held-out/evaluation/reliability.png").write_bytes(b"r")
    (folder / "optimized").mkdir()
    (folder / "optimized/learning_curve.png").write_bytes(b"c")
    (folder / "seconds.tsv").write_text("synthesize\t2\nwarmup\t100\nexact\t5\n")


def test_the_report_gathers_what_the_stages_left(tmp_path):
    demo_folder(tmp_path)
    report(DemoConfig(run=tmp_path))
    body = json.loads((tmp_path / "report.json").read_text())
    assert body["accuracy"] == {"warmup": 0.4, "prm": 0.6}
    assert body["n"] == 500
    assert body["prm"] == {
        "auroc": 0.9,
        "auroc_trajectories": 0.8,
        "ece": 0.2,
        "spearman_exact": 0.7,
    }
    assert body["seconds"] == {
        "synthesize": 2,
        "warmup": 100,
        "label": None,
        "train": None,
        "optimize": None,
        "total": 107,
    }
    assert (tmp_path / "learning_curve.png").read_bytes() == b"c"
    assert (tmp_path / "reliability.png").read_bytes() == b"r"


def test_an_unfinished_demo_is_named(tmp_path):
    with pytest.raises(InputError, match="evaluation.json is missing"):
        report(DemoConfig(run=tmp_path))
