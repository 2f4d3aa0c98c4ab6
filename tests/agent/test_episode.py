"""The episode loop with the scripted engine and the real tools."""

import asyncio
import json
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest

from agent.chat import ChatFormat
from agent.engines.scripted import Faults, ScriptedEngine
from agent.episode import (
    Agent,
    EpisodeLimits,
    EpisodeSpec,
    Prefix,
    run_episode,
    run_episodes,
)
from agent.sandbox import SandboxProvider
from agent.tasks import parse_tasks
from agent.tools import build_tools, tools_hash
from agent.tools.base import SideEffect, ToolFailure
from trajectory.errors import InputError
from trajectory.formats import format_call
from trajectory.records import Sampling, StopReason, Task, ToolCall

UNSAFE = SandboxProvider("unsafe", allow_unsafe=True)

TASK = Task(task_id="t", domain="jsonl", prompt="What is (2+3)*4?", answer="20")
END = "<|im_end|>"


def call(name, **arguments):
    return format_call(ToolCall(name=name, arguments=json.dumps(arguments)))


SCRIPT = {
    "What is": "First.\n" + call("calculator", expression="2+3") + END,
    "<|im_start|>tool\n5": "Then.\n" + call("calculator", expression="5*4") + END,
    "<|im_start|>tool\n20": "\\boxed{20}" + END,
}


@pytest.fixture
def make_agent(byte_tokenizer, tmp_path):
    rows = tmp_path / "tasks.jsonl"
    rows.write_text(json.dumps({"problem": "p", "answer": "1"}) + "\n")

    def make(script, *, tools=("calculator",), faults=None, **limits):
        built = tools if not tools or not isinstance(tools[0], str) else None
        built = built or build_tools(tools, UNSAFE)
        return Agent(
            engine=ScriptedEngine(script, codec=byte_tokenizer, faults=faults, max_context=10_000),
            chat=ChatFormat(byte_tokenizer, built),
            tools=tuple(built),
            tools_hash=tools_hash(built),
            domain=parse_tasks(str(rows)),
            sampling=Sampling(max_tokens=limits.pop("max_tokens", 500)),
            limits=EpisodeLimits(**{"max_context": 8000, **limits}),
            system_prompt="Use the tools.",
        )

    return make


def spec(**changes):
    return replace(EpisodeSpec(trajectory_id="e", task=TASK, seed=7), **changes)


def run(agent, one):
    return asyncio.run(run_episode(agent, one))


def test_think_act_observe_until_the_answer(make_agent):
    trajectory = run(make_agent(SCRIPT), spec())
    assert [o.content for s in trajectory.steps for o in s.observations] == ["5", "20"]
    assert trajectory.stop is StopReason.ANSWERED
    assert (trajectory.answer, trajectory.outcome) == ("20", 1.0)
    assert trajectory.tools == ("calculator",)


def test_the_ids_of_a_trajectory_are_the_ids_the_engine_saw(make_agent, byte_tokenizer):
    prompts = []
    agent = make_agent(SCRIPT)
    generate = agent.engine.generate

    async def recorded(request):
        prompts.append(request.prompt_ids)
        return await generate(request)

    agent.engine.generate = recorded
    trajectory = run(agent, spec())
    ids = trajectory.prompt_ids
    for step, prompt in zip(trajectory.steps, prompts, strict=True):
        assert prompt == ids
        ids += step.token_ids + (step.observation_ids or ())
    text = byte_tokenizer.decode(ids)
    assert text.count("<|im_start|>assistant") == 3
    assert text.endswith("\\boxed{20}" + END)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_continuation_keeps_the_prefix_and_ends_alike(make_agent, kept):
    agent = make_agent(SCRIPT)
    whole = run(agent, spec())
    start = Prefix(trajectory=whole, steps=kept)
    continued = run(agent, spec(trajectory_id="c", seed=99, start=start))
    assert continued.steps[:kept] == whole.steps[:kept]
    assert [s.text for s in continued.steps] == [s.text for s in whole.steps]


def test_a_prefix_without_ids_is_encoded(make_agent):
    agent = make_agent(SCRIPT)
    whole = run(agent, spec())
    bare = [replace(s, token_ids=None, logprobs=None, observation_ids=None) for s in whole.steps]
    foreign = replace(whole, steps=tuple(bare), prompt_ids=None)
    continued = run(agent, spec(start=Prefix(trajectory=foreign, steps=1)))
    assert continued.steps[0].token_ids == whole.steps[0].token_ids
    assert continued.outcome == 1.0


def test_python_state_is_restored_for_a_continuation(make_agent):
    script = {
        "What is": "```python\nx = 2 + 3\nprint(x)\n```",
        "<|im_start|>tool\n5": "```python\nprint(x * 4)\n```",
        "<|im_start|>tool\n20": "\\boxed{20}" + END,
    }
    agent = make_agent(script, tools=("python",))
    whole = run(agent, spec())
    assert whole.outcome == 1.0
    continued = run(agent, spec(trajectory_id="c", start=Prefix(trajectory=whole, steps=1)))
    assert [o.content.strip() for s in continued.steps for o in s.observations] == ["5", "20"]


def test_a_code_turn_without_end_of_turn_gets_one_before_the_result(make_agent, byte_tokenizer):
    script = {"What is": "```python\n1\n```\nnever read", "tool\n": "\\boxed{20}" + END}
    trajectory = run(make_agent(script, tools=("python",)), spec())
    first = trajectory.steps[0]
    assert byte_tokenizer.decode(first.token_ids).endswith("```")
    assert byte_tokenizer.decode(first.observation_ids).startswith(END)


@pytest.mark.parametrize(
    ("turn", "error"),
    [
        (call("sql", query="x"), "unknown_tool"),
        ("<tool_call>{broken</tool_call>", "malformed_call"),
        (call("calculator", wrong="1"), "bad_arguments"),
        (call("calculator", expression="1/0"), "division_by_zero"),
    ],
)
def test_a_mistake_of_the_model_is_an_observation_and_the_episode_goes_on(make_agent, turn, error):
    trajectory = run(make_agent({"What is": turn + END, "tool\n": "\\boxed{20}" + END}), spec())
    assert trajectory.steps[0].observations[0].error == error
    assert trajectory.outcome == 1.0


def test_neither_call_nor_answer_is_malformed_and_wrong(make_agent):
    trajectory = run(make_agent({"What is": END}), spec())
    assert (trajectory.stop, trajectory.outcome) == (StopReason.MALFORMED, 0.0)


def test_limits_leave_the_outcome_open(make_agent):
    again = {"What is": call("calculator", expression="2+3") + END}
    steps = run(make_agent(again, max_steps=3), spec())
    assert (steps.stop, steps.num_steps, steps.outcome) == (StopReason.MAX_STEPS, 3, None)
    turn = run(make_agent(SCRIPT, max_tokens=5), spec())
    assert (turn.stop, len(turn.steps[0].token_ids)) == (StopReason.MAX_TOKENS, 5)
    context = run(make_agent(again, max_context=600, max_steps=99), spec())
    assert context.stop is StopReason.MAX_TOKENS
    used = len(context.prompt_ids) + sum(
        len(s.token_ids) + len(s.observation_ids or ()) for s in context.steps
    )
    assert used <= 700


def test_a_prompt_beyond_the_context_is_refused(make_agent):
    with pytest.raises(InputError, match="--max-context is 50"):
        run(make_agent(SCRIPT, max_context=50), spec())


def test_a_broken_engine_ends_only_its_episode(make_agent):
    agent = make_agent(SCRIPT, faults=Faults(fail_at=frozenset({1})))
    broken, whole = run(agent, spec()), run(agent, spec())
    assert (broken.stop, broken.outcome) == (StopReason.ENGINE_FAILURE, None)
    assert "scripted failure" in broken.meta["failure"]
    assert whole.outcome == 1.0


@dataclass
class Broken:
    """A tool whose infrastructure is down from the n-th call on, and whose answers change."""

    effect: SideEffect
    works: int = 0
    answers: tuple[str, ...] = ("5",)
    name = "calculator"
    description = "down"
    parameters = MappingProxyType({"type": "object"})
    calls = 0
    open_sessions = 0

    async def open(self, task, seed):
        self.open_sessions += 1
        return self

    async def call(self, arguments):
        from trajectory.records import Observation

        self.calls += 1
        if self.calls > self.works:
            raise ToolFailure("the server is gone")
        return Observation(content=self.answers[(self.calls - 1) % len(self.answers)])

    async def close(self):
        self.open_sessions -= 1


def test_broken_infrastructure_is_no_bad_step(make_agent):
    tool = Broken(SideEffect.STATEFUL)
    trajectory = run(make_agent(SCRIPT, tools=(tool,)), spec())
    assert (trajectory.stop, trajectory.outcome) == (StopReason.TOOL_FAILURE, None)
    assert trajectory.meta["failure"] == "the server is gone"
    assert trajectory.steps[-1].calls == ()
    assert tool.open_sessions == 0


def test_a_replay_that_answers_differently_abandons_the_continuation(make_agent):
    tool = Broken(SideEffect.STATEFUL, works=99, answers=("5", "20", "6"))
    agent = make_agent(SCRIPT, tools=(tool,))
    whole = run(agent, spec())
    continued = run(agent, spec(start=Prefix(trajectory=whole, steps=1)))
    assert continued.stop is StopReason.TOOL_FAILURE
    assert "replay" in continued.meta["failure"]
    assert tool.open_sessions == 0


def test_pure_tools_are_not_replayed(make_agent):
    tool = Broken(SideEffect.PURE, works=99, answers=("5", "20"))
    agent = make_agent(SCRIPT, tools=(tool,))
    whole = run(agent, spec())
    tool.calls = 1
    run(agent, spec(start=Prefix(trajectory=whole, steps=1)))
    assert tool.calls == 2


def test_irreversible_tools_refuse_continuations(make_agent):
    tool = Broken(SideEffect.IRREVERSIBLE, works=99, answers=("5", "20"))
    agent = make_agent(SCRIPT, tools=(tool,))
    whole = run(agent, spec())
    with pytest.raises(InputError, match="irreversible"):
        run(agent, spec(start=Prefix(trajectory=whole, steps=1)))


def test_many_episodes_stay_within_the_bound_and_all_come_back(make_agent):
    agent = make_agent(SCRIPT, faults=Faults(delay_s=0.001))
    alive, most = 0, 0
    generate = agent.engine.generate

    async def counted(request):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        try:
            return await generate(request)
        finally:
            alive -= 1

    agent.engine.generate = counted

    async def gather():
        specs = (spec(trajectory_id=str(i)) for i in range(20))
        return [t async for t in run_episodes(agent, specs, concurrency=4)]

    trajectories = asyncio.run(gather())
    assert sorted(int(t.trajectory_id) for t in trajectories) == list(range(20))
    assert most == 4


def test_leaving_early_cancels_what_is_in_flight(make_agent):
    agent = make_agent(SCRIPT)

    async def first():
        specs = (spec(trajectory_id=str(i)) for i in range(99))
        episodes = run_episodes(agent, specs, concurrency=8)
        async for trajectory in episodes:
            await episodes.aclose()
            return trajectory, len(asyncio.all_tasks())

    trajectory, tasks = asyncio.run(first())
    assert trajectory.outcome == 1.0
    assert tasks == 1
