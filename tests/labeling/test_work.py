"""Shared states, rounds, and what the labelling command makes of them on a known policy."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from labeling.ledger import Rollout
from labeling.run import label
from labeling.states import canonical_call, state_digests
from labeling.strategies import Adaptive, Fixed
from labeling.work import Rounds, TaskWork
from tests.examples import make_step, make_trajectory
from tests.labeling.folders import config, evidence, trajectories
from tests.labeling.walker import BAD, GOOD, START, WalkerEngine
from trajectory.errors import InputError
from trajectory.records import StopReason, ToolCall, Trajectory
from trajectory.store import read_jsonl, read_labels


def rollout(state, index, right, *, reached=(), attempt=0, stop=StopReason.ANSWERED, **more):
    owner, prefix = state
    return Rollout(
        task_id=make_trajectory(1).task.task_id,
        trajectory_id=owner if prefix else None,
        prefix=prefix,
        rollout=index,
        completer="m",
        stop=stop,
        outcome=float(right) if stop.judged else None,
        tokens=5,
        tool_calls=0,
        seed=0,
        attempt=attempt,
        reached=reached,
        **more,
    )


def two_trajectories():
    """Both begin with the same step, then differ."""
    first = make_trajectory(4, trajectory_id="a")
    other = (first.steps[0], make_step(7), make_step(8), first.steps[3])
    return first, make_trajectory(trajectory_id="b", steps=other)


def work_of(*found, same="text"):
    return TaskWork(found[0].task, found, max_steps=8, same=same)


def test_trajectories_that_begin_alike_share_states():
    first, second = two_trajectories()
    work = work_of(first, second)
    assert [node.state for node in work.nodes] == [
        (first.task.task_id, 0),
        ("a", 1),
        ("a", 2),
        ("a", 3),
        ("b", 2),
        ("b", 3),
    ]
    assert work.paths == [[0, 1, 2, 3], [0, 1, 4, 5]]
    assert [node.parent for node in work.nodes] == [None, 0, 1, 2, 1, 4]


def test_without_sharing_every_prefix_is_a_state():
    assert len(work_of(*two_trajectories(), same="never").nodes) == 7


def test_a_rollout_counts_for_every_state_it_came_through():
    first, second = two_trajectories()
    work = work_of(first, second)
    task_id = first.task.task_id
    a1, a2, _, _ = state_digests(task_id, first.steps)
    _, b2, b3, _ = state_digests(task_id, second.steps)
    work.count(rollout((task_id, 0), 0, True, reached=(a1, a2)))
    work.count(rollout((task_id, 0), 1, False, reached=(a1, b2, b3)))
    work.count(rollout((task_id, 0), 2, False, reached=("elsewhere",)))
    work.count(rollout(("a", 1), 0, True, reached=(b2,)))
    found = work.evidence(second, rollouts=4, completer="m", sampling=first.sampling)
    assert found.rollouts == (3, 3, 2, 1, 4)
    assert found.correct[:4] == (1, 2, 1, 0)
    assert found.reused == (0, 2, 2, 1, 0)
    assert found.tokens == 20


def test_evidence_of_other_trajectories_is_refused():
    (first, _) = two_trajectories()
    with pytest.raises(InputError, match="'z' after step 1, a state that no recorded trajectory"):
        work_of(first).count(rollout(("z", 1), 0, True))


def test_failed_rollouts_count_for_no_other_state():
    first, second = two_trajectories()
    work = work_of(first, second)
    digests = state_digests(first.task.task_id, first.steps)
    broken = rollout(
        (first.task.task_id, 0),
        0,
        False,
        reached=digests[:1],
        stop=StopReason.TOOL_FAILURE,
        attempt=1,
    )
    work.count(broken)
    assert work.nodes[0].own.failed == 1
    assert work.nodes[1].reused.rollouts == 0


def test_calls_are_one_state_however_they_are_written():
    one = make_step(1)
    call = one.calls[0]
    spaced = ToolCall(name=call.name, arguments=json.dumps(json.loads(call.arguments), indent=2))
    other = replace(one, text="I think differently.", calls=(spaced,))
    assert canonical_call(call) == canonical_call(spaced)
    assert state_digests("t", [one], "calls") == state_digests("t", [other], "calls")
    assert state_digests("t", [one], "text") != state_digests("t", [other], "text")
    assert state_digests("t", [one], "never") == ()


def test_a_digest_depends_on_every_step_before():
    a, b = make_step(1), make_step(2)
    assert state_digests("t", [a, b])[1] != state_digests("t", [b, b])[1]
    assert state_digests("t", [a])[0] == state_digests("t", [a, b])[0]
    assert state_digests("t", [a]) != state_digests("u", [a])


def run_rounds(rounds, results, *, kill_after=None):
    """Run rounds in an arbitrary order; return the lines written until the kill."""
    rng, lines = Random(0), []
    todo = rounds.next_round()
    while todo:
        rng.shuffle(todo)
        for node, index, attempt in todo:
            if kill_after is not None and len(lines) == kill_after:
                return lines
            line = rollout(node.state, index, results(node.state, index), attempt=attempt)
            lines.append(line)
            rounds.ended(line)
        todo = rounds.next_round()
    return lines


@pytest.mark.parametrize("kill_after", [0, 1, 5, 9, 14])
def test_a_resumed_task_asks_for_the_same_rollouts(kill_after):
    found = two_trajectories()
    strategy = Adaptive(rollouts=6, most=12, batch=2)

    def results(state, index):
        return Random(f"{state}{index}").random() < 0.3

    def rounds(recorded):
        return Rounds(work_of(*found), strategy, recorded, exclude_truncated=False)

    unbroken = run_rounds(rounds([]), results)
    begun = run_rounds(rounds([]), results, kill_after=kill_after)
    rest = run_rounds(rounds(begun), results)
    keys = [(line.state, line.rollout) for line in begun + rest]
    assert sorted(keys) == sorted((line.state, line.rollout) for line in unbroken)


def test_a_repeated_attempt_does_not_end_a_round():
    (first, _) = two_trajectories()
    rounds = Rounds(work_of(first), Fixed(rollouts=1), [], exclude_truncated=False)
    todo = rounds.next_round()
    node = todo[0][0]
    broken = rollout(node.state, 0, False, stop=StopReason.TOOL_FAILURE)
    assert not rounds.ended(broken)
    assert rounds.next_round() == []
    again = Rounds(work_of(first), Fixed(rollouts=1), [broken], exclude_truncated=False)
    assert (node.state, 0, 1) in [(n.state, i, a) for n, i, a in again.next_round()]


def test_a_state_that_came_out_differently_is_abandoned():
    (first, _) = two_trajectories()
    work = work_of(first)
    state = work.nodes[1].state
    lines = [
        rollout(state, 0, False, stop=StopReason.TOOL_FAILURE, mismatch=True, failure="differs"),
        rollout(
            state,
            0,
            False,
            stop=StopReason.TOOL_FAILURE,
            mismatch=True,
            failure="differs",
            attempt=1,
        ),
    ]
    for line in [*lines, rollout(state, 1, True)]:
        work.count(line)
    found = work.view(exclude_truncated=False).states[1]
    assert found.closed
    assert (found.n, found.c) == (0, 0)  # the one that did without the tool is no fair sample


@pytest.mark.parametrize("strategy", ["fixed", "adaptive"])
def test_labels_from_shared_states_are_right(lab, tmp_path, strategy):
    out = tmp_path / "labels"
    settings = {"same_state": "text", "samples": 3, "rollouts": 40, "strategy": strategy}
    report = label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy", ramble=0.0))
    assert report.counts["reused"] > report.counts["rollouts"] / 4
    sums = Counter()
    for row in read_labels(out / "labels.parquet"):
        good = "1+1" in row.trajectory.steps[0].text
        for prefix, kind in enumerate(("prompt", "good" if good else "bad")):
            n = row.evidence.rollouts[prefix]
            sums[kind, "n"] += n
            sums[kind, "c"] += row.evidence.correct[prefix]
            assert n >= row.evidence.reused[prefix]
    for kind, value in (("prompt", START), ("good", GOOD), ("bad", BAD)):
        assert sums[kind, "c"] / sums[kind, "n"] == pytest.approx(value, abs=0.08)


def test_adaptive_spends_less_than_fixed_and_resumes_as_finished(lab, tmp_path):
    settings = {"strategy": "adaptive", "rollouts": 16, "same_state": "text"}
    out = tmp_path / "labels"
    report = label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy"))
    assert 0 < report.counts["rollouts"] < 16 * report.counts["states"]
    again = label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy"))
    assert again.already_finished


def test_bisect_leaves_values_unknown_and_passes_right_trajectories_over(lab, tmp_path):
    out = tmp_path / "labels"
    settings = {"strategy": "bisect", "estimator": "hard", "samples": 2}
    label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy", ramble=0.9))
    measured = {r.trajectory_id for r in read_jsonl(out / "evidence.jsonl", Rollout)}
    found = trajectories(out)
    assert all(found[name].outcome == 0 for name in measured - {None})
    values = [v for row in read_labels(out / "labels.parquet") for v in row.labels.values]
    assert {None, 0.0, 1.0} == set(values)


def test_a_token_budget_is_kept_and_said(lab, tmp_path, capsys):
    out = tmp_path / "labels"
    settings = {"rollouts": 50, "max_tokens": 3000, "agent": {"concurrency": 4}}
    report = label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy"))
    spent = report.counts["tokens"] + sum(
        t.num_generated_tokens for t in trajectories(out).values()
    )
    assert 2700 < spent < 3300
    assert f"{spent} of 3000" in capsys.readouterr().out


def test_kept_continuations_are_the_rollouts(lab, tmp_path):
    out = tmp_path / "labels"
    report = label(config(lab, out, keep_continuations=True), engine=WalkerEngine(lab / "policy"))
    kept = list(read_jsonl(out / "continuations.jsonl", Trajectory))
    assert len(kept) == report.counts["rollouts"]
    ledger = {f"{k[0][0]}@{k[0][1]}/{k[1]}.{k[2]}": r for k, r in evidence(out).items()}
    assert all(ledger[t.trajectory_id].outcome == t.outcome for t in kept)


def test_shards_part_the_tasks(lab, tmp_path):
    parts = []
    for i in range(2):
        out = tmp_path / f"part{i}"
        label(config(lab, out, shard=f"{i}/2"), engine=WalkerEngine(lab / "policy"))
        parts.append({t.task.task_id for t in trajectories(out).values()})
    assert parts[0] | parts[1] == {f"t{i}" for i in range(6)}
    assert not parts[0] & parts[1]


def test_shards_part_given_trajectories_too(lab, finished, tmp_path):
    given = finished[0] / "trajectories.jsonl"
    parts = []
    for i in range(2):
        out = tmp_path / f"part{i}"
        settings = config(lab, out, trajectories=given, shard=f"{i}/2")
        label(settings, engine=WalkerEngine(lab / "policy"))
        parts.append(trajectories(out).keys())
    assert parts[0] | parts[1] == trajectories(finished[0]).keys()
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("given", [False, True])
def test_a_shard_without_a_task_is_refused(lab, finished, tmp_path, given):
    source = {"trajectories": finished[0] / "trajectories.jsonl"} if given else {}
    out = tmp_path / "labels"
    with pytest.raises(InputError, match="--shard 6/8 holds none of the 6 tasks: use at most 6"):
        label(config(lab, out, shard="6/8", **source), engine=WalkerEngine(lab / "policy"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "2/2"}, "--shard must be i/n"),
        ({"shard": "x"}, "--shard must be i/n"),
        ({"width": 1.0}, "--width"),
        ({"batch": 0}, "--batch"),
        ({"threshold": 0.0}, "--threshold"),
        ({"max_rollouts": 2}, "--max-rollouts"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"estimator": "stopped", "same_state": "text"}, "--same-state never"),
        ({"estimator": "stopped", "truncated": "exclude"}, "--truncated wrong"),
        ({"estimator": "backed_up", "same_state": "never"}, "--same-state at text or calls"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(lab, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        config(lab, tmp_path / "labels", **settings)


def test_backed_up_labels_are_right(lab, tmp_path):
    out = tmp_path / "labels"
    settings = {"strategy": "adaptive", "estimator": "backed_up", "rollouts": 64}
    settings |= {"same_state": "text", "samples": 2}
    label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy", ramble=0.3))
    covered = []
    for row in read_labels(out / "labels.parquet"):
        good = "1+1" in row.trajectory.steps[0].text
        truth = [START, *[GOOD if good else BAD] * (row.trajectory.num_steps - 1)]
        low, high = row.labels.low, row.labels.high
        covered += [lo <= v <= hi for v, lo, hi in zip(truth, low, high, strict=False)]
        assert row.labels.values[-1] == row.trajectory.outcome
    assert len(covered) > 25
    assert sum(covered) / len(covered) > 0.75


@pytest.mark.parametrize("estimator", ["ratio", "stopped"])
def test_other_estimators_label_whole_runs(lab, tmp_path, estimator):
    out = tmp_path / "labels"
    settings = {"strategy": "adaptive", "estimator": estimator}
    label(config(lab, out, **settings), engine=WalkerEngine(lab / "policy"))
    rows = read_labels(out / "labels.parquet")
    assert {row.labels.estimator for row in rows} == {estimator}
    assert all((row.labels.values[0] is None) == (estimator == "ratio") for row in rows)
