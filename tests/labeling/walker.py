"""A policy whose values are known: a real engine for the episode loop, with dice for a model.

A solution is two turns: a call that is good (1+1) with probability 1/2, else bad (1+2), then an
answer that is right with probability .8 after a good call and .1 after a bad one. Hence
V(prompt) = .45, V(after a good call) = .8, V(after a bad call) = .1. With probability `ramble` a
first turn is followed by a second call of the same kind.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from random import Random

from agent.chat import ChatFormat
from agent.engines.base import EngineError, EngineStats, GenerateRequest, Generation
from agent.setup import AgentConfig
from labeling.config import LabelConfig
from labeling.run import label
from trajectory.command import Command, main
from trajectory.formats import format_call
from trajectory.records import ToolCall

GOOD, BAD, START = 0.8, 0.1, 0.45


def make_policy(folder: Path) -> Path:
    """Save a tokenizer with a chat template: all that the agent loads of the policy itself."""
    from policy.tiny import (
        make_tokenizer,  # not at the top: loads torch, which the script can spare
    )

    make_tokenizer().save_pretrained(folder)
    return folder


def make_tasks(path: Path, count: int) -> Path:
    """Write problems that all have the answer 7."""
    rows = [{"id": f"t{i}", "problem": f"Problem {i}?", "answer": "7"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class WalkerEngine:
    """Draws turns from the request's seed and prompt alone."""

    name = "walker"
    revision = ""
    max_context = 4096

    def __init__(self, policy: Path, *, ramble: float = 0.3, delay_s: float = 0.0) -> None:
        self.policy = str(policy)
        self.stats = EngineStats()
        self.ramble, self.delay_s = ramble, delay_s
        self.prompts: list[str] = []
        self.alive = self.most_alive = 0
        self.broken = lambda request: False
        self._chat = ChatFormat.load(self.policy, tools=())

    async def generate(self, request: GenerateRequest) -> Generation:
        rng = Random(request.seed)
        self.alive += 1
        self.most_alive = max(self.alive, self.most_alive)
        try:
            await asyncio.sleep(self.delay_s * rng.random())
        finally:
            self.alive -= 1
        if self.broken(request):
            raise EngineError("the engine broke")
        prompt = self._chat.decode(request.prompt_ids)
        self.prompts.append(prompt)
        ids = self._chat.turn_ids(self._turn(prompt, rng))
        ids, finish = ids[: request.sampling.max_tokens], "stop"
        if len(ids) == request.sampling.max_tokens:
            finish = "length"
        self.stats.requests += 1
        self.stats.generated_tokens += len(ids)
        return Generation(token_ids=ids, logprobs=(-0.5,) * len(ids), finish=finish)

    def _turn(self, prompt: str, rng: Random) -> str:
        turns = prompt.count("<|im_start|>assistant") - 1
        good = "1+1" in prompt
        if turns == 0 or (turns == 1 and rng.random() < self.ramble):
            good = good if turns else rng.random() < 0.5
            call = ToolCall(
                name="calculator", arguments=json.dumps({"expression": "1+1" if good else "1+2"})
            )
            return f"I add.\n{format_call(call)}"
        right = rng.random() < (GOOD if good else BAD)
        return f"Done.\nAnswer: {'7' if right else rng.randrange(10, 99)}"

    async def close(self) -> None:
        """Nothing is held."""


def agent_config(folder: Path, **changes) -> AgentConfig:
    """The shared flags for tasks and policy in a folder."""
    fields = {
        "tasks": str(folder / "tasks.jsonl"),
        "policy": str(folder / "policy"),
        "concurrency": 16,
        "max_steps": 6,
        "max_turn_tokens": 200,
    }
    return AgentConfig(**(fields | changes))


def command(delay_s: float, flags: list[str], errors: Path) -> None:
    """Be the process ``prm label FLAGS`` on this policy, with a delay per turn."""

    def run(config: LabelConfig) -> None:
        label(config, engine=WalkerEngine(Path(config.agent.policy), delay_s=delay_s))

    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = ["prm", "label", *flags]
    main("prm", {"label": Command(LabelConfig, run, "Label.")})
