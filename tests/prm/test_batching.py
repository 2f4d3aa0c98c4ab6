import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.batching import QueueClosed, QueueFull, ScoringQueue
from prm.rendering import Rendered


def row(length, mark=0):
    return Rendered(input_ids=(mark,) * length, positions=(length - 1,))


def marks(rows):
    """Every trajectory's score is its own first id."""
    return [np.array([float(r.input_ids[0])]) for r in rows]


class Held:
    """Scores nothing until it is let go, and notes the batches."""

    def __init__(self):
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches = []

    def __call__(self, rows):
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([len(r.input_ids) for r in rows])
        return marks(rows)


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def queue(held):
    queue = ScoringQueue(held, batch_tokens=10, max_waiting=3)
    yield queue
    held.go.set()
    queue.close()


def occupy(queue, held):
    """Keep the scoring thread busy with a first request."""
    future = queue.submit([row(1)])
    assert held.begun.wait(30)
    return future


@given(
    requests=st.lists(st.lists(st.integers(1, 20), max_size=4), max_size=8),
    budget=st.integers(1, 40),
)
def test_every_request_gets_its_own_results_in_its_order(requests, budget):
    reports = []
    queue = ScoringQueue(marks, batch_tokens=budget, max_waiting=1000, report=reports.append)
    numbered = [
        [row(length, 100 * i + j) for j, length in enumerate(lengths)]
        for i, lengths in enumerate(requests)
    ]
    futures = [queue.submit(rows) for rows in numbered]
    queue.close()  # what was taken is answered
    for rows, future in zip(numbered, futures, strict=True):
        assert [float(r[0]) for r in future.result(timeout=0)] == [r.input_ids[0] for r in rows]
    assert sum(r.trajectories for r in reports) == sum(map(len, requests))
    assert sum(r.tokens for r in reports) == sum(map(sum, requests))
    assert all(r.tokens <= budget or r.trajectories == 1 for r in reports)


def test_what_waits_is_scored_together_up_to_the_budget(queue, held):
    futures = [occupy(queue, held), queue.submit([row(4)]), queue.submit([row(5), row(2)])]
    held.go.set()
    for future in futures:
        future.result(timeout=30)
    assert held.batches == [[1], [4, 5], [2]]


def test_a_full_queue_refuses_the_whole_request_and_says_when_to_come_back(queue, held):
    first = occupy(queue, held)
    waiting = queue.submit([row(1), row(1)])
    with pytest.raises(QueueFull, match="2 trajectories are waiting already") as refused:
        queue.submit([row(1), row(1)])
    assert refused.value.retry_after_s >= 1
    assert queue.waiting == 2
    queue.check_room(1)
    with pytest.raises(QueueFull, match="3 trajectories"):
        queue.check_room(1, ahead=1)
    held.go.set()
    assert len(first.result(timeout=30)) == 1
    assert len(waiting.result(timeout=30)) == 2


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits(queue, held):
    occupy(queue, held)
    large = queue.submit([row(1)] * 5)
    held.go.set()
    assert len(large.result(timeout=30)) == 5


def test_a_given_up_request_is_not_scored_and_makes_room(queue, held):
    first = occupy(queue, held)
    dropped, kept = queue.submit([row(4), row(3)]), queue.submit([row(5)])
    with pytest.raises(QueueFull):
        queue.check_room(1)
    assert queue.give_up(dropped) == 2
    assert queue.waiting == 1
    queue.check_room(1)
    assert queue.give_up(first) == 0  # it is being scored
    held.go.set()
    kept.result(timeout=30)
    assert held.batches == [[1], [5]]
    for future in (dropped, first):
        with pytest.raises(CancelledError):
            future.result()
    assert queue.give_up(kept) == 0
    assert len(kept.result()) == 1  # what is answered stays answered


def test_a_failing_trajectory_does_not_take_its_neighbours_along():
    begun, go = threading.Event(), threading.Event()

    def fragile(rows):
        begun.set()
        assert go.wait(30)
        if any(r.input_ids[0] == 7 for r in rows):
            raise MemoryError("too much")
        return marks(rows)

    queue = ScoringQueue(fragile, batch_tokens=100, max_waiting=10)
    queue.submit([row(1)])
    assert begun.wait(30)
    bad, good = queue.submit([row(1, 7), row(1, 8)]), queue.submit([row(1, 9)])
    go.set()
    with pytest.raises(MemoryError, match="too much"):
        bad.result(timeout=30)
    assert good.result(timeout=30)[0] == [9.0]
    later = queue.submit([row(1, 5)])
    assert later.result(timeout=30)[0] == [5.0]
    queue.close()


def test_a_closed_queue_takes_nothing(queue, held):
    held.go.set()
    queue.close()
    with pytest.raises(QueueClosed, match="ending"):
        queue.submit([row(1)])
