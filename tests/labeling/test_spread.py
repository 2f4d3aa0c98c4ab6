"""The two ends of a spread run, worker and driver, without a cluster between them."""

import os
from contextlib import closing
from dataclasses import replace

import pytest

from agent.chat import ChatFormat
from agent.setup import load_tasks
from labeling.config import RunnerConfig
from labeling.given import copy_given
from labeling.intake import Intake
from labeling.ledger import Rollout
from labeling.parcels import Parcel, pack_lines, unpack, unpack_lines
from labeling.ray_worker import LabelWorker
from labeling.run import CONTINUATIONS, EVIDENCE, TRAJECTORIES, label
from tests.labeling.folders import config, evidence, timeless, trajectories
from tests.labeling.walker import WalkerEngine
from trajectory.errors import InputError
from trajectory.records import Trajectory
from trajectory.run import open_run
from trajectory.store import read_jsonl

NAMES = (TRAJECTORIES, EVIDENCE, CONTINUATIONS)


class Bar:
    """Counts what a progress bar is told."""

    def __init__(self):
        self.done = self.grown = 0

    def advance(self, n=1, **fields):
        self.done += n

    def grow(self, n):
        self.grown += n


@pytest.fixture
def settings(lab, tmp_path):
    return config(lab, tmp_path / "labels", samples=2)


@pytest.fixture
def tasks(settings):
    return load_tasks(settings.agent)


@pytest.fixture
def intake(settings):
    with (
        open_run(settings.out, kind="label", config={}) as run,
        Intake(settings, run, NAMES) as intake,
    ):
        yield intake


def work(settings, orders, *, engine=None, delay_s=0.0):
    """Parcels of one call of a worker."""
    engine = engine or WalkerEngine(settings.agent.policy, delay_s=delay_s)
    with closing(LabelWorker(settings, engine)) as worker:
        batch = {"orders": [pack_lines(orders)]}
        return [unpack(Parcel, text) for sent in worker(batch) for text in sent["parcel"]]


def test_what_workers_send_is_the_run_of_one_process(settings, tasks, intake, finished):
    bar = Bar()
    orders = list(intake.missing(tasks))
    assert [order.task for order in orders] == tasks
    assert intake.expected(tasks) == 6 * 4
    for name, part in (("a:1", orders[:2]), ("b:1", orders[2:])):
        for parcel in work(settings, part):
            intake.take(replace(parcel, worker=name), bar)
    assert evidence(settings.out) == evidence(finished[0])
    assert timeless(settings.out) == timeless(finished[0])
    assert list(intake.missing(tasks)) == []
    assert intake.expected(tasks) == 6 * 4 + bar.grown == bar.done == intake.rollouts
    assert intake.totals.generated_tokens == finished[1].tokens


def test_lines_come_while_a_batch_is_worked_on(settings, tasks, intake):
    parcels = work(settings, intake.missing(tasks), delay_s=1.0)
    sizes = [len(list(unpack_lines(Rollout, parcel.rollouts))) for parcel in parcels]
    assert sum(sizes) == 96
    assert len([size for size in sizes if size]) >= 3
    # No rollout comes before the trajectory that it continues.
    known = set()
    for parcel in parcels:
        known |= {t.trajectory_id for t in unpack_lines(Trajectory, parcel.trajectories)}
        rollouts = list(unpack_lines(Rollout, parcel.rollouts))
        assert {r.trajectory_id for r in rollouts} - {None} <= known
        assert parcel.origins.keys() == {r.trajectory_id for r in rollouts} - {None}


def test_a_parcel_that_comes_twice_is_written_once(settings, tasks, intake, finished):
    for parcel in work(settings, intake.missing(tasks)):
        intake.take(parcel, Bar())
        written = intake.written
        intake.take(parcel, Bar())
        assert intake.written == written
    assert evidence(settings.out) == evidence(finished[0])
    assert len(list(read_jsonl(settings.out / EVIDENCE, Rollout))) == 96


def test_only_what_got_lost_is_ordered_again(settings, tasks, intake, finished):
    """A worker died with its last parcels: the next one is told what came through."""
    parcels = work(settings, intake.missing(tasks), delay_s=1.0)
    for parcel in parcels[: len(parcels) // 2]:
        intake.take(parcel, Bar())
    came = intake.written
    assert 0 < came < 12 + 96
    again = work(settings, list(intake.missing(tasks)))
    assert sum(len(list(unpack_lines(Rollout, p.rollouts))) for p in again) == 96 - intake.rollouts
    for parcel in again:
        intake.take(parcel, Bar())
    assert intake.written == 12 + 96
    assert evidence(settings.out) == evidence(finished[0])


def test_rollouts_of_a_trajectory_that_was_sampled_otherwise_are_refused(settings, tasks, intake):
    """A batch begun again samples other trajectories where samples depend on the batch."""
    parcels = work(settings, intake.missing(tasks))
    first = next(unpack_lines(Trajectory, parcels[-1].trajectories))
    other = replace(
        first, steps=(replace(first.steps[0], text="Another thought."), *first.steps[1:])
    )
    intake.take(
        Parcel(worker="dead:1", completer=first.policy, trajectories=pack_lines([other])), Bar()
    )
    for parcel in parcels:
        intake.take(parcel, Bar())
    assert trajectories(settings.out)[first.trajectory_id] == other
    kept = {rollout.trajectory_id for rollout in evidence(settings.out).values()}
    assert first.trajectory_id not in kept
    (order,) = intake.missing(tasks)
    assert order.task == first.task


def test_a_lost_trajectory_takes_its_rollouts_with_it(settings, tasks, intake):
    (parcel,) = [p for p in work(settings, intake.missing(tasks)) if p.rollouts]
    intake.take(replace(parcel, trajectories=""), Bar())
    assert {rollout.prefix for rollout in evidence(settings.out).values()} == {0}
    assert len(list(intake.missing(tasks))) == 6


def test_given_trajectories_are_labelled_as_in_one_process(lab, finished, tmp_path):
    given = finished[0] / TRAJECTORIES
    here = config(lab, tmp_path / "here", trajectories=given)
    label(here, engine=WalkerEngine(lab / "policy"))
    there = replace(here, out=tmp_path / "there")
    with open_run(there.out, kind="label", config={}) as run:
        copy_given(given, there.out / TRAJECTORIES, ChatFormat.load(here.agent.policy, tools=()))
        with Intake(there, run, NAMES) as intake:
            orders = list(intake.missing([]))
            assert not any(order.sample for order in orders)
            for parcel in work(there, orders):
                assert parcel.trajectories == ""
                intake.take(parcel, Bar())
            assert list(intake.missing([])) == []
    assert evidence(there.out) == evidence(here.out)


def test_continuations_are_kept_once_and_only_with_their_rollout(lab, tasks, tmp_path):
    settings = config(lab, tmp_path / "kept", samples=2, keep_continuations=True)
    with (
        open_run(settings.out, kind="label", config={}) as run,
        Intake(settings, run, NAMES) as intake,
    ):
        for parcel in work(settings, intake.missing(tasks), delay_s=0.5):
            intake.take(replace(parcel, rollouts=""), Bar())
            assert (settings.out / CONTINUATIONS).read_bytes() == b"" or intake.rollouts
            intake.take(parcel, Bar())
            intake.take(parcel, Bar())
    ids = [t.trajectory_id for t in read_jsonl(settings.out / CONTINUATIONS, Trajectory)]
    assert sorted(ids) == sorted(
        f"{owner}@{prefix}/{k}.{attempt}" for (owner, prefix), k, attempt in evidence(settings.out)
    )


def test_an_engine_that_is_dead_on_a_worker_is_one_sentence_and_what_came_is_kept(
    settings, tasks, intake
):
    engine = WalkerEngine(settings.agent.policy)
    engine.broken = lambda request: engine.stats.requests >= 40
    parcels = work(settings, intake.missing(tasks), engine=engine)
    with pytest.raises(InputError, match=rf"^worker .*:{os.getpid()}: the engine stopped working"):
        for parcel in parcels:
            intake.take(parcel, Bar())
    assert 0 < intake.rollouts < 96
    assert not any(rollout.stop.failed for rollout in evidence(settings.out).values())


def test_an_engine_that_fails_at_the_end_of_a_batch_is_tried_again(
    settings, tasks, intake, finished
):
    engine = WalkerEngine(settings.agent.policy)
    failed = []

    def broken(request):
        if engine.stats.requests < 120 or len(failed) >= 3:
            return False
        failed.append(request)
        return True

    engine.broken = broken
    for parcel in work(settings, intake.missing(tasks), engine=engine):
        intake.take(parcel, Bar())
    assert failed
    assert list(intake.missing(tasks)) == []
    assert evidence(settings.out).keys() >= evidence(finished[0]).keys()


def test_a_policy_that_is_not_on_the_workers_machine_is_one_sentence(settings, tasks, intake):
    elsewhere = replace(settings, agent=replace(settings.agent, policy="no/such/policy"))
    engine = WalkerEngine(settings.agent.policy)
    (parcel,) = work(elsewhere, intake.missing(tasks), engine=engine)
    with pytest.raises(InputError, match=r"^worker .*no/such/policy"):
        intake.take(parcel, Bar())


def test_a_fault_of_the_program_keeps_its_traceback(settings, tasks, intake):
    def broken(request):
        raise ZeroDivisionError("not foreseen")

    engine = WalkerEngine(settings.agent.policy)
    engine.broken = broken
    (parcel,) = work(settings, intake.missing(tasks), engine=engine)
    with pytest.raises(RuntimeError, match="(?s)worker .*in broken.*ZeroDivisionError"):
        intake.take(parcel, Bar())


def test_workers_with_different_policies_are_refused(settings, tasks, intake):
    for parcel in work(settings, list(intake.missing(tasks))[:1]):
        intake.take(parcel, Bar())
    with pytest.raises(InputError, match=r"a:1 has the policy 'other', the rollouts so far are by"):
        intake.take(Parcel(worker="a:1", completer="other"), Bar())
    order = replace(next(iter(intake.missing(tasks))), completer="other")
    with pytest.raises(InputError, match="the rollouts recorded so far are by 'other'"):
        for parcel in work(settings, [order]):
            intake.take(parcel, Bar())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ray_workers": 2}, "--ray-workers goes with --runner ray"),
        ({"runner": "ray", "ray_workers": 0}, "--ray-workers must be >= 1"),
        ({"runner": "ray", "ray_cpus": 0.0}, "--ray-cpus must be > 0"),
        ({"runner": "ray", "ray_gpus": -1.0}, "--ray-gpus must be >= 0"),
        ({"runner": "ray", "ray_tasks_per_batch": 0}, "--ray-tasks-per-batch must be >= 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        RunnerConfig(**flags)


def test_a_limit_on_tokens_does_not_go_with_workers(lab, tmp_path):
    with pytest.raises(InputError, match="--max-tokens is counted in one process"):
        config(lab, tmp_path, max_tokens=100, runner=RunnerConfig(runner="ray"))
