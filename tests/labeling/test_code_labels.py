"""`prm label` on programming tasks: a notebook before the answer, hidden tests after it."""

import pytest

from tests.agent.tasks.code_examples import MBPP, write_rows
from tests.labeling.scripted_labels import call, labelled, shown, turns_so_far
from trajectory.records import StopReason
from trajectory.store import read_labels


def work(prompt, seed):
    """Choose a slice, err, read the slice back, write the function with it, and end."""
    number = turns_so_far(prompt)
    if number == 0:
        return f"I choose.\n{call('python', code=f'last = {(-1, 0)[seed % 3 == 0]}')}"
    if number == 1:
        return "I err.\n```python\nlst\n```"
    if number == 2:
        return f"I look.\n{call('python', code='print(last)')}"
    if number == 3:
        last = shown(prompt).strip()
        return (
            "I write.\n```python\ndef swap(items):\n"
            f"    return [items[{last}], *items[1:-1], items[0]]\n\nprint(swap([1, 2, 3]))\n```"
        )
    return "The function is finished."


@pytest.mark.slow
def test_hidden_tests_judge_what_the_state_of_a_prefix_leads_to(lab, tmp_path):
    out = tmp_path / "labels"
    spec = write_rows(tmp_path, {**MBPP, "split": "train"})
    report, kept, rollouts = labelled(lab, out, spec, work, samples=4, rollouts=1)
    assert (report.counts["labelled"], report.counts["failed"]) == (4, 0)
    assert {t.outcome for t in kept.values()} == {0.0, 1.0}
    assert {t.num_steps for t in kept.values()} == {5}
    assert {r.stop for r in rollouts} == {StopReason.ANSWERED}
    assert {r.prefix for r in rollouts} == {0, 1, 2, 3, 4}
    for rollout in rollouts:
        assert rollout.tool_calls == 4 - rollout.prefix
        if rollout.prefix:
            trajectory = kept[rollout.trajectory_id]
            assert rollout.outcome == trajectory.outcome
            assert rollout.outcome == float("-1" in trajectory.steps[0].text)
    observed = [o.error for t in kept.values() for s in t.steps for o in s.observations]
    assert set(observed) == {None, "NameError"}
    for row in read_labels(out / "labels.parquet"):
        assert set(row.labels.values[1:]) == {row.trajectory.outcome}
    texts = [s.text + "".join(o.content for o in s.observations) for t in kept.values()
             for s in t.steps]  # fmt: skip
    assert not any(test in text for text in texts for test in MBPP["test_list"])
