import json

import numpy as np
import pytest

from benchmarks.curves import CurvesConfig, compare
from trajectory.errors import InputError
from trajectory.tracking import make_tracker


def write(folder, name, outcomes, accuracy):
    path = folder / name
    path.mkdir()
    tracker = make_tracker("jsonl", out=path, name=name, config={})
    for step, outcome in enumerate(outcomes):
        tracker.log(step, {"outcome": outcome})
    tracker.close()
    test = folder / f"{name}-test"
    test.mkdir()
    (test / "evaluation.json").write_text(json.dumps({"accuracy": accuracy}))


def test_arms_and_seeds_by_hand(tmp_path):
    write(tmp_path, "outcome-seed0", [0.0, 0.2, 0.4], 0.5)
    write(tmp_path, "outcome-seed1", [0.2, 0.4, 0.6, 0.9], 0.7)
    write(tmp_path, "prm-seed0", [0.5, 0.5, 0.5], 0.8)
    result = compare(CurvesConfig(run=tmp_path, out=tmp_path / "docs/compare"))
    assert result["outcome"]["area"] == pytest.approx(0.3)
    assert result["outcome"]["area_sd"] == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert result["outcome"]["test"] == pytest.approx(0.6)
    assert result["prm"]["seeds"] == 1
    lines = (tmp_path / "docs/compare.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 + 3
    assert (tmp_path / "docs/compare.png").stat().st_size > 5000


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no folder named ARM-seedN"):
        compare(CurvesConfig(run=tmp_path, out=tmp_path / "x"))
