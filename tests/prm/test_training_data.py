"""Training from public formats, and the control with shuffled labels."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from prm.checkpoint import load_metadata, load_tasks
from prm.data import make_examples
from prm.heads import get_head
from prm.score import Scorer
from prm.train import TrainConfig, prepare, train
from prm.training_data import PublicData, load_rows, shuffle_labels
from tests.prm.synthetic import make_rows, make_tokenizer, small_config
from trajectory.errors import InputError
from trajectory.records import StopReason, Trajectory


def trl_rows(num_tasks, *, seed=0):
    """Sums of which a wrong step says so."""
    rng = random.Random(seed)
    rows = []
    for task in range(num_tasks):
        marks = [rng.random() < 0.5 for _ in range(3)]
        steps = [f"I add {'right' if mark else 'wrong'}" for mark in marks]
        rows.append({"prompt": f"add it up {task}", "completions": steps, "labels": marks})
    return rows


def intercode_rows(num_tasks):
    """Runs that succeed where the first query ran."""
    rows = []
    for task in range(num_tasks):
        good = task % 2 == 0
        turns = [
            {
                "action": "SELECT 1",
                "observation": "[(1,)]" if good else "Error: no such table",
                "reward": float(good and turn == 1),
                "valid": good,
            }
            for turn in range(2)
        ]
        rows.append(
            {
                "run": "ic_sql_multiturn_m_10_turns",
                "model": "m",
                "task_id": task,
                "query": f"how many {task}",
                "turns": turns,
                "summary": {"max_reward": float(good)},
            }
        )
    return rows


def write(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def public_config(base, spec, out, **changes) -> TrainConfig:
    """A quick run on a public format."""
    settings = {k: changes.pop(k) for k in ("neutral", "shuffle_labels") if k in changes}
    config = small_config(base, out, out, **changes)
    return replace(config, labels=None, public=PublicData(data=spec, **settings))


def test_a_binary_head_learns_step_labels_of_a_public_format(base, tmp_path):
    spec = f"trl:{write(tmp_path / 'rows.jsonl', trl_rows(40))}"
    out = tmp_path / "prm"
    train(public_config(base, spec, out, head="binary", epochs=8, patience=0))
    metadata = load_metadata(out)
    assert metadata.kind == "correctness"
    assert metadata.provenance.labels == spec
    assert metadata.provenance.estimators == ("trl",)
    assert not metadata.provenance.shuffled_labels
    tasks = load_tasks(out)
    assert len(tasks.train) == 34
    assert not set(tasks.train) & set(tasks.validation)
    fresh = load_rows(
        None, PublicData(data=f"trl:{write(tmp_path / 'n.jsonl', trl_rows(5, seed=9))}")
    )
    scores = Scorer.load(out, device="cpu").score([row.trajectory for row in fresh.rows])
    for row, values in zip(fresh.rows, scores, strict=True):
        for label, score in zip(row.labels.values[1:], values.values[1:], strict=True):
            assert (score > 0.5) == (label == 1.0)


def test_a_value_head_learns_from_the_outcomes_of_runs(base, tmp_path):
    spec = f"intercode:{write(tmp_path / 'runs.jsonl', intercode_rows(30))}"
    rows = load_rows(None, PublicData(data=spec)).rows
    config = public_config(base, spec, tmp_path / "prm")
    split = prepare(config, rows, make_tokenizer(), get_head("value"))
    assert all(e.rollouts == (1, 1, 1) for e in split.train)
    assert {e.correct for e in split.train} == {(0, 0, 0), (1, 1, 1)}


def test_runs_of_one_task_each_keep_their_own_first_state(tmp_path):
    rows = intercode_rows(2)
    same = [{**rows[0], "run": f"ic_sql_multiturn_m{n}_10_turns"} for n in range(3)]
    loaded = load_rows(None, PublicData(data=f"intercode:{write(tmp_path / 'r.jsonl', same)}"))
    examples = make_examples(loaded.rows, make_tokenizer())
    assert [e.rollouts[0] for e in examples] == [1, 1, 1], "three runs are three samples"


def test_a_head_that_the_format_cannot_train_is_refused(base, tmp_path):
    spec = f"trl:{write(tmp_path / 'rows.jsonl', trl_rows(6))}"
    with pytest.raises(InputError, match="not how often the task is solved.*--head binary"):
        train(public_config(base, spec, tmp_path / "prm"))
    assert not (tmp_path / "prm").exists()


def test_exactly_one_source_is_needed(base, tmp_path):
    config = small_config(base, tmp_path, tmp_path / "prm")
    with pytest.raises(InputError, match="exactly one of --labels"):
        replace(config, public=PublicData(data="trl:x.jsonl"))
    with pytest.raises(InputError, match="exactly one of --labels"):
        replace(config, labels=None)
    with pytest.raises(InputError, match="--neutral"):
        PublicData(neutral="good")


def test_shuffled_labels_keep_places_and_counts_and_nothing_else():
    examples = make_examples(make_rows(20), make_tokenizer())
    dealt = shuffle_labels(examples, seed=0)

    def targets(rows):
        return [
            (e.values[p], e.rollouts[p], e.correct[p])
            for e in rows
            for p in range(len(e.positions))
        ]

    before, after = targets(examples), targets(dealt)
    assert Counter(before) == Counter(after)
    assert before != after
    assert [t == (None, 0, 0) for t in before] == [t == (None, 0, 0) for t in after]
    assert [e.input_ids for e in dealt] == [e.input_ids for e in examples]
    assert dealt == shuffle_labels(examples, seed=0)
    assert dealt != shuffle_labels(examples, seed=1)


def test_a_control_with_shuffled_labels_says_so_and_has_learned_nothing(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", epochs=6, patience=0)
    train(replace(config, public=PublicData(shuffle_labels=True)))
    metadata = load_metadata(tmp_path / "prm")
    assert metadata.provenance.shuffled_labels
    better = metadata.training["base_rate_nll"] - metadata.training["held_out_nll"]
    assert better < 0.02


def test_the_outcome_of_a_trajectory_does_not_leak_into_shuffled_labels():
    row = make_rows(1)[0]
    assert isinstance(row.trajectory, Trajectory)
    assert row.trajectory.stop is StopReason.ANSWERED
    examples = make_examples(make_rows(30, seed=3), make_tokenizer())
    dealt = shuffle_labels(examples, seed=0)
    pairs = [
        (e.correct[-1] > 0, d.correct[-1] > d.rollouts[-1] / 2)
        for e, d in zip(examples, dealt, strict=True)
    ]
    agree = sum(a == b for a, b in pairs) / len(pairs)
    assert agree < 0.8
