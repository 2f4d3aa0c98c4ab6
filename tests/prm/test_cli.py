import json

import pytest

from prm.cli import COMMANDS, main
from tests.prm.synthetic import make_rows, make_trajectory, write_label_folder
from trajectory.store import write_jsonl


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["prm", *map(str, arguments)])
    main()


def test_the_commands_are_the_documented_ones():
    assert list(COMMANDS) == [
        "label",
        "merge",
        "judge",
        "consensus",
        "train",
        "score",
        "evaluate",
        "serve",
        "view",
    ]


def test_train_score_and_evaluate_work_from_the_command_line(base, tmp_path, monkeypatch, capsys):
    labels = write_label_folder(tmp_path / "labels", make_rows(8))
    held_out = write_label_folder(tmp_path / "held-out", make_rows(4, prefix="h"))
    write_jsonl(tmp_path / "trajectories.jsonl", [make_trajectory("+-")])
    run(
        monkeypatch, "train", "--labels", labels, "--model", base, "--out", tmp_path / "prm",
        "--epochs", 1, "--device", "cpu",
    )  # fmt: skip
    run(
        monkeypatch, "score", "--prm", tmp_path / "prm",
        "--trajectories", tmp_path / "trajectories.jsonl", "--out", tmp_path / "scores.jsonl",
    )  # fmt: skip
    assert len(json.loads((tmp_path / "scores.jsonl").read_text())["values"]) == 4
    run(
        monkeypatch, "evaluate", "--prm", tmp_path / "prm", "--labels", held_out,
        "--resamples", 100,
    )  # fmt: skip
    assert "auroc" in capsys.readouterr().out
    assert (tmp_path / "prm/evaluation/metrics.json").is_file()


def test_bad_input_ends_in_one_sentence(base, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(
            monkeypatch, "train", "--labels", tmp_path, "--model", base,
            "--out", tmp_path / "out", "--head", "nonsense",
        )  # fmt: skip
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "unknown head 'nonsense'; heads: binary, implicit, ranking, token, value" in error
    assert "Traceback" not in error
