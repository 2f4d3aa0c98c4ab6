"""Trajectories as OpenAI-style chat messages with ``tool_calls``, both ways.

A message's ``content`` is the thought: the turn's text without the calls written in it. On import
the text is put together again from thought and calls, so a text whose calls stand at its end in
the form of `format_call` comes back exactly. Token ids, timings and error classes have no place in
messages and do not survive.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from trajectory.records import (
    JsonValue,
    Observation,
    Step,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
)

Message: TypeAlias = dict[str, JsonValue]

_CALL_BLOCK = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```\w*[ \t]*\n(.*?)```", re.DOTALL)


def format_call(call: ToolCall) -> str:
    """Write a call the way models of the ``<tool_call>`` family do.

    Arguments that are no JSON are kept as a JSON string.

    Examples
    --------
    >>> print(format_call(ToolCall(name="calculator", arguments='{"expression": "1+2"}')))
    <tool_call>
    {"name": "calculator", "arguments": {"expression": "1+2"}}
    </tool_call>
    """
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    body = json.dumps({"name": call.name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def to_messages(trajectory: Trajectory, system: str = "") -> list[Message]:
    """Write a trajectory as chat messages.

    Parameters
    ----------
    trajectory : Trajectory
        Any trajectory.
    system : str, default=""
        System prompt to put first; none if empty.

    Returns
    -------
    list of dict
        ``system`` (optional), ``user`` (the task), then per step one ``assistant`` message, with
        ``tool_calls`` if it called tools, and one ``tool`` message per call.
    """
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": trajectory.task.prompt})
    for index, step in enumerate(trajectory.steps):
        message: Message = {"role": "assistant", "content": _thought(step)}
        ids = [f"call_{index}_{number}" for number in range(len(step.calls))]
        if step.calls:
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call_id, call in zip(ids, step.calls, strict=True)
            ]
        messages.append(message)
        for call_id, observation in zip(ids, step.observations, strict=True):
            messages.append(
                {"role": "tool", "tool_call_id": call_id, "content": observation.content}
            )
    return messages


def from_messages(
    messages: Sequence[Mapping[str, JsonValue]],
    *,
    trajectory_id: str,
    task: Task,
    outcome: float | None = None,
    answer: str | None = None,
    stop: StopReason | None = None,
    policy: str = "",
) -> Trajectory:
    """Read a trajectory from chat messages of any agent framework.

    Parameters
    ----------
    messages : sequence of mapping
        ``system`` and ``user`` messages first, then ``assistant`` and ``tool`` messages.
        ``content`` may be text, a list of text parts, or None; ``arguments`` may be JSON text or
        an object; tool results without ``tool_call_id`` are taken in the order of the calls.
    trajectory_id : str
        Id to give it.
    task : Task
        What was asked; its prompt, not the user message's, is what later stages see.
    outcome : float, optional
        Verdict in [0, 1]; None if nobody judged it.
    answer : str, optional
        The final answer, if known.
    stop : StopReason, optional
        Why it ended. By default ``ANSWERED`` with an outcome and ``MAX_STEPS`` (cut off, no
        verdict) without.
    policy : str, default=""
        Name of the model that acted.

    Returns
    -------
    Trajectory
        Without token ids.

    Raises
    ------
    ValueError
        If a message is malformed, out of place, or a call has no result; names the message.
    """
    if stop is None:
        stop = StopReason.MAX_STEPS if outcome is None else StopReason.ANSWERED
    return Trajectory(
        trajectory_id=trajectory_id,
        task=task,
        steps=tuple(_read_steps(messages)),
        stop=stop,
        answer=answer,
        outcome=outcome,
        policy=policy,
    )


def _thought(step: Step) -> str:
    """Return the turn's text without the calls written in it."""
    if not step.calls:
        return step.text
    codes = {code.strip() for call in step.calls for code in _texts(call.arguments)}
    text = _CALL_BLOCK.sub("", step.text)
    text = _FENCED.sub(lambda m: "" if m.group(1).strip() in codes else m.group(0), text)
    return text.rstrip()


def _texts(arguments: str) -> list[str]:
    """List the text values among a call's arguments."""
    try:
        values = json.loads(arguments)
    except ValueError:
        return []
    return [v for v in values.values() if isinstance(v, str)] if isinstance(values, dict) else []


def _read_steps(messages: Sequence[Mapping[str, JsonValue]]) -> Iterator[Step]:
    """Yield the steps of a conversation: the prompt, then turns with their tool results."""
    roles = [str(message.get("role")) for message in messages]
    index = next((n for n, role in enumerate(roles) if role == "assistant"), len(roles))
    for number, role in enumerate(roles[:index]):
        if role not in ("system", "developer", "user"):
            raise ValueError(f"messages[{number}]: role {role!r} before any assistant message")
    while index < len(messages):
        if roles[index] != "assistant":
            raise ValueError(
                f"messages[{index}]: role {roles[index]!r} where an assistant message belongs "
                "(one trajectory is one task, without further user messages)"
            )
        end = next((n for n in range(index + 1, len(roles)) if roles[n] != "tool"), len(roles))
        yield _read_step(messages, index, end)
        index = end


def _read_step(messages: Sequence[Mapping[str, JsonValue]], start: int, end: int) -> Step:
    """Read the assistant message at ``start`` and the tool messages up to ``end``."""
    turn = messages[start]
    ids, calls = [], []
    listed = turn.get("tool_calls") or []
    if not isinstance(listed, list):
        raise ValueError(f"messages[{start}].tool_calls: expected a list")
    for number, item in enumerate(listed):
        call_id, call = _read_call(f"messages[{start}].tool_calls[{number}]", item)
        ids.append(call_id)
        calls.append(call)
    contents: dict[int, str] = {}
    for index in range(start + 1, end):
        answered = _called(messages[index].get("tool_call_id"), ids, contents)
        if answered is None:
            raise ValueError(f"messages[{index}]: a tool result without a call it answers")
        contents[answered] = _content(index, messages[index])
    for number, call in enumerate(calls):
        if number not in contents:
            raise ValueError(f"messages[{start}]: the call of {call.name!r} has no tool result")
    text = _content(start, turn)
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        text = f"<think>\n{reasoning}\n</think>\n{text}"
    written = "\n".join(format_call(call) for call in calls)
    return Step(
        text=f"{text}\n{written}" if text and written else text + written,
        calls=tuple(calls),
        observations=tuple(Observation(content=contents[n]) for n in range(len(calls))),
    )


def _read_call(place: str, item: JsonValue) -> tuple[str, ToolCall]:
    """Read one entry of ``tool_calls``: its id and the call."""
    function = item.get("function") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(function, dict):
        raise ValueError(f"{place}: expected an object with 'function'")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str):
        raise ValueError(f"{place}: the function has no name")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments)
    if not isinstance(arguments, str):
        raise ValueError(f"{place}: arguments must be JSON text or an object")
    return str(item.get("id", "")), ToolCall(name=name, arguments=arguments)


def _called(call_id: JsonValue, ids: Sequence[str], taken: Mapping[int, str]) -> int | None:
    """Find the call a result answers: by id, or the first open one if it has no id."""
    for number, known in enumerate(ids):
        if number not in taken and call_id in (None, known):
            return number
    return None


def _content(index: int, message: Mapping[str, JsonValue]) -> str:
    """Return a message's text."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"messages[{index}].content: expected text or a list of text parts")
    return "".join(str(text) for text in texts)
