"""Optimization end to end on a two-layer policy that knows four problems, more or less."""

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.engines.base import EngineError, EngineOptions, EngineStats
from agent.engines.transformers import TransformersEngine
from agent.setup import load_tasks, open_agent
from labeling.config import LabelConfig
from labeling.run import label
from policy.evaluate import EvaluateConfig, evaluate
from policy.learner import make_learner
from policy.optimize import OptimizeConfig, optimize
from policy.rollout import episode_specs, load_pool, run_groups
from prm.score import Scorer
from prm.train import TrainConfig, train
from tests.policy.small_policy import agent_config, make_small_policy
from trajectory.errors import InputError
from trajectory.records import StopReason, Trajectory
from trajectory.run import read_manifest
from trajectory.tracking import read_metrics


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_small_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def prm(policy, tmp_path_factory):
    """A value model labelled with the policy's own rollouts."""
    root = tmp_path_factory.mktemp("prm")
    label(LabelConfig(agent=agent_config(policy), out=root / "labels", rollouts=2, samples=2))
    train(
        TrainConfig(
            labels=root / "labels",
            model=str(policy),
            out=root / "prm",
            epochs=1,
            learning_rate=1e-3,
            device="cpu",
        )
    )
    return root / "prm"


def config(policy, out, **changes):
    agent = agent_config(policy, **changes.pop("agent", {}))
    fields = {
        "agent": agent,
        "out": out,
        "steps": 2,
        "tasks_per_step": 2,
        "group_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "batch_tokens": 1500,
    }
    return OptimizeConfig(**(fields | changes))


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def accuracy(folder, tmp_path):
    agent = dataclasses.replace(agent_config(folder), split="train")
    return evaluate(EvaluateConfig(agent=agent, samples=32, out=tmp_path)).accuracy


def test_a_run_leaves_policy_curve_metrics_state_and_manifest(policy, prm, tmp_path):
    out = tmp_path / "run"
    report = optimize(config(policy, out, prm=prm, save_every=1, steps=3))
    assert report.policy == out / "policy"
    assert AutoTokenizer.from_pretrained(out / "policy").chat_template
    assert not same(weights(policy), weights(out / "policy"))
    assert (out / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (out / "state").iterdir()) == [
        "step-000002.pt",
        "step-000003.pt",
    ]
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.status) == ("optimize", "finished")
    assert {p.path for p in manifest.parents} == {str(policy), str(prm)}
    entries = read_metrics(out)
    assert [e.step for e in entries] == [0, 1, 2]
    wanted = {"outcome", "prm_last", "prm_gap", "prm_mean", "tokens", "tool_calls", "entropy"}
    wanted |= {"loss", "gradient_norm", "kl_to_sampler", "clip_share", "learning_rate"}
    wanted |= {"seconds/rollout", "seconds/score", "seconds/update", "stop/answered"}
    assert wanted <= entries[0].metrics.keys()
    table = [json.loads(t) for t in (out / "tables/trajectories.jsonl").read_text().splitlines()]
    assert all(0 <= row["score_after"] <= 1 for row in table)


def test_engine_and_trainer_agree_on_log_probabilities(policy, tmp_path):
    optimize(config(policy, tmp_path / "run", steps=1))
    metrics = read_metrics(tmp_path / "run")[0].metrics
    assert metrics["kl_to_sampler"] < 1e-8
    assert metrics["sampler_weight_mean"] == pytest.approx(1, abs=1e-4)


def test_optimizing_makes_the_policy_better(policy, tmp_path):
    report = optimize(
        config(policy, tmp_path / "run", steps=14, group_size=12, tasks_per_step=4, warmup_steps=5)
    )
    before = accuracy(policy, tmp_path / "before")
    after = accuracy(report.policy, tmp_path / "after")
    assert before < 0.75
    assert after > before + 0.1


def command(settings):
    """Return the command line of a config."""
    agent = settings.agent
    flags = {
        "tasks": agent.tasks, "policy": agent.policy, "num-tasks": agent.num_tasks,
        "max-steps": agent.max_steps, "max-turn-tokens": agent.max_turn_tokens,
        "max-context": agent.max_context, "concurrency": agent.concurrency, "device": agent.device,
        "out": settings.out, "steps": settings.steps, "prm": settings.prm,
        "tasks-per-step": settings.tasks_per_step, "group-size": settings.group_size,
        "learning-rate": settings.learning_rate, "warmup-steps": settings.warmup_steps,
        "batch-tokens": settings.batch_tokens, "save-every": settings.save_every,
    }  # fmt: skip
    pairs = [(f"--{name}", str(value)) for name, value in flags.items()]
    return [sys.executable, "-m", "policy.cli", "optimize", *(x for pair in pairs for x in pair)]


def run_until(settings, condition, number, *, folder):
    """Start the command and send it a signal as soon as the condition holds."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command(settings), env=environment, stdout=subprocess.DEVNULL, cwd=settings.out.parent
    ) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if condition():
                process.send_signal(number)
                break
            time.sleep(0.01)
    return process.returncode


@pytest.mark.slow
def test_an_interrupted_and_killed_run_ends_with_exactly_the_weights_of_an_uninterrupted_one(
    policy, prm, tmp_path, repository
):
    whole = config(policy, tmp_path / "whole", prm=prm, steps=9, save_every=2)
    optimize(whole)
    cut = dataclasses.replace(whole, out=tmp_path / "cut")

    def saved(step):
        return (cut.out / f"state/step-{step:06d}.pt").exists()

    code = run_until(cut, lambda: saved(2), signal.SIGINT, folder=repository)
    assert code == 130
    assert read_manifest(cut.out).status == "interrupted"
    code = run_until(cut, lambda: saved(4), signal.SIGTERM, folder=repository)
    assert code == 143
    assert read_manifest(cut.out).status == "interrupted"
    code = run_until(cut, lambda: saved(6), signal.SIGKILL, folder=repository)
    assert code == -signal.SIGKILL
    assert read_manifest(cut.out).status == "running"
    assert not (cut.out / "policy").exists()
    optimize(cut)
    assert read_manifest(cut.out).starts == 4
    assert same(weights(whole.out / "policy"), weights(cut.out / "policy"))
    columns = ("outcome", "loss", "entropy", "prm_last")
    curves = [
        [[e.metrics[c] for c in columns] for e in read_metrics(folder)]
        for folder in (whole.out, cut.out)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 9


def test_a_finished_run_is_left_as_it_is_and_another_config_is_refused(policy, tmp_path):
    settings = config(policy, tmp_path / "run")
    optimize(settings)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    optimize(settings)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match=r"belongs to another run.*group_size"):
        optimize(dataclasses.replace(settings, group_size=3))


def test_the_learning_rate_rises_linearly_and_stays(policy, tmp_path):
    optimize(config(policy, tmp_path / "run", steps=4, warmup_steps=2, learning_rate=1e-4))
    rates = [e.metrics["learning_rate"] for e in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 1e-4])


def test_the_default_learning_rate_goes_by_size(policy):
    options = EngineOptions(policy=str(policy), device="cpu", max_context=300)
    learner = make_learner(options, learning_rate=None, lora_rank=0, seed=0)
    assert learner.learning_rate == 1e-4
    assert learner.model.get_input_embeddings().weight.dtype == torch.float32
    assert not learner.model.training


def test_lora_trains_adapters_and_saves_a_merged_policy(policy, tmp_path):
    optimize(config(policy, tmp_path / "run", lora_rank=2, learning_rate=1e-2))
    saved = torch.load(tmp_path / "run/state/step-000002.pt", weights_only=True)["parameters"]
    assert saved
    assert all("lora_" in name for name in saved)
    before, after = weights(policy), weights(tmp_path / "run/policy")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert "model.embed_tokens.weight" not in changed


def test_the_outcome_estimator_may_be_watched_by_a_prm_without_using_it(policy, prm, tmp_path):
    optimize(config(policy, tmp_path / "plain", steps=1))
    optimize(config(policy, tmp_path / "watched", steps=1, prm=prm, advantage="outcome"))
    assert same(weights(tmp_path / "plain/policy"), weights(tmp_path / "watched/policy"))
    assert "prm_gap" in read_metrics(tmp_path / "watched")[0].metrics


def test_a_prm_of_the_implicit_head_is_a_potential_too(policy, prm, tmp_path):
    labels = json.loads((prm / "prm.json").read_text())["provenance"]["labels"]
    train(
        TrainConfig(
            labels=labels, model=str(policy), out=tmp_path / "implicit", head="implicit", epochs=1,
            learning_rate=1e-3, device="cpu",
        )
    )  # fmt: skip
    optimize(config(policy, tmp_path / "run", prm=tmp_path / "implicit", steps=1))
    (entry,) = read_metrics(tmp_path / "run")
    assert 0 < entry.metrics["prm_last"] < 1
    table = (tmp_path / "run/tables/trajectories.jsonl").read_text().splitlines()
    assert len({json.loads(row)["score_after"] for row in table}) > 1


def test_episodes_too_long_for_the_prm_do_not_stop_the_run(policy, prm, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(prm, short)
    settings = json.loads((short / "config.json").read_text())
    scorer = Scorer.load(prm, device="cpu")
    (task,) = load_tasks(dataclasses.replace(agent_config(policy), num_tasks=1))
    prompt = Trajectory(
        trajectory_id="t", task=task, steps=(), stop=StopReason.MALFORMED, outcome=0.0
    )
    # Every prompt fits, but hardly a whole episode does.
    settings["max_position_embeddings"] = len(scorer.render([prompt])[0].input_ids) + 20
    (short / "config.json").write_text(json.dumps(settings))
    optimize(config(policy, tmp_path / "run", prm=short))
    unscored = [entry.metrics["prm_unscored"] for entry in read_metrics(tmp_path / "run")]
    assert all(0 < count <= 8 for count in unscored)
    assert not same(weights(policy), weights(tmp_path / "run/policy"))


def test_a_prm_that_scores_correctness_is_no_potential(policy, prm, tmp_path):
    labels = json.loads((prm / "prm.json").read_text())["provenance"]["labels"]
    base = TrainConfig(
        labels=labels, model=str(policy), out=tmp_path / "binary", head="binary", epochs=1,
        learning_rate=1e-3, device="cpu",
    )  # fmt: skip
    train(base)
    with pytest.raises(InputError, match="needs a PRM of kind 'value'"):
        optimize(config(policy, tmp_path / "run", prm=tmp_path / "binary"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": {"engine": "vllm"}}, "updated in place, which needs --engine transformers"),
        ({"agent": {"temperature": 0.0}}, "--temperature 0"),
        ({"steps": 0}, "--steps must be >= 1"),
        ({"group_size": 1}, "--group-size must be >= 2"),
        ({"advantage": "gae"}, "choose from outcome, potential"),
        ({"advantage": "potential"}, "needs the values of a PRM"),
        ({"gae_lambda": 0.9}, "--gae-lambda does not apply"),
        ({"prm": "x", "gae_lambda": 1.5}, r"--gae-lambda must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"clip_low": 1.0}, "--clip-low"),
        ({"warmup_steps": -1}, "--warmup-steps"),
    ],
)
def test_impossible_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config("policy", tmp_path, **changes)


def test_too_few_tasks_are_refused(policy, tmp_path):
    with pytest.raises(InputError, match=r"4 tasks, fewer than --tasks-per-step 5"):
        optimize(config(policy, tmp_path / "run", tasks_per_step=5))


def test_a_missing_prm_is_refused_before_the_output_is_touched(policy, tmp_path):
    with pytest.raises(InputError, match="none"):
        optimize(config(policy, tmp_path / "run", prm=tmp_path / "none"))
    assert not (tmp_path / "run").exists()


def test_an_endless_generator_gives_fresh_tasks_for_the_whole_run(policy):
    pool = load_pool(agent_config(policy, num_tasks=None), needed=12, per_step=4)
    assert len({t.task_id for t in pool}) == 12


class _BrokenEngine:
    """Fails for some requests, as a dying server does."""

    name, policy, revision, max_context = "broken", "broken", "0", 300

    def __init__(self, working, failing):
        self.stats = EngineStats()
        self.working, self.failing, self.count = working, failing, 0

    async def generate(self, request):
        if request.request_id.split("/")[-1].split("#")[0] in self.failing:
            raise EngineError("out of memory")
        return await self.working.generate(request)

    async def close(self):
        pass


def run_with_failures(policy, failing):
    settings = agent_config(policy)
    working = TransformersEngine(EngineOptions(policy=str(policy), max_context=300, max_batch=16))
    pool = load_pool(settings, needed=2, per_step=2)

    async def run():
        async with open_agent(settings, engine=_BrokenEngine(working, failing)) as agent:
            specs = list(episode_specs(pool[:2], group_size=4, step=0, seed=0))
            return await run_groups(agent, specs, concurrency=8)

    return asyncio.run(run())


def test_groups_come_in_order_with_their_failures(policy):
    groups = run_with_failures(policy, {"001"})
    assert [len(g) for g in groups] == [4, 4]
    assert [t.stop.failed for t in groups[0]] == [False, True, False, False]
    assert [t.trajectory_id[-3:] for t in groups[1]] == ["000", "001", "002", "003"]


def test_a_step_in_which_most_episodes_fail_stops_the_run(policy):
    with pytest.raises(InputError, match=r"6 of 8 episodes failed \(out of memory\)"):
        run_with_failures(policy, {"000", "001", "002"})


def test_the_state_of_another_model_is_refused(policy, tmp_path):
    settings = config(policy, tmp_path / "run", lora_rank=2)
    optimize(settings)
    shutil.rmtree(tmp_path / "run/policy")
    state = tmp_path / "run/state/step-000002.pt"
    content = torch.load(state, weights_only=True)
    content["parameters"].popitem()
    torch.save(content, state)
    with pytest.raises(InputError, match="another model"):
        optimize(settings)
