"""The command `prm consensus` end to end."""

import json
from dataclasses import replace

import pytest

from agent.chat import ChatFormat
from agent.engines.scripted import ScriptedEngine
from labeling.consensus import (
    Consensus,
)
from labeling.consensus_run import ConsensusConfig, consensus
from labeling.estimators import label_steps
from labeling.judge_run import JudgeConfig, judge
from tests.examples import make_labelled
from trajectory.errors import InputError
from trajectory.records import Observation, Step, ToolCall
from trajectory.run import read_manifest
from trajectory.store import read_jsonl, read_labels, write_labels


def row(name, task, results, *, correct, outcome):
    """A trajectory of calculator calls and an answer, with four rollouts per prefix."""
    steps = (
        *(
            Step(
                text=f"call {number} calculator",
                calls=(ToolCall(name="calculator", arguments="{}"),),
                observations=(Observation(content=result),),
            )
            for number, result in enumerate(results, start=1)
        ),
        Step(text=f"The answer is {results[-1]}."),
    )
    base = make_labelled(len(steps), trajectory_id=name, outcome=outcome)
    run = replace(base.trajectory, steps=steps, task=replace(base.trajectory.task, task_id=task))
    evidence = replace(base.evidence, correct=correct, failed=(0,) * len(correct))
    return replace(base, trajectory=run, evidence=evidence, labels=label_steps(evidence, "soft"))


ROWS = (
    row("a", "t1", ["x70", "x71"], correct=(2, 3, 4, 4), outcome=1.0),
    row("b", "t2", ["x80", "x81"], correct=(2, 3, 0, 0), outcome=0.0),
    row("c", "t3", ["x90", "x91"], correct=(2, 0, 0, 0), outcome=0.0),
)


def turn(prompt, seed):
    """Bad from the second call of b and c on: right about b, late about c."""
    return "VERDICT: bad" if "x81" in prompt or "x91" in prompt else "VERDICT: good"


@pytest.fixture(scope="module")
def folders(lab, tmp_path_factory):
    root = tmp_path_factory.mktemp("consensus")
    write_labels(root / "labels" / "labels.parquet", ROWS)
    policy = str(lab / "policy")
    codec = ChatFormat.load(policy, tools=()).tokenizer
    engine = ScriptedEngine(turn, codec=codec, policy=policy, max_context=100_000)
    config = JudgeConfig(labels=root / "labels", judge=policy, out=root / "judged")
    judge(config, engine=engine)
    return root


def test_the_command_writes_what_it_promises(folders, tmp_path):
    out = tmp_path / "out"
    found = consensus(
        ConsensusConfig(labels=folders / "labels", judgements=folders / "judged", out=out)
    )
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        *("consensus.jsonl", "labels.parquet", "disagreement.json", "manifest.json")
    }
    lines = list(read_jsonl(out / "consensus.jsonl", Consensus))
    verdicts = {one.trajectory_id: [step.verdict for step in one.steps] for one in lines}
    assert verdicts == {"a": [0, 1, 1], "b": [0, -1, None], "c": [None, None, None]}
    rows = {row.trajectory.trajectory_id: row for row in read_labels(out / "labels.parquet")}
    assert {row.labels.estimator for row in rows.values()} == {"consensus"}
    assert rows["a"].labels.values == (0.5, 0.75, 1.0, 1.0)
    assert rows["b"].labels.values == (0.5, 0.75, 0.0, None)
    assert rows["c"].labels.values == (0.5, None, None, None)
    written = json.loads((out / "disagreement.json").read_text())
    assert written["first_errors"] == {
        **{"both_known": 3, "same": 2, "same_without_error": 1},
        **{"rollouts_unknown": 0, "judge_unknown": 0},
    }
    assert written["votes"]["votes"] == 27
    assert len(written["pairs"]) == 5
    assert found.consensus == {"-1": 1, "0": 2, "+1": 2, "none": 4}
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.status) == ("consensus", "finished")
    assert manifest.counts["steps_kept"] == 5
    assert manifest.counts["trajectories_without_consensus"] == 1
    assert all(parent.sha256 for parent in manifest.parents)


def test_the_same_command_again_gives_the_same_files(folders, tmp_path):
    config = ConsensusConfig(
        labels=folders / "labels", judgements=folders / "judged", out=tmp_path, policy="majority"
    )
    consensus(config)
    before = [(tmp_path / n).read_bytes() for n in ("consensus.jsonl", "disagreement.json")]
    consensus(config)
    after = [(tmp_path / n).read_bytes() for n in ("consensus.jsonl", "disagreement.json")]
    assert before == after


def test_without_judgements_rollouts_and_oracle_speak(folders, tmp_path, capsys):
    found = consensus(ConsensusConfig(labels=folders / "labels", out=tmp_path / "out"))
    assert found.sources["judge"]["none"] == found.steps == 9
    assert found.votes == {}
    lines = list(read_jsonl(tmp_path / "out" / "consensus.jsonl", Consensus))
    assert [one.first_error_judge for one in lines] == [None] * 3
    assert [step.verdict for step in lines[2].steps] == [-1, None, None]
    assert "no step on which both spoke" in capsys.readouterr().out


def test_an_unknown_policy_is_refused_with_the_list(tmp_path):
    with pytest.raises(InputError, match=r"unknown policy 'vote': choose from unanimous, majority"):
        ConsensusConfig(labels=tmp_path, out=tmp_path, policy="vote")
    with pytest.raises(InputError, match=r"--examples must be >= 0"):
        ConsensusConfig(labels=tmp_path, out=tmp_path, examples=-1)


def test_bad_folders_are_refused_in_a_sentence(folders, tmp_path):
    out = tmp_path / "out"

    def refusal(**changes):
        fields = {"labels": folders / "labels", "judgements": folders / "judged", "out": out}
        with pytest.raises(InputError) as refused:
            consensus(ConsensusConfig(**(fields | changes)))
        assert not out.exists()
        return str(refused.value)

    assert "does not exist: give the folder" in refusal(labels=tmp_path / "no")
    assert "no does not exist" in refusal(judgements=tmp_path / "no")
    file = folders / "judged" / "judgements.jsonl"
    assert "judgements.jsonl is a file" in refusal(judgements=file)
    other = refusal(judgements=folders / "labels")
    assert "is not of `prm judge`: give the folder that `prm judge --out` wrote" in other
    swapped = refusal(labels=folders / "judged")
    assert "holds no labels.parquet (it is of the command `judge`)" in swapped


def test_judgements_of_other_trajectories_are_refused(folders, tmp_path):
    def refusal(*rows):
        write_labels(tmp_path / "labels.parquet", rows)
        with pytest.raises(InputError) as refused:
            consensus(
                ConsensusConfig(
                    labels=tmp_path, judgements=folders / "judged", out=tmp_path / "out"
                )
            )
        return str(refused.value)

    assert "but the labels have no such step" in refusal(ROWS[0])
    changed = row("a", "t1", ["x70", "x99"], correct=(2, 3, 4, 4), outcome=1.0)
    assert "but in the labels it reads otherwise" in refusal(changed, *ROWS[1:])


def test_an_unfinished_judge_run_is_refused(folders, tmp_path):
    folder = tmp_path / "judged"
    folder.mkdir()
    for path in (folders / "judged").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    with pytest.raises(InputError, match=r"is not finished \(it is interrupted\): run its"):
        consensus(
            ConsensusConfig(labels=folders / "labels", judgements=folder, out=tmp_path / "out")
        )
