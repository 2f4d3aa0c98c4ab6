import json

import pytest

from agent.setup import AgentConfig
from benchmarks.busy import BusyConfig, Pair, feeding
from benchmarks.feeding import Feed
from policy.synthesize import SynthesizeConfig, synthesize
from policy.warmup import WarmupConfig, warmup
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The embedded policy after a few steps: its episodes are short or cut off."""
    root = tmp_path_factory.mktemp("busy")
    synthesize(SynthesizeConfig(tasks="arithmetic", num_tasks=40, out=root / "data"))
    warmup(WarmupConfig(data=root / "data", model="tiny", out=root / "policy", device="cpu"))
    return root / "policy"


def agent(policy, **changes):
    fields = {"tasks": "arithmetic", "num_tasks": 3, "max_turn_tokens": 20, "max_steps": 2}
    return AgentConfig(policy=str(policy), device="cpu", **(fields | changes))


def test_the_shares_are_the_ratios_of_the_two_rates():
    pair = Pair(
        labelling=Feed(generated_tokens=90, seconds=3.0, cpu_seconds=2.0),
        direct=Feed(generated_tokens=90, seconds=2.0, cpu_seconds=1.8),
    )
    assert pair.share == pytest.approx(2 / 3)  # 30 tokens a second against 45
    assert pair.cpu_share == pytest.approx(0.9)  # 45 a processor second against 50


def test_the_command_alternates_both_and_times_the_steps(policy, tmp_path, capsys):
    out = tmp_path / "report.json"
    feeding(BusyConfig(agent=agent(policy), rollouts=2, repeats=3, optimize_steps=2, out=out))
    report = json.loads(out.read_text())
    assert len(report["pairs"]) == 3
    for pair in report["pairs"]:
        assert pair["labelling"]["generated_tokens"] == pair["direct"]["generated_tokens"] > 0
        rates = [pair[side]["tokens_per_second"] for side in ("labelling", "direct")]
        assert pair["busy_share"] == pytest.approx(rates[0] / rates[1])
    shares = sorted(pair["busy_share"] for pair in report["pairs"])
    assert report["busy_share"] == shares[1]
    assert len(report["steps"]) == 2
    for step in report["steps"]:
        assert step["seconds"] == pytest.approx(step["rollout"] + step["score"] + step["update"])
        assert step["rollout"] > 0
        assert step["tokens"] > 1
    printed = capsys.readouterr().out
    assert "policy optimize, per step" in printed
    assert "machine: " in printed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rollouts": 0}, "--rollouts"),
        ({"repeats": 0}, "--repeats"),
        ({"optimize_steps": -1}, "--optimize-steps"),
        ({"optimize_steps": 0, "prm": "prm"}, "--prm is for"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        BusyConfig(agent=agent("policy"), **settings)
