"""Parts of a labelling run, made separately, are one run once they are merged."""

import json
from dataclasses import replace

import pytest

from labeling.ledger import Rollout, sealed
from labeling.merge import MergeConfig, merge
from labeling.run import label
from tests.labeling.folders import config, evidence, timeless
from tests.labeling.walker import WalkerEngine
from trajectory.errors import InputError
from trajectory.store import read_jsonl, read_labels, write_jsonl


def run(lab, out, **settings):
    return label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy"))


@pytest.fixture
def parts(lab, tmp_path):
    """Two shards of one run."""
    folders = [tmp_path / f"part{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        run(lab, folder, shard=f"{i}/2", samples=2)
    return folders


def rewrite(path, change):
    """Change the first line of an evidence file."""
    first, *rest = read_jsonl(path, Rollout)
    write_jsonl(path, [sealed(change(first)), *rest])


def test_two_shards_merged_equal_one_run(lab, parts, finished, tmp_path):
    whole, report = finished
    out = tmp_path / "merged"
    counts = merge(MergeConfig(parts=tuple(parts), out=out))
    assert evidence(out) == evidence(whole)
    assert timeless(out) == timeless(whole)
    assert counts == report.counts
    labels = [
        {row.trajectory.trajectory_id: (row.evidence, row.labels) for row in read_labels(path)}
        for path in (out / "labels.parquet", whole / "labels.parquet")
    ]
    assert labels[0] == labels[1]
    assert run(lab, out, samples=2).already_finished


def test_a_part_given_twice_counts_once(parts, tmp_path):
    once = merge(MergeConfig(parts=tuple(parts), out=tmp_path / "once"))
    twice = merge(MergeConfig(parts=(*parts, parts[0]), out=tmp_path / "twice"))
    assert twice["duplicate_lines"] == sum(
        len((parts[0] / name).read_bytes().splitlines())
        for name in ("trajectories.jsonl", "evidence.jsonl")
    )
    assert twice | {"duplicate_lines": 0} == once


def test_conflicting_lines_are_refused_with_their_key(parts, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in parts[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    rewrite(copy / "evidence.jsonl", lambda r: replace(r, tokens=r.tokens + 1))
    with pytest.raises(InputError, match=r"rollout \d of '.*' after step .* another content"):
        merge(MergeConfig(parts=(*parts, copy), out=tmp_path / "out"))


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: parts.pop(), "shard 1/2 is missing"),
        (lambda parts: change_manifest(parts[1], status="interrupted"), "is not finished"),
        (lambda parts: change_manifest(parts[1], kind="train"), "made by 'train'"),
        (lambda parts: (parts[1] / "manifest.json").unlink(), "manifest.json does not exist"),
        (
            lambda parts: rewrite(
                parts[1] / "evidence.jsonl", lambda r: replace(r, completer="other")
            ),
            "rollouts by 'other'",
        ),
        (lambda parts: (parts[1] / "evidence.jsonl").unlink(), "does not exist"),
    ],
)
def test_bad_parts_are_refused(parts, tmp_path, spoil, message):
    spoil(parts)
    with pytest.raises(InputError, match=message):
        merge(MergeConfig(parts=tuple(parts), out=tmp_path / "out"))


def test_parts_of_different_runs_are_refused(lab, parts, tmp_path):
    other = tmp_path / "other"
    run(lab, other, shard="1/2", samples=2, rollouts=5)
    with pytest.raises(InputError, match="another rollouts than"):
        merge(MergeConfig(parts=(parts[0], other), out=tmp_path / "out"))


def test_the_result_may_not_be_one_of_the_parts(parts):
    with pytest.raises(InputError, match="is one of the parts"):
        MergeConfig(parts=tuple(parts), out=parts[0])
