from hypothesis import given
from hypothesis import strategies as st

from policy.rollout import tasks_of_step


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 9), st.integers(0, 50))
def test_every_pass_visits_each_task_at_most_once(per_step, extra, seed, start):
    pool = per_step + extra
    per_pass = pool // per_step
    first = start * per_pass
    seen = [
        i
        for step in range(first, first + per_pass)
        for i in tasks_of_step(pool, per_step, step=step, seed=seed)
    ]
    assert len(seen) == len(set(seen)) == per_pass * per_step
    assert set(seen) <= set(range(pool))
