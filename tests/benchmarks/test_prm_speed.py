import gzip
import json
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.peers import PeersConfig
from benchmarks.peers import compare as compare_peers
from benchmarks.tool_episodes import read_episodes
from tests.prm.synthetic import make_base, make_rows, small_config, write_label_folder
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A file like InterCode's."""
    path = tmp_path_factory.mktemp("runs") / "sql_runs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for number in range(24):
            turns = [
                {
                    "action": f"SELECT {t}",
                    "observation": "[(1,)]",
                    "reward": float(number % 2),
                    "valid": True,
                }
                for t in range(6 if number % 2 else 2)
            ]
            row = {"run": "ic_sql_m", "model": "m", "task_id": number, "query": "How many?"}
            file.write(json.dumps(row | {"turns": turns, "summary": {}}) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "model")


def test_episodes_are_drawn_by_length_and_number_of_turns(runs):
    drawn = read_episodes(runs, 5, seed=1, turns=6)
    assert drawn == read_episodes(runs, 5, seed=1, turns=6)
    assert {e.num_steps for e in drawn} == {6}
    assert {e.outcome for e in drawn} == {1.0}
    with pytest.raises(InputError, match="holds 12 such episodes, 13 are asked for"):
        read_episodes(runs, 13, seed=1, turns=2)
    with pytest.raises(InputError, match="holds 0 such"):
        read_episodes(runs, 1, seed=1, max_chars=10)
    with pytest.raises(InputError, match="does not exist"):
        read_episodes(runs.with_name("none"), 1, seed=1)


def test_scoring_is_compared_and_the_three_ways_agree(runs, base, tmp_path, capsys):
    out = tmp_path / "report.json"
    compare_peers(PeersConfig(model=str(base), runs=runs, episodes=2, repeats=1, out=out))
    scoring = json.loads(out.read_text())["scoring"]
    assert scoring["largest_difference"] < 1e-5
    assert [row["tokens"] for row in scoring["episodes"]] == [scoring["episodes"][0]["tokens"]] * 2
    assert scoring["per_prefix_ratio"]["median"] > 1
    assert "incremental_ratio" in capsys.readouterr().out


def test_a_missing_peer_is_named(runs, base):
    with pytest.raises(InputError, match="--trl-python nowhere does not exist"):
        PeersConfig(model=str(base), runs=runs, trl_python=Path("nowhere"))


@pytest.mark.slow
def test_the_load_of_the_server_is_measured_and_checked(runs, base, tmp_path, capsys):
    from prm.train import train

    labels = write_label_folder(tmp_path / "labels", make_rows(6))
    prm = train(small_config(base, labels, tmp_path / "prm", epochs=1))
    report = serving.compare(
        serving.ServingConfig(prm=prm, runs=runs, trajectories=24, clients=8, repeats=1)
    )
    assert report["answers_checked"] == 24
    assert 0 < report["share_of_time_spent_scoring"] < 1
    assert "none lost, swapped or wrong" in capsys.readouterr().out


def test_lost_swapped_and_wrong_answers_are_found(runs):
    rows = read_episodes(runs, 2, seed=0, turns=2)
    values = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    good = [
        [{"trajectory_id": row.trajectory_id, "values": v}]
        for row, v in zip(rows, values, strict=True)
    ]
    serving.check(rows, values, good)
    with pytest.raises(InputError, match="2 trajectories were sent, 1 scores came back"):
        serving.check(rows, values, good[:1])
    with pytest.raises(InputError, match="was answered with"):
        serving.check(rows, values, good[::-1])
    with pytest.raises(InputError, match="scored differently, by 0.1"):
        serving.check(rows, [[0.1, 0.2, 0.4], values[1]], good)


def test_our_side_of_the_training_has_the_loss_that_transformers_computes(base, tmp_path):
    import torch
    from transformers import AutoModelForTokenClassification

    from benchmarks.peer_training import _token_labels, ours
    from prm.heads import HEADS
    from prm.model import new_model, open_tokenizer

    folder = tmp_path / "base"
    new_model(base, HEADS["binary"], base_rate=0.7, seed=0).save_pretrained(folder)
    open_tokenizer(base).save_pretrained(folder)
    rows = [
        {"input_ids": list(range(5, 5 + size)), "positions": [1, size - 1], "labels": [1.0, 0.0]}
        for size in (9, 4, 6, 3)
    ]
    job = {"model": str(folder), "rows": rows, "rows_per_step": 2, "batch_tokens": 9}
    first, second = ours(job | {"learning_rate": 1e-3})
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32)
    ids, mask, labels = (torch.zeros(2, 9, dtype=torch.long) for _ in range(3))
    labels -= 100
    for i, row in enumerate(rows[:2]):
        size = len(row["input_ids"])
        ids[i, :size] = torch.tensor(row["input_ids"])
        mask[i, :size] = 1
        labels[i, :size] = torch.tensor(_token_labels(row))
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert first["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert second["loss"] != pytest.approx(first["loss"], abs=1e-4)  # it has learned something
    assert first["cpu_seconds"] > 0
