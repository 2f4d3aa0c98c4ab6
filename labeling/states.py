"""Identity of states: two rollouts of a task that reach one state measure the same value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, TypeAlias

from trajectory.records import Step, ToolCall

SameState: TypeAlias = Literal["text", "calls", "never"]
"""When two prefixes of a task are one state. ``text``: the same turns and observations, so the
policy is in the very same situation. ``calls``: the same calls and observations, whatever was
thought; that treats a thought as having no influence on what follows. ``never``: no sharing."""


def canonical_call(call: ToolCall) -> str:
    """Return one text for all ways to write a call: keys sorted, no optional white space.

    Examples
    --------
    >>> canonical_call(ToolCall(name="add", arguments='{"b": 1,  "a": 2.0}'))
    'add{"a":2.0,"b":1}'
    """
    try:
        value = json.loads(call.arguments)
    except ValueError:
        return f"{call.name}{call.arguments}"
    return f"{call.name}{canonical_arguments(value)}"


def canonical_arguments(arguments: object) -> str:
    """Return one text for all ways to write the arguments of a call.

    Examples
    --------
    >>> canonical_arguments({"b": 1, "a": [2.0]})
    '{"a":[2.0],"b":1}'
    """
    return json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def state_digests(task_id: str, steps: Sequence[Step], same: SameState = "text") -> tuple[str, ...]:
    """Return the digest of the state after each step; equal digests are one state.

    Parameters
    ----------
    task_id : str
        Where the steps begin.
    steps : sequence of Step, length S
        From the task's prompt on.
    same : SameState, default="text"
        What makes two states one; with ``never`` there is no digest.

    Returns
    -------
    tuple of str, length S or 0
        16 hexadecimal digits each; entry ``t - 1`` is the state after step ``t`` and depends on
        all steps before it. Two different states of a run get one digest with a probability below
        one in a million as long as there are fewer than six million states.
    """
    if same == "never":
        return ()
    digests = []
    state = task_id.encode(errors="surrogatepass")
    for step in steps:
        if same == "calls" and step.calls:
            said = "\0".join(canonical_call(call) for call in step.calls)
        else:
            said = step.text
        seen = "\0".join(observation.content for observation in step.observations)
        text = f"{len(said)}\0{said}{seen}".encode(errors="surrogatepass")
        state = blake2b(state + text, digest_size=8).hexdigest().encode()
        digests.append(state.decode())
    return tuple(digests)
