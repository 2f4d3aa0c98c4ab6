import asyncio
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent.chat import ChatFormat
from agent.engines.scripted import ScriptedEngine
from agent.episode import Agent, EpisodeLimits, EpisodeSpec, run_episode
from agent.tasks.arithmetic import ArithmeticDomain
from agent.tools.calculator import CalculatorTool
from policy.synthesize import SynthesizeConfig, synthesize
from policy.tiny import make_model, make_tokenizer
from policy.warmup_data import (
    IGNORED,
    Row,
    assemble,
    collate,
    fitting,
    hold_out,
    micro_batches,
    plan_epoch,
    summed_loss,
)
from trajectory.errors import InputError
from trajectory.records import Sampling, Trajectory
from trajectory.store import read_jsonl

CHAT = ChatFormat(make_tokenizer(), [CalculatorTool()])
DOMAIN = ArithmeticDomain()


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    out: Path = tmp_path_factory.mktemp("demonstrations") / "out"
    path = synthesize(SynthesizeConfig(tasks="arithmetic", num_tasks=30, out=out))
    return list(read_jsonl(path, Trajectory))


@pytest.fixture(scope="module")
def rows(demonstrations: list[Trajectory]) -> list[Row]:
    return [assemble(CHAT, DOMAIN.system_prompt, t) for t in demonstrations]


def row(length: int, *, task: str = "t", trained: int = 1) -> Row:
    mask = (False,) * (length - trained) + (True,) * trained
    return Row(task_id=task, input_ids=tuple(range(1, length + 1)), trained=mask)


# --- rows


def test_the_agents_turns_and_only_they_are_trained(demonstrations, rows):
    for trajectory, assembled in zip(demonstrations, rows, strict=True):
        turns = [i for step in trajectory.steps for i in CHAT.turn_ids(step.text)]
        pairs = zip(assembled.input_ids, assembled.trained, strict=True)
        assert [i for i, trained in pairs if trained] == turns


def test_a_row_is_what_an_episode_with_these_turns_has(demonstrations, rows):
    for trajectory, assembled in zip(demonstrations, rows, strict=True):
        texts = [step.text for step in trajectory.steps]

        def script(prompt: str, seed: int, texts: list[str] = texts) -> str:
            return texts[prompt.count("<|im_start|>assistant") - 1]

        agent = Agent(
            engine=ScriptedEngine(script, codec=CHAT.tokenizer),
            chat=CHAT,
            tools=(CalculatorTool(),),
            tools_hash="",
            domain=DOMAIN,
            sampling=Sampling(max_tokens=100),
            limits=EpisodeLimits(),
            system_prompt=DOMAIN.system_prompt,
        )
        spec = EpisodeSpec(trajectory_id="t", task=trajectory.task, seed=0)
        acted = asyncio.run(run_episode(agent, spec))
        ids = list(acted.prompt_ids or ())
        for step in acted.steps:
            ids += (*(step.token_ids or ()), *(step.observation_ids or ()))
        assert tuple(ids) == assembled.input_ids
        assert acted.outcome == trajectory.outcome


def test_rows_that_are_too_long_are_an_error_that_counts_them():
    with pytest.raises(InputError, match="2 of 3 trajectories exceed --max-length 5 "):
        fitting([row(9), row(5), row(6)], 5, on_long="error")


def test_rows_that_are_too_long_can_be_left_out():
    assert fitting([row(9), row(5)], 5, on_long="drop") == [row(5)]


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="no trajectory of 1 fits"):
        fitting([row(9)], 5, on_long="drop")


# --- splits and batches


@given(st.lists(st.integers(0, 9), min_size=2), st.floats(0, 0.99), st.integers(0, 5))
def test_rows_of_a_task_are_held_out_together(tasks, share, seed):
    rows = [row(index + 1, task=str(task)) for index, task in enumerate(tasks)]
    if share > 0 and len(set(tasks)) == 1:
        with pytest.raises(InputError, match="one task"):
            hold_out(rows, share, seed)
        return
    train, held = hold_out(rows, share, seed)
    assert sorted(map(len, (r.input_ids for r in (*train, *held)))) == list(range(1, len(rows) + 1))
    assert {r.task_id for r in train}.isdisjoint({r.task_id for r in held})
    assert train
    assert bool(held) == (share > 0)


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths, st.integers(1, 200), st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_visits_every_row_once_in_full_steps(lengths, step_tokens, seed, epoch):
    steps = plan_epoch(lengths, step_tokens, seed=seed, epoch=epoch)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    for step in steps[:-1]:
        assert sum(lengths[i] for i in step) >= step_tokens
        assert sum(lengths[i] for i in step[:-1]) < step_tokens


def test_epochs_differ_and_a_plan_can_be_made_again():
    plans = [plan_epoch([5] * 40, 20, seed=0, epoch=epoch) for epoch in (0, 1, 0)]
    assert plans[0] == plans[2] != plans[1]


@given(lengths, st.integers(1, 200))
def test_micro_batches_keep_to_their_budget(lengths, budget):
    batches = micro_batches(range(len(lengths)), lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


# --- the loss


def test_labels_are_the_trained_ids_and_nothing_else():
    rows = [
        Row(task_id="a", input_ids=(5, 6, 7), trained=(False, True, True)),
        Row(task_id="b", input_ids=(8, 9), trained=(False, True)),
    ]
    batch = collate(rows, pad_id=0)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels_BT.tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_the_loss_is_the_summed_log_probability_of_the_trained_ids(rows):
    model = make_model(CHAT.tokenizer, seed=0).double()
    batch = collate(rows[:5], pad_id=CHAT.tokenizer.pad_token_id)
    expected = 0.0
    with torch.no_grad():
        for one in rows[:5]:
            logits = model(torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
            expected -= sum(
                float(logits[t - 1, i])
                for t, (i, trained) in enumerate(zip(one.input_ids, one.trained, strict=True))
                if trained
            )
        assert float(summed_loss(model, batch)) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_does_not_depend_on_how_rows_are_batched(rows):
    def gradient(batches: list[list[Row]]) -> torch.Tensor:
        model = make_model(CHAT.tokenizer, seed=0).double()
        for batch in batches:
            summed_loss(model, collate(batch, CHAT.tokenizer.pad_token_id)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    mixed = rows[:6]
    Random(0).shuffle(mixed)
    torch.testing.assert_close(gradient([rows[:6]]), gradient([[r] for r in mixed]))
