import pytest

from labeling.evidence import open_prefixes
from labeling.ledger import Rollout
from labeling.work import TaskWork
from tests.examples import make_step, make_trajectory
from trajectory.records import Sampling, StopReason


def cut_off(stop, num_steps):
    steps = tuple(make_step(n) for n in range(num_steps))
    return make_trajectory(stop=stop, steps=steps, answer=None, outcome=None)


@pytest.fixture
def ledger():
    return []


def measured(ledger, trajectory, *, max_steps=8):
    work = TaskWork(trajectory.task, [trajectory], max_steps=max_steps, same="never")
    for rollout in ledger:
        work.count(rollout)
    return work.evidence(trajectory, rollouts=4, completer="m", sampling=Sampling())


def add(ledger, trajectory, prefix, outcomes):
    for index, outcome in enumerate(outcomes):
        ledger.append(
            Rollout(
                task_id=trajectory.task.task_id,
                trajectory_id=trajectory.trajectory_id if prefix else None,
                prefix=prefix,
                rollout=index,
                completer="m",
                stop=StopReason.ANSWERED,
                outcome=outcome,
                tokens=5,
                tool_calls=0,
                seed=0,
            )
        )


@pytest.mark.parametrize(
    ("trajectory", "expected"),
    [
        (make_trajectory(3), [1, 2]),
        (make_trajectory(1), []),
        (cut_off(StopReason.MAX_STEPS, 3), [1, 2, 3]),
        (cut_off(StopReason.MAX_STEPS, 8), [1, 2, 3, 4, 5, 6, 7]),
        (cut_off(StopReason.MAX_TOKENS, 3), [1, 2]),
        (cut_off(StopReason.MAX_TOKENS, 0), []),
        (cut_off(StopReason.TOOL_FAILURE, 3), []),
        (cut_off(StopReason.ENGINE_FAILURE, 3), []),
    ],
)
def test_prefixes_with_something_left_to_run(trajectory, expected):
    assert list(open_prefixes(trajectory, 8)) == expected


@pytest.mark.parametrize(("outcome", "right"), [(1.0, 4), (0.0, 0), (0.5, 4), (0.4, 0)])
def test_the_end_of_a_judged_trajectory_is_its_own_continuation(ledger, outcome, right):
    found = measured(ledger, make_trajectory(2, outcome=outcome))
    assert found.rollouts == (0, 0, 4)
    assert found.correct == (0, 0, right)
    assert found.tokens == 0


def test_the_end_of_a_cut_off_trajectory_counts_as_truncated(ledger):
    found = measured(ledger, cut_off(StopReason.MAX_TOKENS, 2))
    assert found.rollouts[2] == found.truncated[2] == 4


def test_the_end_of_a_trajectory_below_the_limit_is_measured(ledger):
    trajectory = cut_off(StopReason.MAX_STEPS, 2)
    add(ledger, trajectory, 2, [1.0, 0.0])
    found = measured(ledger, trajectory)
    assert (found.rollouts, found.correct) == ((0, 0, 2), (0, 0, 1))


def test_the_shared_prefix_is_that_of_the_task(ledger):
    trajectory = make_trajectory(2)
    add(ledger, trajectory, 0, [1.0, 1.0, 0.0])
    add(ledger, trajectory, 1, [1.0])
    found = measured(ledger, trajectory)
    assert found.rollouts == (3, 1, 4)
    assert found.correct == (2, 1, 4)
    assert found.tokens == 20


def test_a_trajectory_without_steps_has_only_its_prompt(ledger):
    trajectory = cut_off(StopReason.MAX_TOKENS, 0)
    add(ledger, trajectory, 0, [0.0])
    assert measured(ledger, trajectory).rollouts == (1,)
