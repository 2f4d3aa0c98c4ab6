from dataclasses import replace
from pathlib import Path

import pytest

from labeling.collect import Collector
from labeling.ledger import Rollout
from labeling.run import label
from tests.labeling import walker
from tests.labeling.folders import config, evidence, timeless, trajectories
from tests.labeling.walker import WalkerEngine
from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.run import read_manifest
from trajectory.store import read_jsonl, read_labels, write_jsonl


def test_the_folder_holds_what_the_command_promises(finished):
    out, report = finished
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert names == {"trajectories.jsonl", "evidence.jsonl", "labels.parquet", "manifest.json"}
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.status) == ("label", "finished")
    assert manifest.counts == report.counts
    assert report.counts["trajectories"] == report.counts["labelled"] == 12


def test_every_state_gets_its_rollouts_and_only_open_states_are_run(finished):
    out, report = finished
    expected = {(f"t{i}", 0) for i in range(6)}
    for name, trajectory in trajectories(out).items():
        expected |= {(name, t) for t in range(1, trajectory.num_steps)}
    keys = [key[:2] for key in evidence(out)]
    assert sorted(keys) == sorted((state, k) for state in expected for k in range(4))
    assert len(list(read_jsonl(out / "evidence.jsonl", Rollout))) == len(keys)
    assert report.counts["rollouts"] == len(keys)
    assert report.counts["states"] == len(expected)


def test_labels_are_the_counts_of_the_ledger(finished):
    out, _ = finished
    rollouts = evidence(out).values()
    for row in read_labels(out / "labels.parquet"):
        trajectory, last = row.trajectory, row.trajectory.num_steps
        right = [
            sum(
                r.outcome == 1.0
                for r in rollouts
                if r.state == ((trajectory.trajectory_id if t else trajectory.task.task_id), t)
            )
            for t in range(last)
        ]
        assert row.evidence.correct == (*right, 4 * int(trajectory.outcome))
        assert row.evidence.rollouts == (4,) * (last + 1)
        assert row.labels.values == tuple(c / 4 for c in row.evidence.correct)
        assert row.evidence.completer == trajectory.policy


def test_prefix_zero_is_measured_once_per_task_and_shared(finished):
    out, _ = finished
    rows = read_labels(out / "labels.parquet")
    for task in range(6):
        mine = [r for r in rows if r.trajectory.task.task_id == f"t{task}"]
        assert len(mine) == 2
        assert len({r.evidence.correct[0] for r in mine}) == 1
    assert sum(r.prefix == 0 for r in evidence(out).values()) == 6 * 4


def test_tokens_and_calls_count_only_what_follows_the_prefix(finished):
    out, report = finished
    kept = trajectories(out)
    for rollout in evidence(out).values():
        if rollout.prefix and rollout.tool_calls == 0:
            answer = kept[rollout.trajectory_id].steps[-1]
            assert rollout.tokens <= len(answer.token_ids) + 1
        assert rollout.tool_calls <= 2
        assert rollout.stop is StopReason.ANSWERED
    assert report.counts["tokens"] == sum(r.tokens for r in evidence(out).values())
    assert report.tokens == report.counts["tokens"] + sum(
        t.num_generated_tokens for t in kept.values()
    )


def test_values_are_those_of_the_policy(lab, tmp_path):
    """96 rollouts: the 99.99 % interval of the mean is about .2 wide on either side."""
    out = tmp_path / "labels"
    label(config(lab, out, rollouts=96), engine=WalkerEngine(lab / "policy"))
    for row in read_labels(out / "labels.parquet"):
        good = "1+1" in row.trajectory.steps[0].text
        truth = [walker.START] + [walker.GOOD if good else walker.BAD] * (
            row.trajectory.num_steps - 1
        )
        assert row.labels.values[:-1] == pytest.approx(truth, abs=0.2)
        assert row.labels.values[-1] == row.trajectory.outcome


def test_seeds_depend_on_the_key_and_not_on_the_schedule(lab, finished, tmp_path):
    out = tmp_path / "labels"
    slow = WalkerEngine(lab / "policy", delay_s=0.004)
    label(config(lab, out, samples=2, agent={"concurrency": 3}), engine=slow)
    assert evidence(out) == evidence(finished[0])
    assert slow.most_alive == 3


def test_another_seed_gives_other_rollouts(lab, finished, tmp_path):
    out = tmp_path / "labels"
    label(config(lab, out, samples=2, seed=1), engine=WalkerEngine(lab / "policy"))
    ours, theirs = evidence(out), evidence(finished[0])
    shared = ours.keys() & theirs.keys()
    assert shared
    assert all(ours[key].seed != theirs[key].seed for key in shared)


def test_labelling_begins_while_trajectories_are_still_being_sampled(lab, tmp_path):
    engine = WalkerEngine(lab / "policy", delay_s=0.002)
    label(config(lab, tmp_path / "labels", samples=3, agent={"concurrency": 2}), engine=engine)
    first = [i for i, prompt in enumerate(engine.prompts) if "Problem 0" in prompt]
    last = [i for i, prompt in enumerate(engine.prompts) if "Problem 5" in prompt]
    assert max(first) < min(last)


def test_a_finished_run_does_nothing_again(lab, finished, capsys):
    out, report = finished
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "manifest.json"}
    engine = WalkerEngine(lab / "policy")
    again = label(config(lab, out, samples=2), engine=engine)
    assert again.already_finished
    assert engine.stats.requests == 0
    assert "finished already" in capsys.readouterr().out
    assert read_manifest(out).counts == report.counts
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.name != "manifest.json"}


def test_given_trajectories_are_labelled_as_they_are(lab, finished, tmp_path):
    source = finished[0] / "trajectories.jsonl"
    out = tmp_path / "labels"
    report = label(config(lab, out, trajectories=source), engine=WalkerEngine(lab / "policy"))
    given, kept = trajectories(finished[0]), trajectories(out)
    assert list(kept) == list(given)
    assert all(kept[name].steps == given[name].steps for name in given)
    assert evidence(out) == evidence(finished[0])
    assert report.counts["trajectories_reencoded"] == 0


def test_trajectories_of_another_tokenizer_are_encoded_from_their_text(lab, finished, tmp_path):
    source = tmp_path / "foreign.jsonl"
    write_jsonl(
        source,
        (
            replace(
                t,
                steps=tuple(
                    replace(s, token_ids=s.token_ids[::-1], observation_ids=(1, 2, 3))
                    for s in t.steps
                ),
                prompt_ids=(4, 5),
            )
            for t in trajectories(finished[0]).values()
        ),
    )
    out = tmp_path / "labels"
    report = label(config(lab, out, trajectories=source), engine=WalkerEngine(lab / "policy"))
    assert report.counts["trajectories_reencoded"] == 12
    assert evidence(out) == evidence(finished[0])


def test_cut_off_trajectories_count_as_truncated_at_their_end(lab, tmp_path):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy", ramble=1.0)
    report = label(config(lab, out, agent={"max_steps": 2}), engine=engine)
    assert report.counts["trajectories_truncated"] == 6
    for row in read_labels(out / "labels.parquet"):
        assert row.evidence.truncated[1:] == (4, 4)
        assert row.labels.values[1:] == (0.0, 0.0)
    assert {r.prefix for r in evidence(out).values()} == {0, 1}


def test_excluded_truncation_leaves_values_unknown(lab, tmp_path):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy", ramble=1.0)
    options = {"truncated": "exclude", "estimator": "smoothed"}
    report = label(config(lab, out, agent={"max_steps": 2}, **options), engine=engine)
    rows = read_labels(out / "labels.parquet")
    assert {row.labels.values for row in rows} == {(None, None, None)}
    assert report.counts["values_unknown"] == report.counts["values"] == 18


def test_a_longer_limit_continues_where_a_shorter_one_cut_off(lab, tmp_path):
    short = tmp_path / "short"
    engine = WalkerEngine(lab / "policy", ramble=1.0)
    label(config(lab, short, agent={"max_steps": 2}), engine=engine)
    out = tmp_path / "labels"
    source = short / "trajectories.jsonl"
    label(config(lab, out, trajectories=source, rollouts=32), engine=engine)
    for row in read_labels(out / "labels.parquet"):
        good = "1+1" in row.trajectory.steps[0].text
        assert row.evidence.truncated == (0, 0, 0)
        assert row.labels.values[2] == pytest.approx(walker.GOOD if good else walker.BAD, abs=0.3)


def test_a_failed_rollout_is_repeated_once_with_another_seed(lab, tmp_path):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy")
    engine.broken = lambda request: request.request_id.startswith("t2@0/1.0#")
    report = label(config(lab, out), engine=engine)
    found = evidence(out)
    first, second = found[("t2", 0), 1, 0], found[("t2", 0), 1, 1]
    assert first.stop is StopReason.ENGINE_FAILURE
    assert first.failure == "the engine broke"
    assert second.stop is StopReason.ANSWERED
    assert first.seed != second.seed
    assert (report.counts["retried"], report.counts["failed"]) == (1, 0)


def test_a_rollout_that_fails_twice_is_left_out_of_the_counts(lab, tmp_path):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy")
    engine.broken = lambda request: request.request_id.startswith("t2@0/1.")
    report = label(config(lab, out), engine=engine)
    row = next(r for r in read_labels(out / "labels.parquet") if r.trajectory.task.task_id == "t2")
    assert (row.evidence.rollouts[0], row.evidence.failed[0]) == (4, 1)
    assert row.labels.values[0] == row.evidence.correct[0] / 3
    assert report.counts["failed"] == 1


def test_a_failed_trajectory_is_kept_but_not_labelled(lab, tmp_path):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy")
    engine.broken = lambda request: request.request_id.startswith("t2/0#")
    report = label(config(lab, out), engine=engine)
    assert trajectories(out)["t2/0"].stop is StopReason.ENGINE_FAILURE
    assert (report.counts["trajectories_failed"], report.counts["labelled"]) == (1, 5)
    assert {r.prefix for r in evidence(out).values() if r.task_id == "t2"} == {0}


@pytest.mark.parametrize("after", [0, 9, 60, 115])
def test_a_dead_engine_stops_the_run_and_costs_no_rollout(lab, finished, tmp_path, after):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy")
    engine.broken = lambda request: engine.stats.requests >= after
    with pytest.raises(InputError, match=r"the engine stopped working.*the engine broke.*resume"):
        label(config(lab, out, samples=2, agent={"concurrency": 4}), engine=engine)
    if after:
        assert not any(r.stop.failed for r in evidence(out).values())
        assert not any(t.stop.failed for t in trajectories(out).values())
    else:
        assert not out.exists()  # nothing was done, so nothing stands in the way
    whole = WalkerEngine(lab / "policy")
    label(config(lab, out, samples=2, agent={"concurrency": 4}), engine=whole)
    assert evidence(out) == evidence(finished[0])


def test_an_unexpected_exception_leaves_a_resumable_folder(lab, finished, tmp_path):
    out = tmp_path / "labels"
    engine = WalkerEngine(lab / "policy")

    def explode(request):
        if engine.stats.requests == 90:
            raise RuntimeError("a bug")
        return False

    engine.broken = explode
    with pytest.raises(RuntimeError, match="a bug"):
        label(config(lab, out, samples=2), engine=engine)
    assert read_manifest(out).status == "interrupted"
    done = len(evidence(out))
    assert 0 < done < len(evidence(finished[0]))
    engine.broken = lambda request: False
    label(config(lab, out, samples=2), engine=engine)
    assert evidence(out) == evidence(finished[0])
    assert timeless(out) == timeless(finished[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 0}, "--rollouts must be >= 1, not 0"),
        ({"samples": 0}, "--samples must be >= 1"),
        ({"level": 95.0}, r"--level must be in \[0.5, 1\)"),
        ({"estimator": "medium"}, "unknown estimator 'medium': choose from hard, soft, smoothed"),
        ({"trajectories": Path("a.jsonl"), "samples": 2}, "do not apply"),
        ({"trajectories": Path("a.jsonl"), "agent": {"num_tasks": 3}}, "do not apply"),
    ],
)
def test_settings_out_of_range_are_refused(lab, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config(lab, tmp_path / "labels", **changes)


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ({"tasks": "astrology"}, "unknown tasks 'astrology'; valid: arithmetic"),
        ({"engine": "warp"}, "unknown engine 'warp'.*transformers"),
        ({"tools": ("hammer",)}, "unknown tool 'hammer'; valid names: .*calculator"),
        ({"tasks": "missing.jsonl"}, r"missing\.jsonl"),
    ],
)
def test_unknown_names_are_refused_before_the_folder_is_made(lab, tmp_path, agent, message):
    out = tmp_path / "labels"
    with pytest.raises(InputError, match=message):
        label(config(lab, out, agent=agent))
    assert not out.exists()


def test_an_empty_task_set_is_refused(lab, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(InputError, match="none.jsonl"):
        label(config(lab, tmp_path / "labels", agent={"tasks": str(tmp_path / "none.jsonl")}))


def test_a_folder_of_another_run_is_refused(lab, finished):
    with pytest.raises(InputError, match=r"belongs to another run: rollouts was 4, now 5"):
        label(config(lab, finished[0], samples=2, rollouts=5), engine=WalkerEngine(lab / "policy"))


def test_the_plan_is_known_to_the_progress_bar(lab, tmp_path, monkeypatch):
    plans = []
    run = Collector.run

    async def spy(self, **arguments):
        await run(self, **arguments)
        plans.append((self.planned, self._ledger.totals.rollouts))

    monkeypatch.setattr(Collector, "run", spy)
    label(config(lab, tmp_path / "labels", samples=2), engine=WalkerEngine(lab / "policy"))
    planned, done = plans[0]
    assert planned == done > 0
