"""`prm label` on planning tasks: every state's continuations start where its calls had led."""

import json

from tests.agent.tools.test_blocks import START
from tests.labeling.scripted_labels import call, labelled, shown, turns_so_far
from trajectory.records import StopReason
from trajectory.store import read_labels

PLAN = ["unstack b from c", "put-down b", "pick-up c", "stack c on b"]
PDDL = f"(define (problem p) (:init {''.join(f'({fact})' for fact in START)}) (:goal (on c b)))"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def move(prompt, seed):
    """Play the plan; at times try what is impossible, and rarely spoil it by taking block d."""
    done = prompt.count("Done. Hand:")
    if done == len(PLAN) or turns_so_far(prompt) == 5:
        return "The goal holds."
    odd = {0: "pick-up c", 1: "pick-up d"}.get(seed % 8, PLAN[done])
    return f"I move.\n{call('blocks', action=odd)}"


def test_blocks_are_where_the_prefix_left_them(lab, tmp_path):
    rows = [{"instance_id": n, "problem_pddl": PDDL} for n in range(2)]
    tasks = write(tmp_path / "tasks.jsonl", rows)
    out = tmp_path / "labels"
    report, kept, rollouts = labelled(
        lab, out, f"planning:blocksworld:{tasks}", move, samples=3, rollouts=4
    )
    assert (report.counts["labelled"], report.counts["failed"]) == (6, 0)
    assert {r.stop for r in rollouts} == {StopReason.ANSWERED}
    assert {r.prefix for r in rollouts} >= {0, 1, 2, 3, 4}
    spoiled = "Done. Hand: d"
    seen = set()
    for rollout in rollouts:
        steps = kept[rollout.trajectory_id].steps[: rollout.prefix] if rollout.prefix else ()
        contents = [o.content for step in steps for o in step.observations]
        if any(content.startswith(spoiled) for content in contents):
            assert rollout.outcome == 0.0
            seen.add("spoiled")
        elif sum(content.startswith("Done.") for content in contents) == len(PLAN):
            assert rollout.outcome == 1.0
            seen.add("reached")
    assert seen == {"spoiled", "reached"}
    assert {o.error for t in kept.values() for s in t.steps for o in s.observations} == {
        None, "impossible",
    }  # fmt: skip
    for row in read_labels(out / "labels.parquet"):
        assert len(row.labels.values) == row.trajectory.num_steps + 1
        assert row.labels.values[-1] == row.trajectory.outcome


def combine(prompt, seed):
    """Begin well or badly, take the smaller number from the greater one, and claim the goal."""
    number = turns_so_far(prompt)
    if number == 2:
        return "Only the target is left."
    if number == 0:
        return call("countdown", step=("30 + 93", "30 + 100")[seed % 2])
    left = shown(prompt).partition("left: ")[2].partition(". Target")[0].split(", ")
    small, great = sorted(map(int, left))
    return call("countdown", step=f"{great} - {small}")


def test_numbers_are_those_the_prefix_left(lab, tmp_path):
    rows = [{"id": f"c{n}", "input": "30,100,93", "output": "23"} for n in range(3)]
    tasks = write(tmp_path / "tasks.jsonl", rows)
    out = tmp_path / "labels"
    report, kept, rollouts = labelled(
        lab, out, f"planning:countdown:{tasks}", combine, samples=2, rollouts=3
    )
    assert (report.counts["labelled"], report.counts["failed"]) == (6, 0)
    assert {t.outcome for t in kept.values()} == {0.0, 1.0}
    assert {r.prefix for r in rollouts} == {0, 1, 2}
    for rollout in rollouts:
        assert rollout.tool_calls == 2 - rollout.prefix
        if rollout.prefix:
            first = kept[rollout.trajectory_id].steps[0].observations[0].content
            assert rollout.outcome == float(first.startswith("30 + 93 = 123."))
            assert rollout.outcome == kept[rollout.trajectory_id].outcome
    for row in read_labels(out / "labels.parquet"):
        assert set(row.labels.values[1:]) == {row.trajectory.outcome}
