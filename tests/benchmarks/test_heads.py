"""The study of heads, on synthetic labels and a tiny base."""

import json
from dataclasses import replace

import pytest

from benchmarks import heads
from benchmarks.heads import Arm, HeadsConfig, compare, draw_rows, relabel
from benchmarks.heads_report import REFERENCE, values_of
from tests.prm.synthetic import make_base, make_rows, write_label_folder
from trajectory.errors import InputError


def with_ids(rows):
    """Rows whose steps have as many generated tokens as letters, as a sampled trajectory has."""
    return [
        replace(
            row,
            trajectory=replace(
                row.trajectory,
                steps=tuple(
                    replace(s, token_ids=tuple(range(len(s.text)))) for s in row.trajectory.steps
                ),
            ),
            # 8 rollouts of the end, as `prm label` counts a judged end.
            evidence=replace(
                row.evidence,
                rollouts=(*row.evidence.rollouts[:-1], 8),
                correct=(*row.evidence.correct[:-1], 8 * int(row.trajectory.outcome)),
            ),
        )
        for row in rows
    ]


POOL = with_ids(make_rows(30, per_task=1, rollouts=8))


def cost(row):
    measured = sum(row.evidence.rollouts) / (row.trajectory.num_steps)
    return row.trajectory.num_generated_tokens + 100 * measured / 8


def test_equal_tokens_are_spent_for_any_number_of_rollouts():
    one, eight = (draw_rows(POOL, k, seed=0) for k in ("1", "8"))
    assert len(one) == len(POOL)
    budget = sum(map(cost, one))
    assert budget - max(map(cost, eight)) - 100 < sum(map(cost, eight)) <= budget + 1e-6
    assert all(row.evidence.rollouts[:-1] == (8,) * row.trajectory.num_steps for row in eight)


def test_drawn_counts_are_a_part_of_the_measured_ones():
    pool = {row.trajectory.trajectory_id: row for row in POOL}
    for k in ("1", "4", "1|8"):
        for row in draw_rows(POOL, k, seed=1):
            whole = pool[row.trajectory.trajectory_id].evidence
            parts = zip(row.evidence.rollouts, row.evidence.correct, strict=True)
            for (n, c), big_n, big_c in zip(parts, whole.rollouts, whole.correct, strict=True):
                assert max(0, n - (big_n - big_c)) <= c <= min(n, big_c)
    mixed = {n for row in draw_rows(POOL, "1|8", seed=1) for n in row.evidence.rollouts[:-1]}
    assert mixed == {1, 8}


def test_all_rollouts_of_a_state_are_drawn_as_they_are():
    pool = {row.trajectory.trajectory_id: row for row in POOL}
    for row in draw_rows(POOL, "8", seed=2):
        whole = pool[row.trajectory.trajectory_id].evidence
        assert row.evidence.correct[:-1] == whole.correct[:-1]


def test_labels_are_those_of_the_target():
    row = next(r for r in POOL if 0 < r.evidence.correct[0] < 8)
    share = row.evidence.correct[0] / 8
    assert relabel(row, "soft").labels.values[0] == share
    assert relabel(row, "hard").labels.values[0] == 1
    bare = replace(row, evidence=replace(row.evidence, rollouts=(0,) * len(row.labels.values),
                                         correct=(0,) * len(row.labels.values)))  # fmt: skip
    assert set(relabel(bare, "soft").labels.values) == {row.trajectory.outcome}


@pytest.fixture
def config(tmp_path):
    exact = with_ids(make_rows(8, per_task=1, rollouts=64, seed=3, prefix="e"))
    held_out = with_ids(make_rows(12, seed=4, prefix="h"))
    return HeadsConfig(
        labels=write_label_folder(tmp_path / "pool", POOL),
        exact=write_label_folder(tmp_path / "exact", exact),
        held_out=write_label_folder(tmp_path / "held_out", held_out),
        model=str(make_base(tmp_path / "base")),
        out=tmp_path / "study",
        work=tmp_path / "work",
        seeds=2,
        steps=4,
    )


def test_the_study_runs_and_continues(config, monkeypatch, capsys):
    arms = (
        Arm(head="value", target="counts", rollouts="8"),
        Arm(head="ranking", target="hard", rollouts="8"),
        Arm(head="implicit", target="counts", rollouts="8"),
    )
    monkeypatch.setattr(heads, "ARMS", arms)
    report = compare(config)
    assert len(report["runs"]) == 6
    assert set(values_of(report["runs"], REFERENCE, "8", "spearman")) == {0, 1}
    assert json.loads(config.out.with_suffix(".json").read_text()) == report
    assert config.out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ranking (hard)" in capsys.readouterr().out
    monkeypatch.setattr(heads, "train", None)  # nothing is trained again
    assert compare(config)["runs"] == report["runs"]


def test_shared_tasks_and_small_pools_are_refused(config):
    with pytest.raises(InputError, match="shares tasks"):
        compare(replace(config, exact=config.labels))
    with pytest.raises(InputError, match="fewer than 8 usable rollouts"):
        few = with_ids(make_rows(3, rollouts=4, prefix="few"))
        compare(replace(config, labels=write_label_folder(config.work / "few", few)))
