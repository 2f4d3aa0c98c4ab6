import json

import pytest

from benchmarks.throughput import ThroughputConfig, random_requests, throughput
from trajectory.errors import InputError


def test_requests_are_reproducible_and_within_their_ranges():
    requests = random_requests(50, vocabulary=30)
    assert requests == random_requests(50, vocabulary=30)
    assert all(60 <= len(r.prompt_ids) <= 100 and max(r.prompt_ids) < 30 for r in requests)
    assert all(60 <= r.sampling.max_tokens <= 140 for r in requests)


def test_the_command_prints_a_table_and_writes_rows_and_machine_facts(tmp_path, capsys):
    out = tmp_path / "report.json"
    throughput(ThroughputConfig(batches=(4,), repeats=1, device="cpu", out=out))
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert row["batch"] == 4
    assert row["generated_tokens"] >= 8 * 60
    assert row["tokens_per_second"] == pytest.approx(row["generated_tokens"] / row["seconds"])
    assert row["generate_ratio"] > 0
    assert report["machine"]["torch_threads"] >= 1
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "machine: " in printed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batches": ()}, "--batches"),
        ({"batches": (0,)}, "--batches"),
        ({"repeats": 0}, "--repeats"),
        ({"engine": "vllm"}, "needs --model"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        ThroughputConfig(**settings)


def test_an_unknown_engine_is_refused_with_the_list():
    config = ThroughputConfig(engine="tgi", model="x")
    with pytest.raises(InputError, match="choose one of transformers, vllm"):
        throughput(config)
