"""Best-of-N from stored scores, splits of public data, and small bases, on tiny files."""

import gzip
import json

import pytest

from benchmarks.bon_pools import BonPoolsConfig, compare
from benchmarks.public_split import PublicSplitConfig, split
from benchmarks.small_base import SmallBaseConfig, make
from trajectory.errors import InputError
from trajectory.step_formats import read_ratings


def write(path, rows):
    """Write rows as compressed JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.fixture
def pools(tmp_path):
    """Two problems with three candidates each, and the scores of one reward model."""
    folder = tmp_path / "pools"
    folder.mkdir()
    # Per candidate: answer, right, step scores. By hand, the choice of each aggregation is below.
    candidates = {
        "a": [("7", True, [0.9, 0.6]), ("8", False, [0.2, 0.95]), ("8", False, [0.7])],
        "b": [("1,0", False, [0.5, 0.5]), ("5", True, [0.4, 0.9]), ("5.0", True, [0.45, 0.5])],
    }
    write(
        folder / "toy_candidates.jsonl.gz",
        [
            {
                "problem_id": name,
                "problem": f"problem {name}",
                "answer": "7" if name == "a" else "5",
                "candidates": [
                    {
                        "candidate_index": n,
                        "steps": ["x"] * len(scores),
                        "extracted_answer": answer,
                        "is_correct": right,
                    }
                    for n, (answer, right, scores) in enumerate(rows)
                ],
            }
            for name, rows in candidates.items()
        ],
    )
    write(
        folder / "toy_scores_some_prm.jsonl.gz",
        [
            {
                "problem_id": name,
                "candidate_index": n,
                "step_scores": scores,
                "is_correct": right,
                "n_steps": len(scores),
            }
            for name, rows in candidates.items()
            for n, (_, right, scores) in enumerate(rows)
        ],
    )
    return folder


def test_every_aggregation_chooses_what_it_should(pools, tmp_path):
    report = compare(BonPoolsConfig(pools=pools, out=tmp_path / "bon.json", resamples=100))
    accuracy = report["toy"]["accuracy"]
    prm = accuracy["some_prm"]
    best = {name: prm[name]["best"]["value"] for name in ("last", "min", "mean", "geomean")}
    # a: last 0.95 wrong; min 0.7 wrong; mean 0.75 right; geomean 0.735 right.
    # b: last 0.9 right; min 0.5 wrong; mean 0.65 right; geomean 0.6 right.
    assert best == {"last": 0.5, "min": 0.0, "mean": 1.0, "geomean": 1.0}
    # Majority (below) is wrong on a and right on b.
    assert prm["mean"]["best_minus_majority"]["value"] == 0.5
    # product: a 0.7 wrong (one step), b 0.36 right.
    assert prm["product"]["best"]["value"] == 0.5
    # Majority: a 8 (wrong), b 5 = 5.0 (right). Weighted by last: a 8 has 1.65, b 5 has 1.4.
    assert accuracy["majority"]["value"] == prm["last"]["weighted_vote"]["value"] == 0.5
    assert accuracy["random"]["value"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert accuracy["oracle"]["value"] == 1.0
    # Fewest steps: a the single-step one (wrong), b all alike (2 of 3 right).
    assert accuracy["fewest steps"]["value"] == pytest.approx(1 / 3)
    assert prm["last"]["best_by_size"] == {
        "1": pytest.approx(0.5),
        # Of the pairs the best last score is wrong in all of a; in b right, a tie of both, right.
        "2": pytest.approx((0 + 2.5 / 3) / 2),
    }
    # The last step alone is lowest in a's first candidate only.
    assert prm["lowest_is_last"] == pytest.approx(1 / 6)
    assert json.loads((tmp_path / "bon.json").read_text()) == json.loads(json.dumps(report))


def test_the_stored_correctness_is_checked(pools):
    report = compare(BonPoolsConfig(pools=pools, resamples=100))
    assert report["toy"]["answers_judged_anew"]["agree"] == 6
    assert set(report["toy"]["checks"]["some_prm"].values()) == {0}
    path = pools / "toy_scores_some_prm.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows[0]["is_correct"] = False
    rows[1]["step_scores"] = [0.5]
    write(path, rows)
    report = compare(BonPoolsConfig(pools=pools, resamples=100))
    checks = report["toy"]["checks"]["some_prm"]
    assert (checks["other_correctness"], checks["other_number_of_steps"]) == (1, 1)


def test_a_folder_without_pools_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no SET_candidates"):
        compare(BonPoolsConfig(pools=tmp_path))


def test_a_split_shares_no_problem_and_leaves_out_what_is_asked(tmp_path):
    rows = [
        {"task_id": n % 20, "model": f"m{n % 3}", "problem": f"problem {n % 20}"}
        for n in range(120)
    ]
    data = write(tmp_path / "rows.jsonl.gz", rows)
    write(tmp_path / "other.jsonl.gz", [{"problem": "Problem 3!"}])
    counts = split(
        PublicSplitConfig(
            data=data,
            key="problem",
            out=tmp_path / "out",
            train_share=0.7,
            without="model=m1",
            exclude=tmp_path / "other.jsonl.gz",
        )
    )
    sides = {
        name: [
            json.loads(line)
            for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "test")
    }
    problems = {name: {row["problem"] for row in side} for name, side in sides.items()}
    assert not problems["train"] & problems["test"]
    assert "problem 3" not in problems["train"] | problems["test"]
    assert len(problems["train"] | problems["test"]) == 19
    assert counts["overlapping_problems"] == 1
    assert counts["overlapping_rows"] == 6
    assert {row["model"] for row in sides["train"]} == {"m0", "m2"}
    assert {row["model"] for row in sides["test"]} == {"m0", "m1", "m2"}


def test_drawn_problems_keep_all_their_rows(tmp_path):
    data = write(tmp_path / "rows.jsonl.gz", [{"problem": f"p {n % 20}"} for n in range(120)])
    counts = split(
        PublicSplitConfig(
            data=data, key="problem", out=tmp_path / "out", train_share=1, train_problems=5
        )
    )
    assert (counts["train_problems"], counts["train_rows"]) == (5, 30)


def test_a_small_base_reads_the_texts_it_was_made_from(tmp_path):
    from prm.model import open_config, open_tokenizer

    row = {"prompt": "How many?", "completions": ["SELECT COUNT(*) 17"], "labels": [1]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    spec = f"trl:{tmp_path / 'rows.jsonl'}"
    assert len(read_ratings(spec)) == 1
    make(SmallBaseConfig(out=tmp_path / "base", data=spec, layers=2, hidden=32, vocabulary=300))
    tokenizer = open_tokenizer(tmp_path / "base")
    texts = ("SELECT COUNT(*) 17", "SELECT COUNT(*) 1 7", "SELECT COUNT(*) 18 \N{SNOWMAN}")
    ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert len(set(ids)) == 3, "no character is lost"
    assert "\N{SNOWMAN}" in tokenizer.decode(ids[2])
    make(SmallBaseConfig(out=tmp_path / "cut", first_layers_of=str(tmp_path / "base"), layers=1))
    assert open_config(tmp_path / "cut").num_hidden_layers == 1
    with pytest.raises(InputError, match="exactly one of"):
        SmallBaseConfig(out=tmp_path / "x")
