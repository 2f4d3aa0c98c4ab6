"""Ways to run untrusted code, by name."""

import os
from collections.abc import Callable

from agent.sandbox.base import Sandbox
from agent.sandbox.unsafe import UnsafeSandbox
from trajectory.errors import InputError


def _unsafe(allow_unsafe: bool) -> Sandbox:
    """Make the backend without isolation, if the user asked for it."""
    if not allow_unsafe:
        raise InputError(
            "the sandbox 'unsafe' runs code written by the model as your user, without isolation: "
            "it can read and change your files and use the network; "
            "pass --allow-unsafe-tools to accept that"
        )
    return UnsafeSandbox(max_running=os.cpu_count() or 1)


SANDBOXES: dict[str, Callable[[bool], Sandbox]] = {"unsafe": _unsafe}
"""Backend makers by name; the argument says whether the user accepts missing isolation."""


def build_sandbox(name: str, *, allow_unsafe: bool) -> Sandbox:
    """Make a sandbox.

    Raises
    ------
    InputError
        If the name is unknown, or the backend isolates nothing and ``allow_unsafe`` is False.
    """
    if name not in SANDBOXES:
        raise InputError(f"unknown sandbox {name!r}; valid names: {', '.join(sorted(SANDBOXES))}")
    return SANDBOXES[name](allow_unsafe)
