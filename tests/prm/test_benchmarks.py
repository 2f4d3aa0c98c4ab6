"""``prm evaluate --benchmark`` on small files, with a model whose scores are known."""

import gzip
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.benchmarks.run import PublicBenchmark, draw_problems
from prm.checkpoint import load_tasks
from prm.evaluate import EvaluateConfig, evaluate
from prm.train import train
from tests.prm.synthetic import small_config
from tests.prm.test_training_data import intercode_rows, public_config, trl_rows, write
from trajectory.errors import InputError
from trajectory.step_formats.rows import problem_id


@pytest.fixture(scope="module")
def step_prm(base, tmp_path_factory):
    """A correctness model that knows `wrong` steps."""
    folder = tmp_path_factory.mktemp("step")
    spec = f"trl:{write(folder / 'rows.jsonl', trl_rows(40))}"
    return train(public_config(base, spec, folder / "prm", head="binary", epochs=8, patience=0))


@pytest.fixture(scope="module")
def shuffled_prm(base, tmp_path_factory):
    """The same, on shuffled labels."""
    folder = tmp_path_factory.mktemp("shuffled")
    spec = f"trl:{write(folder / 'rows.jsonl', trl_rows(20))}"
    config = public_config(base, spec, folder / "prm", head="binary", shuffle_labels=True)
    return train(config)


def processbench_row(number, label, *, problem=None):
    """Three steps; from the wrong one on they say so."""
    steps = ["I add wrong" if 0 <= label <= n else "I add right" for n in range(3)]
    return {
        "id": f"p{number}",
        "problem": problem or f"problem number {number}",
        "steps": steps,
        "final_answer_correct": label < 0,
        "label": label,
    }


def config(prm, benchmark, data, out, **changes) -> EvaluateConfig:
    """A quick measurement."""
    public = PublicBenchmark(benchmark=benchmark, data=data, **changes)
    return EvaluateConfig(prm=prm, public=public, out=out, resamples=100, device="cpu")


def test_processbench_of_a_model_that_knows_the_answer(step_prm, shuffled_prm, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "gsm8k.jsonl", [processbench_row(n, n % 3 - 1) for n in range(9)])
    write(data / "math.jsonl", [processbench_row(n, n % 3 - 1) for n in range(9, 18)])
    report = evaluate(
        config(step_prm, "processbench", data, tmp_path / "out", shuffled_prm=shuffled_prm)
    )
    figures = report["arms"]["PRM"]
    assert figures["gsm8k_f1_tuned"]["value"] == figures["f1_tuned"]["value"] == 1.0
    assert figures["f1_fixed"]["value"] > 0.7
    assert figures["step_auroc"]["value"] == 1.0
    assert set(report["arms"]) == {"PRM", "shuffled labels", "position + length"}
    assert report["arms"]["position + length"]["f1_tuned"]["value"] < 0.9
    assert report["arms"]["shuffled labels"]["f1_fixed"]["value"] < 0.9
    assert report["counts"]["problems"] == 18
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 0


def test_problems_that_were_trained_on_are_left_out_whatever_the_format(step_prm, tmp_path):
    rows = [processbench_row(n, 0, problem=f"Add it up {n}!") for n in range(40)]
    rows += [processbench_row(n, -1) for n in range(100, 103)]
    data = write(tmp_path / "math.jsonl", rows)
    report = evaluate(config(step_prm, "processbench", data, tmp_path / "out"))
    assert report["counts"]["excluded_training_problems"] == 34
    assert report["counts"]["problems"] == 9
    seen = set(load_tasks(step_prm).train)
    row = next(row for row in rows if problem_id(row["problem"]) in seen)
    with pytest.raises(InputError, match="trained on all 1 problems"):
        data = write(tmp_path / "one.jsonl", [row])
        evaluate(config(step_prm, "processbench", data, tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()


def test_agentprocessbench_reads_messages_which_do_not_say_whether_calls_ran(step_prm, tmp_path):
    rows = []
    for n in range(6):
        word = "right" if n % 2 else "wrong"
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        rows.append(
            {
                "data_source": "x",
                "query_index": n,
                "sample_index": 0,
                "question": f"question {n}",
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": f"I add {word}", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c", "content": "3"},
                    {"role": "assistant", "content": f"I add {word}"},
                ],
                "step_labels": {"1": 1 if n % 2 else -1, "3": 0},
                "final_label": 1,
            }
        )
    data = write(tmp_path / "a.jsonl", rows)
    report = evaluate(config(step_prm, "agentprocessbench", data, tmp_path / "out"))
    assert set(report["arms"]) == {"PRM", "position + length"}
    figures = report["arms"]["PRM"]
    assert figures["step_accuracy"]["value"] <= 0.5, "neutral steps cannot be met"
    assert report["labelled_steps"] == 6


def test_intercode_ranks_actions_by_success_and_chooses_runs(base, tmp_path):
    spec = f"intercode:{write(tmp_path / 'train.jsonl', intercode_rows(40))}"
    prm = train(public_config(base, spec, tmp_path / "prm", epochs=8, patience=0))
    rows = []
    for task in range(100, 108):
        good, bad = intercode_rows(2)
        rows += [
            {**good, "task_id": task, "run": "ic_sql_a"},
            {**bad, "task_id": task, "run": "ic_sql_b"},
        ]
    data = write(tmp_path / "test.jsonl", rows)
    report = evaluate(config(prm, "intercode", data, tmp_path / "out"))
    figures = report["arms"]["PRM"]
    assert figures["auroc"]["value"] == figures["auroc_before_last"]["value"] == 1.0
    assert figures["turn_1_auroc"]["value"] == figures["m_auroc"]["value"] == 1.0
    assert figures["best_last"]["value"] == 1.0
    assert report["arms"]["execution ok"]["auroc"]["value"] == 1.0
    assert report["choices"]["random"]["value"] == 0.5
    assert report["choices"]["oracle"]["value"] == 1.0
    assert report["choices"]["majority"]["value"] == 1.0, "errors do not vote"


def test_best_of_n_chooses_among_the_candidates_of_a_pool(step_prm, tmp_path):
    rows = [
        {
            "problem_id": f"p{n}",
            "problem": f"pool problem {n}",
            "answer": "1",
            "candidates": [
                {
                    "candidate_index": i,
                    "steps": ["I add right", f"I add {'right' if i == 2 else 'wrong'}"],
                    "extracted_answer": "1" if i == 2 else "2",
                    "is_correct": i == 2,
                }
                for i in range(3)
            ],
        }
        for n in range(4)
    ]
    path = tmp_path / "pool.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    report = evaluate(config(step_prm, "best_of_n", path, tmp_path / "out"))
    assert report["arms"]["PRM"]["best_min"]["value"] == 1.0
    assert report["choices"]["majority"]["value"] == 0.0
    assert report["choices"]["random"]["value"] == pytest.approx(1 / 3)
    assert report["choices"]["oracle"]["value"] == 1.0


def test_what_does_not_fit_is_dropped_and_counted(step_prm, tmp_path):
    rows = [processbench_row(n, n % 3 - 1) for n in range(6)]
    rows[0]["steps"] = ["x" * 600, *rows[0]["steps"][1:]]
    data = write(tmp_path / "math.jsonl", rows)
    report = evaluate(config(step_prm, "processbench", data, tmp_path / "out"))
    assert report["counts"]["dropped_long"] == 1
    assert report["counts"]["trajectories"] == 5


def test_a_drawn_part_of_the_problems_is_counted(step_prm, tmp_path):
    data = write(tmp_path / "math.jsonl", [processbench_row(n, n % 3 - 1) for n in range(12)])
    report = evaluate(config(step_prm, "processbench", data, tmp_path / "out", problems=5))
    assert report["counts"]["problems"] == 5
    assert report["counts"]["problems_not_drawn"] == 7


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    count=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_problems_are_drawn_evenly_from_subsets(sizes, count, seed):
    subsets = {f"{s}/{n}": str(s) for s, size in enumerate(sizes) for n in range(size)}
    drawn = draw_problems(subsets, count, seed=seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(subsets))
    found = [sum(subsets[p] == str(s) for p in drawn) for s in range(len(sizes))]
    most = max(found)
    assert all(f == size or f >= most - 1 for f, size in zip(found, sizes, strict=True))


def test_bad_settings_are_refused(step_prm, base, labels, tmp_path):
    data = write(tmp_path / "math.jsonl", [processbench_row(n, n % 3 - 1) for n in range(4)])
    with pytest.raises(InputError, match="exactly one of --labels"):
        EvaluateConfig(prm=step_prm)
    with pytest.raises(InputError, match="exactly one of --labels"):
        replace(config(step_prm, "processbench", data, tmp_path), labels=labels)
    with pytest.raises(InputError, match="go together"):
        PublicBenchmark(benchmark="processbench")
    with pytest.raises(InputError, match="belong to --benchmark"):
        PublicBenchmark(problems=5)
    with pytest.raises(InputError, match="was not trained with --shuffle-labels"):
        evaluate(config(step_prm, "processbench", data, tmp_path / "o", shuffled_prm=step_prm))
    with pytest.raises(InputError, match=r"math\.jsonl, line 1: idx: Field required"):
        evaluate(config(step_prm, "prmbench", data, tmp_path / "o"))
    assert not (tmp_path / "o").exists()
    assert small_config(base, labels, tmp_path).labels == labels
