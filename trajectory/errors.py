"""The exceptions that end a command with one sentence.

Exception tree of the project (each lives with the boundary it names)::

    InputError                 trajectory.errors   bad input: one sentence, exit code 2
    GateError                  trajectory.errors   a measured gate is not met, exit code 3
    EngineError                agent.engines.base  generation broke: ends the episode
    ToolFailure                agent.tools.base    a tool's infrastructure broke: ends the episode
    SandboxError               agent.sandbox.base  the sandbox broke: becomes a ToolFailure
"""


class InputError(Exception):
    """Bad input; the message is one clear sentence: what, where, and what to do."""


class GateError(Exception):
    """A measurement is worse than the limit the user set; the report itself is complete."""
