import json

import pytest

from prm.integrations.trl import process_reward
from prm.remote import RemoteScorer
from prm.score import Scorer
from tests.prm.loopback import serving
from tests.prm.synthetic import make_trajectory
from trajectory.errors import InputError
from trajectory.formats import to_messages


@pytest.fixture(scope="module")
def scorer(prm_folder):
    return Scorer.load(prm_folder, device="cpu")


def conversation(marks):
    prompt, *completion = to_messages(make_trajectory(marks))
    return [prompt], completion


def test_conversations_with_tools_get_the_value_of_their_last_state(scorer):
    prompts, completions = zip(*[conversation(m) for m in ("++", "+-", "--", "")], strict=True)
    rewards = process_reward(scorer)(prompts=prompts, completions=completions, answer=["3"] * 4)
    assert all(0 <= r <= 1 for r in rewards)
    assert rewards[0] > 0.6 > 0.4 > max(rewards[1:3])  # the model has learned its values


def test_texts_are_one_step(scorer):
    (reward,) = process_reward(scorer)(prompts=["add it up t0"], completions=["I add right"])
    bare = make_trajectory("")
    bare = type(bare)(
        trajectory_id="x",
        task=bare.task,
        steps=(type(bare.steps[0])(text="I add right"),),
        stop=bare.stop,
        outcome=bare.outcome,
    )
    assert reward == pytest.approx(scorer.score([bare])[0].values[-1], abs=1e-6)
    assert len(process_reward(scorer)(prompts=["p"], completions=[""])) == 1


def test_the_aggregation_can_be_chosen(scorer):
    prompt, completion = conversation("+-+")
    rewards = {
        name: process_reward(scorer, aggregation=name)(prompts=[prompt], completions=[completion])
        for name in ("last", "min", "product")
    }
    assert rewards["product"][0] < rewards["min"][0] <= rewards["last"][0]
    with pytest.raises(InputError, match="unknown aggregation 'sum'"):
        process_reward(scorer, aggregation="sum")


def test_a_call_that_was_cut_off_before_its_result_is_scored(scorer):
    prompt, completion = conversation("+")
    cut = completion[:1]  # a call without its result
    assert cut[0]["tool_calls"]
    (reward,) = process_reward(scorer)(prompts=[prompt], completions=[cut])
    assert 0 <= reward <= 1


def test_malformed_episodes_are_named(scorer):
    prompt, completion = conversation("+")
    reward = process_reward(scorer)
    with pytest.raises(InputError, match="episode 1: the prompt has no user message"):
        reward(prompts=[prompt, []], completions=[completion, completion])
    with pytest.raises(InputError, match="episode 0: prompt and completion must both"):
        reward(prompts=["text"], completions=[completion])
    with pytest.raises(InputError, match=r"episode 0: messages\[2\]: role 'user'"):
        reward(prompts=[prompt], completions=[[*completion[-1:], {"role": "user", "content": "?"}]])


def test_long_episodes_stop_or_get_no_reward_and_are_counted(scorer):
    prompts, completions = ["p", "p"], ["short", "a" * 600]
    with pytest.raises(InputError, match=r"episode 1 has \d+ tokens, the PRM takes 512"):
        process_reward(scorer)(prompts=prompts, completions=completions)
    logged = {}
    reward = process_reward(scorer, on_long="drop")
    found = reward(prompts=prompts, completions=completions, log_metric=logged.__setitem__)
    assert found[0] is not None
    assert found[1] is None
    assert logged == {"process_reward/steps": 1.0, "process_reward/too_long": 0.5}


def test_a_server_gives_the_same_rewards(scorer):
    prompts, completions = zip(*[conversation(m) for m in ("++", "+-")], strict=True)
    here = process_reward(scorer)(prompts=prompts, completions=completions)
    with serving(scorer) as url:
        there = process_reward(RemoteScorer(url))(prompts=prompts, completions=completions)
    assert there == pytest.approx(here, abs=1e-5)
    with pytest.raises(InputError, match="needs a Scorer"):
        process_reward(object(), on_long="drop")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's and its libraries', which are theirs to settle
def test_grpo_trains_with_it(base, scorer, tmp_path):
    pytest.importorskip("trl", reason="needs the extra trl")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    calls = []
    inner = process_reward(scorer, on_long="drop")

    def counted(**columns):
        rewards = inner(**columns)
        calls.append((len(columns["prompts"]), rewards))
        return rewards

    def outcome(completions, **_):
        return [float("3" in text) for text in completions]

    trainer = GRPOTrainer(
        model=str(base),
        reward_funcs=[outcome, counted],
        train_dataset=Dataset.from_list([{"prompt": f"add it up t{i}"} for i in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            reward_weights=[1.0, 0.5],
        ),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert [size for size, _ in calls] == [4, 4]
    logged = [e for e in trainer.state.log_history if "process_reward/steps" in e]
    assert len(logged) == 2
    means = [sum(rewards) / 4 for _, rewards in calls]
    assert [e["rewards/counted/mean"] for e in logged] == pytest.approx(means, abs=1e-4)
    changed = [n for n, p in trainer.model.named_parameters() if not p.equal(before[n].to(p))]
    assert changed
    assert json.dumps(logged)  # plain numbers
