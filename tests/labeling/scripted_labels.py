"""Labelling one task file with a scripted policy, for domains whose tools have state."""

import json

from agent.chat import ChatFormat
from agent.engines.scripted import ScriptedEngine
from labeling.run import label
from tests.labeling.folders import config, evidence, trajectories
from trajectory.formats import format_call
from trajectory.records import ToolCall


def call(name, **arguments):
    return format_call(ToolCall(name=name, arguments=json.dumps(arguments)))


def turns_so_far(prompt):
    """How many turns the policy has written."""
    return prompt.count("<|im_start|>assistant") - 1


def shown(prompt):
    """What the last call returned."""
    last = prompt.rpartition("<|im_start|>tool\n")[2]
    return last.partition("<|im_end|>")[0]


def labelled(lab, out, spec, turn, **changes):
    """Run `prm label` in full and return its report, trajectories and rollouts."""
    options = {"tasks": spec, "allow_unsafe_tools": True, "max_turn_tokens": 600, "concurrency": 3}
    codec = ChatFormat.load(str(lab / "policy"), tools=()).tokenizer
    engine = ScriptedEngine(turn, codec=codec, policy=str(lab / "policy"), max_context=100_000)
    report = label(config(lab, out, agent=options, **changes), engine=engine)
    return report, trajectories(out), list(evidence(out).values())
