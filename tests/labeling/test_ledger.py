import os
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeling import ledger as ledger_module
from labeling.ledger import Ledger, Rollout, Tally, sealed
from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.store import JsonlWriter, encode_line, read_jsonl


def rollout(index, *, prefix=1, stop=StopReason.ANSWERED, outcome=1.0, **fields):
    values = {
        "task_id": "task",
        "trajectory_id": "task/0" if prefix else None,
        "completer": "m",
        "tokens": 10,
        "tool_calls": 2,
        "seed": index,
    }
    outcome = outcome if stop.judged else None
    return Rollout(prefix=prefix, rollout=index, stop=stop, outcome=outcome, **(values | fields))


def failed(index, attempt):
    return rollout(index, stop=StopReason.TOOL_FAILURE, attempt=attempt, failure="gone")


def written(path, rollouts):
    with JsonlWriter(path) as writer:
        for one in rollouts:
            writer.append(one)


def test_counts_survive_reopening(tmp_path):
    path = tmp_path / "evidence.jsonl"
    with Ledger(path, completer="m") as first:
        first.append(rollout(0))
        first.append(rollout(1, outcome=0.0))
        first.append(rollout(2, stop=StopReason.MAX_STEPS))
        first.append(rollout(0, prefix=0, outcome=0.0))
    with Ledger(path, completer="m") as second:
        tally = second.tally(("task/0", 1))
        assert (tally.rollouts, tally.correct, tally.truncated, tally.tokens) == (3, 1, 1, 30)
        assert second.tally(("task", 0)).rollouts == 1
        assert second.totals == first.totals
        assert (second.totals.rollouts, second.totals.tool_calls) == (4, 8)


def test_what_is_missing_is_a_set_difference(tmp_path):
    with Ledger(tmp_path / "evidence.jsonl", completer="m") as ledger:
        for index in (3, 0):
            ledger.append(rollout(index))
        assert list(ledger.tally(("task/0", 1)).missing(5)) == [(1, 0), (2, 0), (4, 0)]
        assert list(ledger.tally(("task/0", 2)).missing(2)) == [(0, 0), (1, 0)]


def test_a_failed_rollout_is_repeated_once_and_counts_once(tmp_path):
    with Ledger(tmp_path / "evidence.jsonl", completer="m") as ledger:
        state = ("task/0", 1)
        ledger.append(failed(0, attempt=0))
        assert ledger.tally(state).rollouts == 0
        assert list(ledger.tally(state).missing(1)) == [(0, 1)]
        ledger.append(rollout(0, attempt=1))
        ledger.append(failed(1, attempt=0))
        ledger.append(failed(1, attempt=1))
        tally = ledger.tally(state)
        assert list(tally.missing(2)) == []
        assert (tally.rollouts, tally.correct, tally.failed, tally.tokens) == (2, 1, 1, 40)
        assert ledger.totals.retried == 2


def test_a_cut_last_line_is_dropped_and_redone(tmp_path):
    path = tmp_path / "evidence.jsonl"
    path.write_bytes(encode_line(rollout(0)) + encode_line(rollout(1))[:-9])
    with Ledger(path, completer="m") as ledger:
        assert ledger.cut_lines == 1
        assert list(ledger.tally(("task/0", 1)).missing(2)) == [(1, 0)]
        ledger.append(rollout(1))
    assert [r.rollout for r in read_jsonl(path, Rollout)] == [0, 1]


def test_a_cut_line_before_the_last_names_its_line(tmp_path):
    path = tmp_path / "evidence.jsonl"
    path.write_bytes(
        encode_line(rollout(0)) + encode_line(rollout(1))[:-9] + b"\n" + encode_line(rollout(2))
    )
    with pytest.raises(InputError, match=r"evidence\.jsonl, line 2: not JSON"):
        Ledger(path, completer="m")


def test_equal_repeated_lines_are_counted_once(tmp_path):
    path = tmp_path / "evidence.jsonl"
    written(path, [rollout(0), rollout(1), rollout(0), failed(2, 0), failed(2, 0), rollout(0)])
    with Ledger(path, completer="m") as ledger:
        assert ledger.duplicates == 3
        assert ledger.tally(("task/0", 1)).rollouts == 2
        assert ledger.totals.tokens == 30


def test_a_repeated_line_with_another_content_is_refused_by_line(tmp_path):
    path = tmp_path / "evidence.jsonl"
    written(path, [rollout(0), rollout(1)])
    with path.open("ab") as file:
        file.write(b"\n" + encode_line(rollout(0, outcome=0.0)))
    with pytest.raises(InputError, match=r"line 4: rollout 0 of 'task/0' after step 1 .* second"):
        Ledger(path, completer="m")


def test_another_model_is_refused_by_line(tmp_path):
    path = tmp_path / "evidence.jsonl"
    written(path, [rollout(0), rollout(1, completer="other")])
    with pytest.raises(InputError, match=r"line 2: a rollout by 'other'.*another folder"):
        Ledger(path, completer="m")


def test_appending_twice_or_for_another_model_is_an_error(tmp_path):
    with Ledger(tmp_path / "evidence.jsonl", completer="m") as ledger:
        ledger.append(rollout(0))
        with pytest.raises(ValueError, match="already there"):
            ledger.append(rollout(0, outcome=0.0))
        with pytest.raises(ValueError, match="is not this ledger's"):
            ledger.append(rollout(1, completer="other"))
    assert len((tmp_path / "evidence.jsonl").read_bytes().splitlines()) == 1


def test_a_line_is_in_the_file_when_append_returns(tmp_path):
    path = tmp_path / "evidence.jsonl"
    with Ledger(path, completer="m") as ledger:
        ledger.append(rollout(0))
        assert path.read_bytes() == encode_line(sealed(rollout(0)))


def test_a_line_that_was_edited_is_named(tmp_path):
    path = tmp_path / "evidence.jsonl"
    written(path, [sealed(rollout(0)), sealed(rollout(1, outcome=0.0))])
    path.write_bytes(path.read_bytes().replace(b'"outcome":0.0', b'"outcome":1.0'))
    with pytest.raises(InputError, match=r"line 2: rollout 1 of 'task/0' .* was changed after"):
        Ledger(path, completer="m")
    older = tmp_path / "older.jsonl"  # lines from before there was a check
    written(older, [rollout(0)])
    with Ledger(older, completer="m") as ledger:
        assert ledger.totals.rollouts == 1


def test_lines_reach_the_disk_within_the_stated_time_and_at_the_end(tmp_path, monkeypatch):
    now, synced = [100.0], []
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    real = os.fsync
    monkeypatch.setattr(ledger_module.os, "fsync", lambda fd: (synced.append(now[0]), real(fd)))
    with Ledger(tmp_path / "evidence.jsonl", completer="m") as ledger:
        for index in range(12):
            now[0] += 1.0
            ledger.append(rollout(index))
    assert synced == [105.0, 110.0, 112.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": 0}, "trajectory_id exactly where"),
        ({"attempt": 2}, "attempt must be in"),
        ({"tokens": -1}, "must be >= 0"),
        ({"stop": StopReason.MAX_TOKENS}, "does not go with outcome"),
    ],
)
def test_impossible_rollouts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(rollout(0), **change)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["ok", "bad", "cut", "fail"]))))
def test_counts_do_not_depend_on_the_order_of_lines(drawn):
    """Each index once: only then is a ledger free of contradictions."""
    stops = {
        "ok": {"outcome": 1.0},
        "bad": {"outcome": 0.0},
        "cut": {"stop": StopReason.MAX_STEPS},
        "fail": {"stop": StopReason.TOOL_FAILURE},
    }
    lines = []
    for index, kind in dict(drawn).items():
        if kind == "fail":
            lines.append(rollout(index, attempt=0, **stops[kind]))
        lines.append(rollout(index, attempt=int(kind == "fail"), **stops[kind]))
    tallies = []
    for order in range(3):
        Random(order).shuffle(lines)
        tally = Tally()
        for line in lines:
            tally.add(line)
        tallies.append(tally)
    assert tallies[0] == tallies[1] == tallies[2]
    assert tallies[0].rollouts == len(dict(drawn))
    assert tallies[0].correct == list(dict(drawn).values()).count("ok")
    assert not list(tallies[0].missing(10)) or len(dict(drawn)) < 10
