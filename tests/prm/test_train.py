import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import logit

from prm import fit
from prm.calibrate import apply
from prm.card import PublishConfig
from prm.checkpoint import is_checkpoint, load_metadata, load_tasks
from prm.heads import HEADS
from prm.model import open_tokenizer
from prm.recipe import RecipeConfig
from prm.score import Scorer
from prm.train import STATE, TrainConfig, prepare, train
from tests.prm.synthetic import (
    label_row,
    make_rows,
    make_trajectory,
    small_config,
    write_label_folder,
)
from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.run import read_manifest
from trajectory.store import read_labels
from trajectory.tracking import read_metrics


def test_the_model_learns_the_synthetic_values(prm_folder):
    good, bad = Scorer.load(prm_folder, device="cpu").score(
        [make_trajectory("++", task="new"), make_trajectory("+-", task="new")]
    )
    assert good.values[1] == pytest.approx(0.9, abs=0.1)
    assert good.values[2] == pytest.approx(0.9, abs=0.1)
    assert bad.values[1] == pytest.approx(0.9, abs=0.1)
    assert bad.values[2] == pytest.approx(0.1, abs=0.1)
    training = load_metadata(prm_folder).training
    assert training["held_out_nll"] < 0.7 * training["base_rate_nll"]


def test_a_finished_run_leaves_a_manifest_and_no_state(prm_folder):
    manifest = read_manifest(prm_folder)
    assert (manifest.kind, manifest.status) == ("train", "finished")
    assert manifest.counts["train_tasks"] + manifest.counts["held_out_tasks"] == 40
    assert not (prm_folder / STATE).exists()


def test_the_same_command_again_changes_nothing(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", epochs=1)
    train(config)
    stamp = (tmp_path / "prm/prm.json").stat().st_mtime_ns
    train(config)
    assert (tmp_path / "prm/prm.json").stat().st_mtime_ns == stamp
    assert read_manifest(tmp_path / "prm").counts["train_trajectories"] > 0


def test_an_interrupted_run_continues_to_the_same_bytes(base, labels, tmp_path, monkeypatch):
    whole = small_config(base, labels, tmp_path / "whole", epochs=3, patience=0)
    train(whole)
    parts = replace(whole, out=tmp_path / "parts")

    from prm import fit

    measured = fit.predict
    calls = []

    def interrupt(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # at the end of the second epoch, before it is saved
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(fit, "predict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    assert not is_checkpoint(parts.out)
    assert read_manifest(parts.out).status == "interrupted"
    monkeypatch.setattr(fit, "predict", measured)
    train(parts)
    for name in ("model.safetensors", "prm.json", "tasks.json"):
        assert (parts.out / name).read_bytes() == (whole.out / name).read_bytes(), name


def test_another_run_does_not_continue_in_the_folder(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", epochs=1)
    train(config)
    with pytest.raises(InputError, match="learning_rate"):
        train(replace(config, learning_rate=1e-4))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_leaves_a_plain_folder(base, labels, tmp_path, precision):
    config = small_config(base, labels, tmp_path / "prm", lora_rank=4, learning_rate=1e-2, epochs=3)
    train(replace(config, precision=precision))
    saved = load_file(config.out / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    names = {p.name for p in config.out.iterdir()}
    assert "adapter_config.json" not in names
    training = load_metadata(config.out).training
    assert training["held_out_nll"] < training["base_rate_nll"]
    assert 0 < Scorer.load(config.out).score([make_trajectory("+")])[0].values[0] < 1


def test_the_binary_head_predicts_correctness(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", head="binary", position="action")
    train(config)
    metadata = load_metadata(config.out)
    assert (metadata.kind, metadata.position, metadata.aggregation) == (
        "correctness",
        "action",
        "min",
    )
    config_json = json.loads((config.out / "config.json").read_text())
    assert config_json["id2label"] == {"0": "wrong", "1": "right"}
    scores = Scorer.load(config.out).score([make_trajectory("+-")])[0]
    assert (scores.kind, scores.position) == ("correctness", "action")


def test_no_task_is_on_both_sides(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm")
    split = prepare(
        config, read_labels(labels / "labels.parquet"), open_tokenizer(base), HEADS["value"]
    )
    tasks = split.tasks()
    assert set(tasks.train).isdisjoint(tasks.validation)
    assert len(tasks.validation) == round(0.15 * 40)


def test_broken_numbers_keep_the_best_checkpoint_and_say_so(base, labels, tmp_path, monkeypatch):
    config = small_config(base, labels, tmp_path / "prm", epochs=3, patience=0)
    monkeypatch.setattr(
        "prm.fit.learning_rate_at", lambda step, total, peak: 1e30 if 3 * step >= total else 1e-3
    )
    with pytest.raises(InputError, match=r"broke down .*epoch 1 is kept in .*--learning-rate"):
        train(config)
    assert load_metadata(config.out).training["best_epoch"] == 1


def test_broken_numbers_in_the_first_epoch_leave_no_checkpoint(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", learning_rate=1e30)
    with pytest.raises(InputError, match="none kept"):
        train(config)
    assert not is_checkpoint(config.out)


def test_curves_are_tracked(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", publish=PublishConfig(track="jsonl"))
    train(config)
    entries = read_metrics(config.out)
    assert all("train/loss" in e.metrics for e in entries)
    assert sum("held_out/loss" in e.metrics for e in entries) == 2


def test_dropped_rows_are_counted(base, tmp_path):
    rows = [*make_rows(6), label_row(make_trajectory("+" * 9, task="long"), "+" * 9)]
    labels = write_label_folder(tmp_path / "labels", rows)
    config = small_config(base, labels, tmp_path / "prm", max_length=250, epochs=1)
    with pytest.raises(InputError, match="--on-long drop"):
        train(config)
    train(replace(config, out=tmp_path / "other", on_long="drop"))
    assert read_manifest(tmp_path / "other").counts["dropped_long"] == 1
    assert "long" not in load_tasks(tmp_path / "other").train


def stopped(row):
    trajectory = replace(row.trajectory, stop=StopReason.TOOL_FAILURE, outcome=None)
    return replace(row, trajectory=trajectory)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_labels_that_are_all_unknown_are_refused(base, tmp_path, head):
    rows = []
    for row in map(stopped, make_rows(4)):
        size = row.trajectory.num_steps + 1
        zeros, nothing = (0,) * size, (None,) * size
        rows.append(
            replace(
                row,
                evidence=replace(row.evidence, rollouts=zeros, correct=zeros),
                labels=replace(row.labels, values=nothing, low=nothing, high=nothing),
            )
        )
    labels = write_label_folder(tmp_path / "labels", rows)
    with pytest.raises(InputError, match="none of the 8 trajectories has a usable label"):
        train(small_config(base, labels, tmp_path / "prm", head=head))


@pytest.mark.parametrize(
    ("column", "entry", "value", "message"),
    [
        ("values", 1, 1.5, "t2/1: prefix 1: value 1.5 not in"),
        ("values", 0, math.nan, r"values\[0\]: expected a finite number"),
        ("correct", 0, 9, "t2/1: prefix 0: correct 9 .* exceed rollouts 8"),
        ("rollouts", 2, -1, "t2/1: prefix 2: .*negative"),
    ],
)
def test_impossible_labels_in_a_folder_are_refused_with_their_row(
    base, tmp_path, column, entry, value, message
):
    labels = write_label_folder(tmp_path / "labels", make_rows(4))
    path = labels / "labels.parquet"
    table = pq.read_table(path)
    (name,) = [n for n in table.column_names if n.split(".")[-1].endswith(column)]
    cells = table[name].to_pylist()
    cells[5][entry] = value
    index = table.column_names.index(name)
    changed = pa.array(cells, type=table.schema.field(name).type)
    pq.write_table(table.set_column(index, table.schema.field(name), changed), path)
    with pytest.raises(InputError, match=rf"labels.parquet, row 6: .*{message}"):
        train(small_config(base, labels, tmp_path / "prm"))
    assert not (tmp_path / "prm/prm.json").exists()


def test_a_head_first_run_that_was_interrupted_continues_to_the_same_bytes(
    base, labels, tmp_path, monkeypatch
):
    recipe = RecipeConfig(head_first=2, calibration="isotonic")
    whole = small_config(base, labels, tmp_path / "whole", epochs=1, patience=0, recipe=recipe)
    train(whole)
    parts = replace(whole, out=tmp_path / "parts")
    measured, calls = fit.predict, []

    def interrupt(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # inside the first stage
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(fit, "predict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    monkeypatch.setattr(fit, "predict", measured)
    train(parts)
    for name in ("model.safetensors", "prm.json"):
        assert (parts.out / name).read_bytes() == (whole.out / name).read_bytes(), name


@pytest.mark.parametrize("method", ["isotonic", "none"])
def test_the_calibration_of_choice_is_stored_and_applied(base, labels, tmp_path, method, capsys):
    recipe = RecipeConfig(calibration=method)
    config = small_config(base, labels, tmp_path / "prm", recipe=recipe)
    train(config)
    stored = load_metadata(config.out).calibration
    assert (stored.method, stored.fitted) == (method, method == "isotonic")
    assert stored.ece_cross_fitted is not None
    scorer, row = Scorer.load(config.out, device="cpu"), make_trajectory("+-")
    raw = scorer.score([row], calibrated=False)[0].values
    values = scorer.score([row])[0].values
    assert values == pytest.approx(apply(stored, logit(np.asarray(raw))), abs=1e-6)
    assert (values == raw) == (method == "none")
    said = capsys.readouterr().err
    wanted = "after on tasks left out of the fit" if method == "isotonic" else "not calibrated"
    assert wanted in said


def test_one_task_is_refused(base, tmp_path):
    labels = write_label_folder(tmp_path / "labels", make_rows(1, per_task=5))
    with pytest.raises(InputError, match="one task only"):
        train(small_config(base, labels, tmp_path / "prm"))


def test_missing_labels_are_refused(base, tmp_path):
    with pytest.raises(InputError, match=r"labels.parquet does not exist"):
        train(small_config(base, tmp_path, tmp_path / "prm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "tokens"}, "unknown head 'tokens'"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_tokens": 0}, "--batch-tokens must be at least 1"),
        ({"lora_rank": -1}, "must not be negative"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"learning_rate": 0.0}, "must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, changes, message):
    settings = {"labels": tmp_path, "model": "base", "out": tmp_path / "out"}
    with pytest.raises(InputError, match=message):
        TrainConfig(**(settings | changes))
