from concurrent.futures import ThreadPoolExecutor

import pytest

from prm.integrations.verl import combine
from prm.score import Scorer
from tests.prm.loopback import serving
from tests.prm.synthetic import make_trajectory
from trajectory.errors import InputError
from trajectory.formats import to_messages


@pytest.fixture(scope="module")
def scorer(prm_folder):
    return Scorer.load(prm_folder, device="cpu")


def test_the_outcome_and_the_process_are_added(scorer):
    right, wrong = (
        combine(scorer, 1.0, "", {"messages": to_messages(make_trajectory(m))}, process_weight=0.5)
        for m in ("++", "--")
    )
    assert right["score"] == pytest.approx(1 + 0.5 * right["process_reward"])
    assert right["process_reward"] > 0.6 > 0.4 > wrong["process_reward"]
    assert wrong["outcome"] == 1.0


def test_a_text_is_one_step_after_its_task(scorer):
    found = combine(scorer, 0.0, "I add right", {"task": "add it up"}, prompt_field="task")
    assert found["score"] == 0.5 * found["process_reward"] > 0


def test_an_episode_without_its_task_is_refused(scorer):
    with pytest.raises(InputError, match="neither 'messages' nor the task as 'question' .*index"):
        combine(scorer, 0.0, "text", {"index": 3})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # verl's and its libraries', which are theirs to settle
def test_verl_calls_it_through_its_own_configuration(scorer):
    pytest.importorskip("verl", reason="needs verl 0.9, which has no room for this transformers")
    import asyncio

    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    tokenizer = scorer.checkpoint.tokenizer
    texts = ["I add right\nThe answer is here\n#### 3", "I add wrong\n#### 7"]

    def episode(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        batch = TensorDict({"responses": ids, "attention_mask": torch.ones_like(ids)}, batch_size=1)
        fields = {
            "data_source": "openai/gsm8k",
            "reward_model": {"ground_truth": "3"},
            "extra_info": {"question": "add it up t0"},
            "tool_extra_fields": {},
        }
        return DataProto(
            batch=batch,
            non_tensor_batch={k: np.array([v], dtype=object) for k, v in fields.items()},
        )

    with serving(scorer) as url:
        function = {
            "path": "pkg://prm.integrations.verl",
            "name": "compute_score",
            "reward_kwargs": {"url": url, "process_weight": 0.25},
        }
        config = OmegaConf.create({"reward": {"custom_reward_function": function}})

        def score(text):  # as verl does it: one loop per worker
            with asyncio.Runner() as runner:

                async def run():
                    manager = NaiveRewardManager(config, tokenizer, get_custom_reward_fn(config))
                    return await manager.run_single(episode(text))

                return runner.run(run())

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(score, texts))
    expected = [combine(scorer, o, t, {"question": "add it up t0"}, process_weight=0.25)
                for o, t in zip((1.0, 0.0), texts, strict=True)]  # fmt: skip
    for one, other in zip(found, expected, strict=True):
        assert one["reward_score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["reward_extra_info"] == pytest.approx(other, abs=1e-5)
