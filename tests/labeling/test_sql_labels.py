"""`prm label` on questions about a database, whose tool has state that the policy writes."""

import json
import re

import pytest

from agent.chat import ChatFormat
from agent.engines.scripted import ScriptedEngine
from agent.tools.sql_database import database_from_script
from labeling.run import label
from tests.labeling.folders import config, evidence, trajectories
from tests.labeling.walker import make_tasks
from trajectory.errors import InputError
from trajectory.formats import format_call
from trajectory.records import StopReason, ToolCall
from trajectory.store import read_labels

SCRIPT = """
CREATE TABLE pet(name TEXT, kind TEXT);
INSERT INTO pet VALUES ('Rex', 'dog'), ('Tom', 'cat'), ('Ada', 'cat');
"""
GOLD = "SELECT count(*) FROM pet WHERE kind = 'cat'"


@pytest.fixture
def tasks(tmp_path):
    """Two questions about one database."""
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "pets.sqlite").write_bytes(database_from_script(SCRIPT))
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"How many cats, {i}?", "query": GOLD, "db_id": "pets"}
        for i in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(query):
    return format_call(ToolCall(name="sql", arguments=json.dumps({"query": query})))


def turn(prompt, seed):
    """Guess a kind and write it down, err, read it back, and answer with what was read."""
    number = prompt.count("<|im_start|>assistant") - 1
    if number == 0:
        kind = ("cat", "dog")[seed % 2]
        return "I write.\n" + call(f"CREATE TABLE draft AS SELECT '{kind}' AS kind")
    if number == 1:
        return "I err.\n" + call("UPDATE draft SET kind = 'cow'; SELECT knd FROM draft")
    if number == 2:
        return "I read.\n" + call("SELECT count(*) AS cows FROM draft WHERE kind = 'cow'")
    if number == 3:
        return "I undo.\n" + call(f"UPDATE draft SET kind = '{written(prompt)}' RETURNING kind")
    shown = prompt.rpartition("<|im_start|>tool\n")[2].splitlines()[2]
    return f"Done.\n```sql\nSELECT count(*) FROM pet WHERE kind = '{shown}'\n```"


def written(prompt):
    """The kind in the first call, as the prompt holds it."""
    return re.findall(r"SELECT '(cat|dog)' AS kind", prompt)[-1]


def settings(lab, out, tasks, *, agent=None, **changes):
    options = {"tasks": f"sql:{tasks}", "allow_unsafe_tools": True, "sandbox": "unsafe"}
    options |= {"max_turn_tokens": 400, "concurrency": 3}
    return config(lab, out, agent=options | (agent or {}), rollouts=1, **changes)


def engine(lab):
    codec = ChatFormat.load(str(lab / "policy"), tools=()).tokenizer
    return ScriptedEngine(turn, codec=codec, policy=str(lab / "policy"), max_context=100_000)


def test_writes_of_a_prefix_are_there_for_its_continuations(lab, tasks, tmp_path):
    out = tmp_path / "labels"
    report = label(settings(lab, out, tasks, samples=2), engine=engine(lab))
    kept = trajectories(out)
    assert {t.num_steps for t in kept.values()} == {5}
    assert {t.outcome for t in kept.values()} == {0.0, 1.0}
    observations = [o for t in kept.values() for s in t.steps for o in s.observations]
    assert [o.content for o in observations[:3]] == [
        "done",
        "1 row changed\n\nError in statement 2 (those before it took effect): no such column: knd",
        "cows\n----\n1\n(1 row)",
    ]
    assert [o.error for o in observations[:3]] == [None, "sql_error", None]
    rollouts = evidence(out).values()
    assert {r.prefix for r in rollouts} == {0, 1, 2, 3, 4}
    assert {r.stop for r in rollouts} == {StopReason.ANSWERED}
    for rollout in rollouts:
        if rollout.prefix:
            assert rollout.answer == kept[rollout.trajectory_id].answer
            assert rollout.outcome == kept[rollout.trajectory_id].outcome
            assert rollout.tool_calls == 4 - rollout.prefix
    assert (report.counts["labelled"], report.counts["failed"]) == (4, 0)
    for row in read_labels(out / "labels.parquet"):
        assert set(row.labels.values[1:]) == {row.trajectory.outcome}
    assert {t.meta["isolation"] for t in kept.values()} == {"none"}


def test_given_trajectories_find_their_database_again(lab, tasks, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    label(settings(lab, first, tasks), engine=engine(lab))
    given = settings(lab, second, tasks, trajectories=first / "trajectories.jsonl")
    label(given, engine=engine(lab))
    assert evidence(second) == evidence(first)


def test_given_trajectories_without_their_database_are_refused(lab, tasks, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    label(settings(lab, first, tasks), engine=engine(lab))
    (tmp_path / "database" / "pets.sqlite").unlink()
    with pytest.raises(InputError, match=r"cannot read the database .*pets\.sqlite: No such file"):
        label(settings(lab, second, tasks, trajectories=first / "trajectories.jsonl"))
    assert not second.exists()


def test_the_tool_on_tasks_without_a_database_is_refused_before_the_folder_is_made(lab, tmp_path):
    problems = make_tasks(tmp_path / "problems.jsonl", 2)
    out = tmp_path / "labels"
    agent = {"tasks": str(problems), "tools": ("calculator", "sql")}
    with pytest.raises(InputError, match="task 't0' of the domain 'jsonl' has no database"):
        label(settings(lab, out, None, agent=agent))
    assert not out.exists()
