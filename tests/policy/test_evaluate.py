"""Evaluation: the numbers by hand, and whole runs with a scripted policy."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engines.scripted import Faults, ScriptedEngine
from agent.setup import load_tasks
from policy import evaluate as module
from policy.evaluate import EvaluateConfig, bootstrap_interval, evaluate, pass_at_k, summarize
from policy.tiny import make_tokenizer
from trajectory.errors import InputError
from trajectory.records import Observation, Step, StopReason, Task, ToolCall, Trajectory
from trajectory.store import read_jsonl


def episode(group, outcome, *, stop=StopReason.ANSWERED, calls=(), tokens=2):
    steps = (
        Step(
            text="",
            calls=tuple(ToolCall(name="c", arguments="{}") for _ in calls),
            observations=tuple(Observation(content="", error=e) for e in calls),
            token_ids=(1,) * tokens,
        ),
    )
    return Trajectory(
        trajectory_id=f"{group}/{outcome}/{stop}",
        task=Task(task_id=group, domain="d", prompt="p", answer="a"),
        steps=steps,
        stop=stop,
        outcome=outcome,
        group=group,
    )


@pytest.mark.parametrize(
    ("num", "correct", "k", "wanted"),
    [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0), (4, 4, 1, 1), (4, 3, 2, 1)],
)
def test_pass_at_k_by_hand(num, correct, k, wanted):
    assert pass_at_k(num, correct, k) == pytest.approx(wanted)


@given(
    st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    num, correct, k = case
    subsets = list(itertools.combinations([1] * correct + [0] * (num - correct), k))
    assert pass_at_k(num, correct, k) == pytest.approx(np.mean([max(s) for s in subsets]))


@pytest.mark.parametrize(("num", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0)])
def test_pass_at_k_refuses_what_is_not_defined(num, correct, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(num, correct, k)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for repeat in range(100):
        means = rng.binomial(4, 0.6, size=60) / 4
        low, high = bootstrap_interval(means.tolist(), resamples=400, seed=repeat)
        covered += low <= 0.6 <= high
    assert 88 <= covered <= 100


def test_the_interval_resamples_tasks_not_episodes():
    low, high = bootstrap_interval([0.0, 1.0] * 50)
    assert high - low == pytest.approx(2 * 1.96 * 0.05, abs=0.02)
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)


def test_the_summary_by_hand():
    result = summarize(
        [
            episode("a", 1.0, calls=(None, "timeout"), tokens=6),
            episode("a", 0.0, tokens=2),
            episode("a", None, stop=StopReason.TOOL_FAILURE, tokens=99),
            episode("b", 1.0, calls=(None, None), tokens=4),
            episode("b", None, stop=StopReason.MAX_TOKENS, tokens=8),
            episode("b", 1.0, tokens=0),
            episode("c", None, stop=StopReason.ENGINE_FAILURE),
        ],
        samples=3,
    )
    assert result.accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.low <= result.accuracy <= result.high
    assert result.pass_at == pytest.approx({1: (1 / 2 + 2 / 3) / 2, 2: 1.0, 3: 1.0})
    assert (result.num_tasks, result.tasks_without_episodes) == (2, 1)
    assert (result.episodes, result.failed, result.truncated) == (5, 2, 1)
    assert result.tokens == 4
    assert result.tool_calls == pytest.approx(4 / 5)
    assert result.tool_errors == pytest.approx(1 / 4)
    assert result.stops == {
        "answered": 4,
        "max_tokens": 1,
        "tool_failure": 1,
        "engine_failure": 1,
    }


def test_a_summary_of_nothing_but_failures_says_why():
    with pytest.raises(InputError, match="tool_failure"):
        summarize([episode("a", None, stop=StopReason.TOOL_FAILURE)], samples=1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def config(policy, out=None, **changes):
    agent = module.HeldOutAgentConfig(
        tasks="arithmetic:operations=2", policy=policy, num_tasks=5, max_turn_tokens=60
    )
    return EvaluateConfig(agent=agent, out=out, **({"samples": 4} | changes))


def engine(settings, *, faults=None):
    """A policy that answers right when the seed is even."""
    answers = {task.prompt: task.answer for task in load_tasks(settings.agent)}

    def script(prompt, seed):
        answer = next(a for p, a in answers.items() if p in prompt)
        return f"The answer is {answer if seed % 2 == 0 else -7}."

    return ScriptedEngine(
        script, codec=make_tokenizer(), policy=settings.agent.policy, faults=faults
    )


def test_a_run_writes_its_numbers_and_its_episodes(policy, tmp_path):
    settings = config(policy, tmp_path / "out")
    result = evaluate(settings, engine=engine(settings))
    episodes = list(read_jsonl(tmp_path / "out/trajectories.jsonl", Trajectory))
    assert len({e.trajectory_id for e in episodes}) == 20
    assert result.accuracy == pytest.approx(np.mean([e.outcome for e in episodes]))
    assert 0 < result.accuracy < 1
    assert set(result.pass_at) == {1, 2, 4}
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(result)))
    assert {e.task.meta["split"] for e in episodes if "split" in e.task.meta} <= {"test"}


def test_without_a_folder_nothing_is_written(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(policy)
    assert evaluate(settings, engine=engine(settings)).episodes == 20
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_resumes_to_the_same_numbers(policy, tmp_path):
    whole = config(policy, tmp_path / "whole")
    wanted = evaluate(whole, engine=engine(whole))
    cut = config(policy, tmp_path / "cut")
    evaluate(cut, engine=engine(cut))
    path = tmp_path / "cut/trajectories.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = engine(cut)
    assert evaluate(cut, engine=again) == wanted
    assert 0 < again.stats.requests < 20


def test_failed_episodes_are_left_out_and_run_again_on_resumption(policy, tmp_path):
    settings = config(policy, tmp_path / "out")
    first = evaluate(settings, engine=engine(settings, faults=Faults(fail_at=frozenset({3, 9}))))
    assert (first.episodes, first.failed) == (18, 2)
    again = engine(settings)
    second = evaluate(settings, engine=again)
    assert (second.episodes, second.failed) == (20, 0)
    assert again.stats.requests == 2


def test_other_settings_are_refused_in_the_same_folder(policy, tmp_path):
    settings = config(policy, tmp_path / "out")
    evaluate(settings, engine=engine(settings))
    other = dataclasses.replace(settings, samples=2)
    with pytest.raises(InputError, match="samples"):
        evaluate(other, engine=engine(other))


def test_no_samples_are_refused(policy):
    with pytest.raises(InputError, match="--samples"):
        config(policy, samples=0)
